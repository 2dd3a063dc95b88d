"""``rlhf-jax check attention``: every law on this machine's own device, as tables of errors beside their bounds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.checks.matrix import KINDS, Entry, matrix, summary
from rlhf_jax.checks.measure import worst
from rlhf_jax.errors import UserError
from rlhf_jax.ops.attention.terms import this_device

FAILED = 1


def check_attention(file: Path | None, dtypes: Sequence[str]) -> None:
    """Print the matrix and write it to ``file``; a UserError with exit code 1 if anything failed."""
    console = Console(highlight=False)
    with Console(stderr=True).status("") as status:
        entries = matrix(dtypes, lambda number, total, what: status.update(f"{number} of {total}: {what}"))
    device = this_device()[1]
    for kind in dict.fromkeys(entry.kind for entry in entries):
        of_kind = [entry for entry in entries if entry.kind == kind]
        title = f"{KINDS[kind].title} on {device}: error ≤ bound of each law's worst case, of values and of gradients"
        for each in tables(of_kind, title, console.width):
            console.print(each)
        for line in (*failures(of_kind), *refusals(of_kind), Text()):
            console.print(line, soft_wrap=True)
    counts = Counter(entry.verdict for entry in entries)
    console.print(f"{counts['passed']} entries passed, {counts['failed']} failed, {counts['refused']} refused")
    if file is not None:
        text = json.dumps(_without_nan(summary(entries)), indent=1, ensure_ascii=False, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")
    if counts["failed"]:
        raise UserError(
            f"{counts['failed']} of {len(entries)} entries failed", at="check attention",
            fix="take another implementation on this device, and report what the table says", exit_code=FAILED,
        )  # fmt: skip


def tables(entries: Sequence[Entry], title: str, width: int) -> Iterator[Table]:
    """One row for each law, one column for each subject and dtype that was measured at all; of mixers the other way.

    Columns that do not fit into ``width`` characters go into further tables.
    """
    cells: dict[tuple[str, str], Text] = {}
    for entry in entries:
        place = entry.law, f"{entry.subject}\n{entry.dtype}"
        cells[(entry.subject, entry.law) if entry.kind == "mixer" else place] = cell(entry)
    rows, columns = (list(dict.fromkeys(place[i] for place in cells)) for i in (0, 1))
    columns = [name for name in columns if any(cells.get((row, name), REFUSED) != REFUSED for row in rows)]

    def wide(texts) -> int:
        return max(len(line) for text in texts for line in str(text).split("\n")) + 3

    first = wide([*rows, ""])
    left, page = 0, []
    for name in columns:
        needed = wide([name, *(cells.get((row, name), "") for row in rows)])
        if page and needed > left:
            yield _page(cells, rows, page, title)
            page = []
        left = (left if page else width - first - 1) - needed
        page.append(name)
    if page:
        yield _page(cells, rows, page, title)


def _page(cells: Mapping[tuple[str, str], Text], rows: Sequence[str], columns: Sequence[str], title: str) -> Table:
    made = Table("", title=title, title_justify="left")
    for name in columns:
        made.add_column(Text(name), justify="right", no_wrap=True)
    for row in rows:
        if any((row, name) in cells for name in columns):
            made.add_row(Text(row), *(cells.get((row, name), Text()) for name in columns))
    return made


REFUSED = Text("refused", style="dim")


def cell(entry: Entry) -> Text:
    """``3.7e-07 ≤ 1.4e-05`` for values and gradients in two lines; red where a bound was broken.

    A star says that some cases were refused.
    """
    if entry.worst is None:
        return REFUSED
    words = []
    for what in ("values", "gradients"):
        found = [each for each in entry.measured if each.what == what]
        if found:
            widest = worst(found)
            assert widest.error is not None and widest.bound is not None
            sign = "≤" if widest.verdict == "passed" else ">"
            words.append(f"{widest.error:.1e} {sign} {widest.bound:.1e}" if widest.bound else _bits(widest.error))
    some = " *" if entry.refusals else ""
    return Text("\n".join(dict.fromkeys(words)) + some, style="bold red" if entry.verdict == "failed" else "")


def _bits(error: float) -> str:
    return "same bits" if error == 0.0 else f"{error:.1e} > 0"


def failures(entries: Sequence[Entry]) -> Iterator[Text]:
    """What failed, in which case."""
    for entry in entries:
        for each in entry.measured:
            if each.verdict == "failed":
                what = f"{entry.subject}, {entry.law}, {each.what}: {each.error:.3g} > {each.bound:.3g} ({each.case})"
                yield Text(f"FAILED {what}", style="bold red")


def refusals(entries: Sequence[Entry]) -> Iterator[Text]:
    """Who refused what, and why."""
    reasons: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        for reason in entry.refusals:
            reasons.setdefault(entry.subject, {}).setdefault(reason, []).append(entry)
    for name, by_reason in reasons.items():
        asked = [entry for entry in entries if entry.subject == name]
        most = max(by_reason, key=lambda reason: len(by_reason[reason]))
        for reason, refused in sorted(by_reason.items(), key=lambda each: each[0] == most):
            if len(refused) == len(asked):
                where = "everything"
            elif reason == most and not any(entry.measured for entry in asked):
                where = "everything else"
            else:
                where = ", ".join(_places(refused, asked))
            yield Text(f"{name} refused {where}: {reason}", style="dim")


def _places(refused: Sequence[Entry], asked: Sequence[Entry]) -> Iterator[str]:
    """Dtypes in which everything that was asked was refused, and what else was."""
    count = Counter(entry.dtype for entry in refused)
    whole = [dtype for dtype, number in Counter(entry.dtype for entry in asked).items() if count[dtype] == number]
    yield from (f"everything in {dtype}" for dtype in whole)
    yield from dict.fromkeys(entry.law for entry in refused if entry.dtype not in whole)


def _without_nan(value):
    """JSON has no NaN and no infinity; None stands for both."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
