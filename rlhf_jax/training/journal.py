"""What every loop does around its steps: continue, write the row, save when due, stop when asked.

The supervised loop and the loop of reinforcement learning differ in what a step is, not in this. A loop's state is one
pytree of arrays and one JSON-able dictionary of extras; together they must be all that the next step depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax import processes
from rlhf_jax.errors import DIVERGED, Preempted, UserError
from rlhf_jax.training.checkpoint import Checkpoints, Snapshot
from rlhf_jax.training.durable import remove_leftovers
from rlhf_jax.training.metrics import MetricsWriter, Row
from rlhf_jax.training.signals import StopRequested, StopSignal
from rlhf_jax.types import PyTree

_UNFINISHED = "unfinished_row"

Capture = Callable[[], tuple[PyTree, dict[str, Any]]]
"""Returns the arrays and the extras of the loop as they are after the last step."""
Evaluate = Callable[[], Mapping[str, Any]]
"""Measures the model as it is after the last step."""


class Journal:
    """Rows, checkpoints and stop requests of one loop.

    Args:
        checkpoints: where to save; None keeps nothing.
        metrics: where rows go; None writes none.
        stop: polled after every step; evaluations poll it themselves.
        prefix: put before the names of a row that have no slash, e.g. ``sft``.
        on_row: called with every row that is written, e.g. to draw progress.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None = None,
        metrics: MetricsWriter | None = None,
        stop: StopSignal | None = None,
        *,
        prefix: str = "",
        on_row: Callable[[Row], None] | None = None,
    ):
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.stop = StopSignal() if stop is None else stop
        self._prefix = prefix
        self._on_row = on_row
        self._unfinished: Row | None = None

    def resume(self, target: PyTree, loose: Sequence[str] = ()) -> Snapshot | None:
        """The newest good checkpoint, or None for a fresh start; rows after it are removed.

        The arguments are those of ``Checkpoints.restore_latest``.

        When the loop was stopped inside the evaluation of this step, ``unfinished`` is true, and the caller evaluates
        and finishes the step before it goes on.
        """
        snapshot = None
        if self.checkpoints is not None:
            directory = self.checkpoints.directory
            processes.first(f"tidying of {directory}", lambda: remove_leftovers(directory))
            snapshot = self.checkpoints.restore_latest(target, loose)
        extra = {} if snapshot is None else dict(snapshot.extra)
        self._unfinished = extra.pop(_UNFINISHED, None)
        if self.metrics is not None:
            self.metrics.truncate(None if snapshot is None else snapshot.step)
        return None if snapshot is None else Snapshot(snapshot.step, snapshot.tree, extra)

    @property
    def unfinished(self) -> bool:
        return self._unfinished is not None

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes the row of a step that needs nothing else; refuses a step that was not finite."""
        self.refuse_nonfinite(step, row)
        named = self._named(row)
        written = {"step": step, **named} if self.metrics is None else self.metrics.write(step, named)
        if self._on_row is not None:
            self._on_row(written)

    def finish(
        self,
        step: int,
        row: Mapping[str, Any],
        capture: Capture,
        *,
        evaluate: Evaluate | None = None,
        write: bool = True,
        last: bool = False,
    ) -> None:
        """Ends a step: evaluates, writes the row, saves when due, and raises ``Preempted`` when asked to stop.

        Args:
            step: the number of steps that were made.
            row: its metrics as Python numbers.
            capture: called only when something is saved.
            evaluate: its results join the row. It may raise ``StopRequested``; the row then stays open, is kept in
                the checkpoint, and is finished when the run is resumed.
            write: whether there is a row for this step.
            last: saves in any case.
        """
        row = {**(self._unfinished or {}), **row}
        self._unfinished = None
        self.refuse_nonfinite(step, row)
        if evaluate is not None:
            try:
                row |= evaluate()
            except StopRequested:
                self._save(step, capture, unfinished=row)
                raise self._preempted(step) from None
        if write:
            self.write(step, row)
        stopping = self.stop.poll()  # Once: a signal may come at any moment.
        if last or stopping or (self.checkpoints is not None and self.checkpoints.due(step)):
            self._save(step, capture)
        if stopping and not last:
            raise self._preempted(step)

    def refuse_nonfinite(self, step: int, row: Mapping[str, Any]) -> None:
        """Raises when the row has a ``nonfinite`` that is not 0; the row is still written, as evidence."""
        if not row.get("nonfinite"):
            return
        if self.metrics is not None:
            self.metrics.write(step, self._named(row))
            self.metrics.sync()
        seen = ", ".join(f"{name}={value}" for name, value in row.items() if not math.isfinite(value))
        steps = [] if self.checkpoints is None else self.checkpoints.steps()
        folder = None if self.checkpoints is None or not steps else self.checkpoints.folder(steps[-1])
        raise UserError(
            f"the loss or a gradient is not finite ({seen or 'see the metrics'})",
            at=f"step {step}",
            expected="finite numbers; the weights were not updated, "
            + ("nothing was saved before" if folder is None else f"the last good checkpoint is {folder}"),
            fix="lower the learning rate, or look at the batch of this step",
            exit_code=DIVERGED,
        )

    def _save(self, step: int, capture: Capture, unfinished: Row | None = None) -> None:
        if self.checkpoints is None:
            return
        if self.metrics is not None:
            self.metrics.sync()
        tree, extra = capture()
        self.checkpoints.save(step, tree, extra if unfinished is None else {**extra, _UNFINISHED: unfinished})

    def _preempted(self, step: int) -> Preempted:
        saved = "nothing is saved: there are no checkpoints" if self.checkpoints is None else "everything is saved"
        return Preempted(f"stopped after step {step}; {saved}")

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the prefix before plain names; where the objective says what its own loss is, that stays."""
        if not self._prefix:
            return dict(row)
        plain = {f"{self._prefix}/{name}": value for name, value in row.items() if "/" not in name}
        return {**plain, **{name: value for name, value in row.items() if "/" in name}}
