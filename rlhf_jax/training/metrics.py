"""The record of a run: one JSON line per step with exact floats, and optional copies for TensorBoard and W&B.

``metrics.jsonl`` is the source of truth. Everything that depends on the clock is named ``perf/...``, so that two runs
can be compared bit for bit without it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rlhf_jax import processes
from rlhf_jax.errors import IO, UserError

Row = dict[str, Any]
"""``{"step": int, name: float, ...}``."""


class Sink(Protocol):
    """Somewhere else to send rows to."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends rows to a JSON lines file, one per step, each flushed as it is written.

    Floats are written so that they read back exactly; numbers that are not finite as Python's json writes them (NaN).
    A step that was written cannot be written again: call ``truncate`` first, as a resumed run does. Of several
    processes, only the first writes; the others have the same rows and keep them to themselves.
    """

    def __init__(self, path: str | os.PathLike[str], sinks: Iterable[Sink] = ()):
        self.path = Path(path)
        self.sinks = tuple(sinks)
        self._last: int | None = None
        self._file = None
        if not processes.is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path)
        self._last = rows[-1]["step"] if rows else None
        self._file = self.path.open("a", encoding="utf-8")
        whole = self.path.read_bytes()
        # A row that was being written when an earlier process died must not join the next one.
        self._file.truncate(whole.rfind(b"\n") + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> Row:
        """Writes the row of a step; values are Python, numpy or JAX scalars."""
        if self._last is not None and step <= self._last:
            raise ValueError(f"{self.path}: row of step {step} after that of step {self._last}; expected a later step")
        row = {name: _number(name, value) for name, value in values.items()}
        try:
            if self._file is not None:
                self._file.write(json.dumps({"step": step, **row}) + "\n")
                self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._last = step
        for sink in self.sinks:
            sink.write(step, row)
        return {"step": step, **row}

    def truncate(self, last_step: int | None) -> None:
        """Keeps the rows up to ``last_step`` (None: no row) and drops a torn last line."""
        if self._file is None:
            self._last = last_step
            return
        kept = [row for row in read_metrics(self.path) if last_step is not None and row["step"] <= last_step]
        self._file.close()
        draft = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            self._file = self.path.open("a", encoding="utf-8")
        self._last = kept[-1]["step"] if kept else None

    def sync(self) -> None:
        """Forces the rows to the disk; a checkpoint must not outlive the rows before it."""
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics file, without a torn last line; no file is no rows."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # What follows the last line break is empty, or a row that was being written when the process died.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"not a row of metrics ({error})",
                at=f"{path}:{number}",
                expected="one JSON object per line",
                fix="remove the damaged line",
                exit_code=IO,
            ) from error
    return rows


class Throughput:
    """Turns counts of work into rates over the time since the last call, named ``perf/<what>_per_s``."""

    def __init__(self):
        self._since = time.monotonic()

    def rates(self, **counts: float) -> dict[str, float]:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return {f"perf/{name}_per_s": count / max(seconds, 1e-9) for name, count in counts.items()}

    def restart(self) -> None:
        """Leaves out the time up to now, e.g. that of an evaluation."""
        self._since = time.monotonic()


class TensorBoard:
    """Copies rows to TensorBoard event files (extra ``tensorboard``)."""

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _no_package("tensorboardX", "tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Copies rows to Weights & Biases (extra ``wandb``); a run that goes on is found by its ``identity``."""

    def __init__(self, project: str, identity: str, config: Mapping[str, Any] | None = None, **options: Any):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _no_package("wandb", "wandb") from error
        self._run = wandb.init(project=project, id=identity, resume="allow", config=dict(config or {}), **options)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _number(name: str, value: Any) -> float | int:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool | int):
        return int(number)
    if isinstance(number, float):
        return number
    raise ValueError(f"metric {name!r} is {value!r}; expected one number")


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write metrics ({error.strerror})",
        at=str(path),
        fix="free space or mend the permissions, then resume the run",
        exit_code=IO,
    )


def _no_package(package: str, extra: str) -> UserError:
    return UserError(
        f"package {package!r} is not installed",
        at="metrics",
        expected=f"the extra {extra!r}",
        fix=f"pip install 'rlhf_jax[{extra}]'",
    )
