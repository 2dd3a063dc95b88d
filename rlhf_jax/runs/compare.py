"""Compare runs: a table of final numbers, plots against the step, and what their configurations differ in.

Runs that differ in nothing but the seed are one column, with a mean and an interval over the seeds.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_jax import config
from rlhf_jax.errors import UserError
from rlhf_jax.runs import plots
from rlhf_jax.runs.read import Number, Run
from rlhf_jax.runs.statistics import band, over_seeds

DEFAULT_METRICS = ("*loss*", "*accuracy*", "*reward*", "*gold*", "*win*", "*score*", "*kl*", "*length*", "*bits*")


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration, apart from the seed."""

    label: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Runs by configuration, in the order given; a group is named after its first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    firsts = [members[0].path for members in groups.values()]
    labels = _shortest_labels(firsts)
    sizes = [f" ({len(members)} seeds)" if len(members) > 1 else "" for members in groups.values()]
    return [RunGroup(a + b, tuple(m)) for a, b, m in zip(labels, sizes, groups.values(), strict=True)]


def _shortest_labels(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def chosen_metrics(available: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that a pattern fits, as a whole or as a part.

    Raises:
        UserError: if a pattern fits nothing, with what there is.
    """
    chosen: list[str] = []
    for pattern in patterns:
        wildcard = pattern if any(letter in pattern for letter in "*?[") else f"*{pattern}*"
        fits = [name for name in available if fnmatch.fnmatchcase(name, wildcard)]
        if not fits:
            raise UserError(f"no metric {pattern!r}", at="--metric", expected=f"one of {', '.join(available)}")
        chosen += [name for name in fits if name not in chosen]
    return chosen


def comparison(runs: Sequence[Run], patterns: Sequence[str] = ()) -> Group:
    """The tables, for a console: final numbers by group, then the differences between the configurations."""
    groups = group_runs(runs)
    tables = [number_table(groups, patterns)]
    if len(groups) > 1:
        tables.append(difference_table(groups))
    return Group(*tables)


def number_table(groups: Sequence[RunGroup], patterns: Sequence[str]) -> Table:
    """One row for each final number, one column for each group."""
    numbers = [[run.numbers() for run in group.runs] for group in groups]
    names = list(dict.fromkeys(name for group in numbers for run in group for name in run))
    names = chosen_metrics(names, patterns) if patterns else _default_names(names)
    title = "final numbers with 95 % intervals (of a curve: the mean of its last twentieth)"
    table = Table(title=title, title_justify="left")
    table.add_column("metric", overflow="fold")
    for group in groups:
        table.add_column(Text(group.label), justify="right", overflow="fold")
    for name in names:
        cells = []
        for group in numbers:
            found = [run[name] for run in group if name in run]
            cells.append(Text(number_text(over_seeds(found)) if found else "-"))
        table.add_row(Text(name), *cells)
    return table


def _default_names(names: Sequence[str]) -> list[str]:
    likely = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in DEFAULT_METRICS)]
    return likely if likely else list(names)


def number_text(number: Number) -> str:
    """``0.812 [0.790, 0.834]``, with the digits that a reader can use."""
    if not number.has_interval:
        return f"{number.value:.4g}"
    return f"{number.value:.4g} [{number.low:.4g}, {number.high:.4g}]"


def difference_table(groups: Sequence[RunGroup]) -> Table:
    """Every configuration field in which the groups differ, the seed apart."""
    flat = [config.flatten(group.runs[0].config) for group in groups]
    paths = list(dict.fromkeys(path for one in flat for path in one))
    table = Table(title="configuration", title_justify="left")
    table.add_column("field", overflow="fold")
    for group in groups:
        table.add_column(Text(group.label), justify="right", overflow="fold")
    for path in paths:
        values: list[Any] = [one.get(path, config.ABSENT) for one in flat]
        if path != "seed" and any(value != values[0] for value in values):
            table.add_row(Text(path), *(Text(str(value)) for value in values))
    return table


def save_plots(runs: Sequence[Run], folder: Path, patterns: Sequence[str] = ()) -> list[Path]:
    """Write one PNG for each chosen metric that was logged over the steps; returns their paths."""
    groups = group_runs(runs)
    series = {group.label: [run.series() for run in group.runs] for group in groups}
    names = list(dict.fromkeys(name for group in series.values() for run in group for name in run))
    numbers = list(dict.fromkeys(name for run in runs for name in run.numbers()))
    # A pattern that only fits a final number is in the table and has no curve.
    known = chosen_metrics(list(dict.fromkeys(names + numbers)), patterns) if patterns else _default_names(names)
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in (name for name in known if name in names):
        found = {label: [run[name] for run in group if name in run] for label, group in series.items()}
        bands = {label: band(members) for label, members in found.items() if members}
        path = folder / (re.sub(r"[^A-Za-z0-9._-]+", "-", name) + ".png")
        path.write_bytes(plots.png(plots.compared_metric(name, bands)))
        written.append(path)
    return written
