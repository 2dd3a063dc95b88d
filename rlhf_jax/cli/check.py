"""``rlhf-jax check attention``: every law on this machine's own device, as tables of errors beside their bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.checks.matrix import Entry, matrix, summary
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
        console.print(table(of_kind, f"{kind}s on {device}: error ≤ bound of each law's worst case"))
    for line in remarks(entries):
        console.print(line, soft_wrap=True)
    if file is not None:
        text = json.dumps(_without_nan(summary(entries)), indent=1, ensure_ascii=False, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")
    failed = sum(not entry.passed for entry in entries)
    if failed:
        raise UserError(
            f"{failed} of {len(entries)} entries failed", at="check attention",
            fix="take another implementation on this device, and report what the table says", exit_code=FAILED,
        )  # fmt: skip


def table(entries: Sequence[Entry], title: str) -> Table:
    """One row for each law, dtype and values or gradients, one column for each subject that was measured at all."""
    mixers = entries[0].kind == "mixer"
    subjects = [name for name in dict.fromkeys(entry.subject for entry in entries)
                if any(entry.measured for entry in entries if entry.subject == name)]  # fmt: skip
    rows = list(dict.fromkeys((entry.dtype, entry.law) for entry in entries))
    by_place = {(entry.dtype, entry.law, entry.subject): entry for entry in entries}
    made = Table(title=title, title_justify="left", show_lines=False)
    if mixers:
        made.add_column("mixer")
        for _, law in rows:
            made.add_column(law, justify="right")
        for name in subjects:
            made.add_row(Text(name), *(cell(by_place.get((*row, name))) for row in rows))
        return made
    made.add_column("law")
    made.add_column("inputs")
    for name in subjects:
        made.add_column(Text(name), justify="right")
    for number, (dtype, law) in enumerate(rows):
        ends = number + 1 == len(rows) or rows[number + 1][0] != dtype
        cells = (cell(by_place.get((dtype, law, name))) for name in subjects)
        made.add_row(law, dtype, *cells, end_section=ends)
    return made


def cell(entry: Entry | None) -> Text:
    """``3.7e-07 ≤ 1.4e-05`` for values and gradients in two lines; red where a bound was broken."""
    if entry is None:
        return Text("")
    if entry.worst is None:
        return Text("refused", style="dim")
    words = []
    for what in ("values", "gradients"):
        found = [each for each in entry.measured if each.what == what]
        if found:
            widest = max(found, key=lambda each: (not each.passed, each.share))
            assert widest.error is not None and widest.bound is not None
            sign = "≤" if widest.passed else ">"
            words.append(f"{widest.error:.1e} {sign} {widest.bound:.1e}" if widest.bound else _bits(widest.error))
    some = " *" if entry.refusals else ""
    return Text("\n".join(words) + some, style="" if entry.passed else "bold red")


def _bits(error: float) -> str:
    return "same bits" if error == 0.0 else f"{error:.1e} > 0"


def remarks(entries: Sequence[Entry]) -> list[Text]:
    """What failed, in which case; and why something was refused."""
    lines = []
    for entry in entries:
        for each in entry.measured:
            if not each.passed:
                what = f"{entry.subject}, {each.law}, {each.what}: {each.error:.3g} > {each.bound:.3g} ({each.case})"
                lines.append(Text(f"FAILED {what}", style="bold red"))
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for entry in entries:
        for reason in entry.refusals:
            reasons.setdefault((entry.subject, reason), {})[entry.law] = None
    of_kind = {name: {entry.law for entry in entries if entry.subject == name} for name, _ in reasons}
    for (name, reason), laws in reasons.items():
        where = "everything" if set(laws) == of_kind[name] else ", ".join(laws)
        lines.append(Text(f"{name} refused {where}: {reason}", style="dim"))
    failed, measured = sum(not entry.passed for entry in entries), sum(bool(entry.measured) for entry in entries)
    lines.append(Text(f"{measured} entries measured, {failed} failed, {len(entries) - measured} refused"))
    return lines


def _without_nan(value):
    """JSON has no NaN and no infinity; None stands for both."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
