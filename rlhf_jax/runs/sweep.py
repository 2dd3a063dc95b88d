"""Run every value of a sweep in its own directory; what is finished is not run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax import config
from rlhf_jax.config import ConfigFile
from rlhf_jax.errors import UserError
from rlhf_jax.runs.rundir import CONFIG_FILE, is_done, read_config

RunOne = Callable[[Any, Path, Mapping[str, Any]], None]
"""(experiment, run directory, overrides): runs it to its end, resuming what is there."""

Report = Callable[[int, int, str, str], None]
"""(number, total, name of the run, what happens to it: "run", "resume" or "done")."""


def run_sweep(file: ConfigFile, root: Path, run: RunOne, report: Report) -> list[Path]:
    """Run what ``file.sweep()`` yields, each in ``root / name``; returns the directories in order.

    Every value is built before the first one runs, so that a mistake in the last costs nothing.
    """
    base = file.config()
    values = [(name, config.override(base, overrides), overrides) for name, overrides in file.sweep()]
    for name, value, _ in values:
        _check_same(root / name, value)
    for number, (name, value, overrides) in enumerate(values, start=1):
        directory = root / name
        if is_done(directory):
            report(number, len(values), name, "done")
            continue
        report(number, len(values), name, "resume" if (directory / CONFIG_FILE).is_file() else "run")
        run(value, directory, overrides)
    return [root / name for name, _, _ in values]


def _check_same(directory: Path, value: Any) -> None:
    """A finished run counts only for the configuration that it was made with."""
    if not is_done(directory):
        return
    rows = config.differences(read_config(directory), config.describe(value))
    if rows:
        table = "".join(f"\n  {path}: {old!r} -> {new!r}" for path, old, new in rows)
        fix = "take another --root, or remove the old run"
        raise UserError(f"was finished with another configuration:{table}\n", at=str(directory), fix=fix)
