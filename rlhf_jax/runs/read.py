"""Read runs back: metrics as arrays, final numbers with intervals, samples, configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax import config
from rlhf_jax.errors import MISSING_INPUT, UserError
from rlhf_jax.runs.files import read_json, read_rows
from rlhf_jax.runs.rundir import CONFIG_FILE, SUMMARY_FILE, read_config
from rlhf_jax.training.metrics import read_metrics

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was written."""

    steps: Int[np.ndarray, " R"]
    values: Float[np.ndarray, " R"]

    @property
    def tail(self) -> float:
        """The mean of the last twentieth of the rows (of the last row at least): a noisy curve's final number."""
        return float(self.values[-max(1, len(self.values) // 20) :].mean())


@dataclass(frozen=True)
class Number:
    """A final number; ``low`` and ``high`` bound its 95 % interval and are nan where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class StageRecord:
    """What one stage left: its metrics by name, its final numbers, its sample texts."""

    name: str
    metrics: dict[str, Series]
    final: dict[str, Number]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run read from its directory. ``final`` holds the numbers of the whole run's summary."""

    path: Path
    config: Any
    environment: dict[str, Any]
    final: dict[str, Number]
    summary: dict[str, Any]
    stages: dict[str, StageRecord]

    @property
    def group(self) -> str:
        """Equal for runs that differ in nothing but their seed."""
        return config.fingerprint(self.config, without=("seed",))

    def series(self) -> dict[str, Series]:
        """All metrics, as ``stage: name``."""
        return {f"{s.name}: {name}": series for s in self.stages.values() for name, series in s.metrics.items()}

    def numbers(self) -> dict[str, Number]:
        """All final numbers: the run's own, then ``stage: name`` (of a curve its tail)."""
        found = dict(self.final)
        for stage in self.stages.values():
            tails = {name: Number(series.tail) for name, series in stage.metrics.items()}
            found |= {f"{stage.name}: {name}": number for name, number in (tails | stage.final).items()}
        return found


def read_run(directory: str | Path) -> Run:
    """Read a run directory, finished or not.

    Raises:
        UserError: if there is no run in it, or one of its files is damaged.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        what = f"no {CONFIG_FILE} in it" if directory.is_dir() else "no such directory"
        raise UserError(what, at=str(directory), expected="a run directory", exit_code=MISSING_INPUT)
    summary, description = _optional_json(directory / SUMMARY_FILE), read_config(directory)
    return Run(
        path=directory,
        config=description,
        environment=_optional_json(directory / "environment.json"),
        final=final_numbers(summary),
        summary=summary,
        stages={folder.name: _read_stage(folder) for folder in _stage_folders(directory, description)},
    )


def _stage_folders(directory: Path, description: Any) -> list[Path]:
    """The folders of stages, in the order of the configuration."""
    stages = description.get("stages", ()) if isinstance(description, dict) else ()
    order = [stage.get("name") for stage in stages if isinstance(stage, dict)]
    folders = sorted(entry for entry in directory.iterdir() if (entry / METRICS_FILE).is_file())
    return sorted(folders, key=lambda folder: order.index(folder.name) if folder.name in order else len(order))


def _read_stage(folder: Path) -> StageRecord:
    final = final_numbers(_optional_json(folder / SUMMARY_FILE))
    return StageRecord(folder.name, read_series(folder / METRICS_FILE), final, read_rows(folder / SAMPLES_FILE))


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_series(path: Path) -> dict[str, Series]:
    """Metric name -> series; of a step that was written twice the last row counts, and text is left out."""
    columns: dict[str, dict[int, float]] = {}
    for row in read_metrics(path):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, bool | int | float):
                columns.setdefault(name, {})[step] = float(value)
    series = {}
    for name, column in columns.items():
        steps = sorted(column)
        series[name] = Series(np.array(steps), np.array([column[step] for step in steps], dtype=float))
    return series


def final_numbers(summary: Mapping[str, Any], prefix: str = "") -> dict[str, Number]:
    """Every number of a summary by its dotted path; ``{"value", "low", "high"}`` is one number with an interval."""
    if isinstance(summary.get("value"), int | float):
        bounds = [summary.get(name) for name in ("low", "high")]
        low, high = (float(bound) if isinstance(bound, int | float) else math.nan for bound in bounds)
        return {prefix: Number(float(summary["value"]), low, high)}
    found: dict[str, Number] = {}
    for name, value in summary.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            found |= final_numbers(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = Number(float(value))
    return found
