"""The supervised loop of pretraining, demonstrations and reward models.

A run that is killed and resumed gives the same bits as one that was not: the checkpoint holds the state and the
position in the data, and keys are derived from the number of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from rlhf_jax.errors import BAD_DATA, UserError
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.journal import Journal
from rlhf_jax.training.metrics import MetricsWriter, Row, Throughput
from rlhf_jax.training.signals import StopSignal
from rlhf_jax.training.step import TrainStep
from rlhf_jax.types import Key, Metrics, PyTree, TrainState


class Batches(Protocol):
    """An endless stream of batches that knows where it is."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def train(
    state: TrainState,
    step_fn: TrainStep,
    batches: Batches,
    *,
    total_steps: int,
    key: Key,
    checkpoints: Checkpoints | None = None,
    metrics: MetricsWriter | None = None,
    stop: StopSignal | None = None,
    evaluate: Callable[[PyTree], Mapping[str, Any]] | None = None,
    evaluate_every: int = 0,
    evaluate_first: bool = False,
    log_every: int = 1,
    prefix: str = "",
    count_tokens: Callable[[Any], int] | None = None,
    place: Callable[[Any], Any] = lambda batch: batch,
    on_row: Callable[[Row], None] | None = None,
) -> TrainState:
    """Makes the steps that are missing and returns the state after the last one.

    Continues from the newest good checkpoint where there is one; ``state`` is then only the pattern. The given state
    is donated. Steps count from 1; step ``i`` uses ``fold_in(key, i - 1)``.

    Args:
        state: before the first step.
        step_fn: from ``make_train_step``.
        batches: one is taken per step.
        total_steps: optimizer steps from the very beginning.
        key: the root of all randomness in the steps.
        checkpoints: saved when due, when stopped, and after the last step.
        metrics: one row for every ``log_every``-th step, every evaluation and the last step.
        stop: polled after every step; let ``evaluate`` poll the same one between its batches.
        evaluate: measures parameters; after every ``evaluate_every`` steps (0: never) and after the last step.
        evaluate_first: also before the first step, as the row of step 0.
        log_every: see ``metrics``.
        prefix: of the metrics' names, e.g. ``sft``.
        count_tokens: tokens of a batch, for ``perf/tokens_per_s``.
        place: puts a batch where the step wants it.
        on_row: called with every row.

    Raises:
        Preempted: a stop was asked for, and everything is saved.
        UserError: a loss or gradient is not finite, the data ended, or a checkpoint cannot be read or written.
    """
    journal = Journal(checkpoints, metrics, stop, prefix=prefix, on_row=on_row)
    snapshot = journal.resume({"state": state})
    step = 0
    if snapshot is not None:
        step, state = snapshot.step, snapshot.tree["state"]
        batches.set_state(snapshot.extra["batches"])

    def capture() -> tuple[PyTree, dict[str, Any]]:
        return {"state": state}, {"batches": batches.get_state()}

    def measured() -> Mapping[str, Any]:
        return {} if evaluate is None else evaluate(state.params)

    def finish(row: Row, write: bool = True, measure: bool = False) -> None:
        last = step == total_steps
        journal.finish(step, row, capture, evaluate=measured if measure else None, write=write, last=last)

    if journal.unfinished or (snapshot is None and evaluate_first):
        finish({}, measure=True)
    clock, work = Throughput(), {"steps": 0, "tokens": 0}
    running: tuple[int, Metrics] | None = None  # the step whose metrics were not fetched yet

    def fetch(number: int, values: Metrics, wanted: bool) -> Row:
        row = {name: value.item() for name, value in jax.device_get(values).items()}
        journal.refuse_nonfinite(number, row)
        if not wanted:
            return row
        done = {name: count for name, count in work.items() if count}
        work.update(steps=0, tokens=0)
        return row | clock.rates(**done)

    while step < total_steps:
        batch = _next(batches, step)
        state, values = step_fn(state, place(batch), jax.random.fold_in(key, step))
        if running is not None:
            # The metrics of a step are fetched while the next one runs, so that the device never waits.
            number, earlier = running
            wanted = number % log_every == 0
            row = fetch(number, earlier, wanted)
            if wanted:
                journal.write(number, row)
        step += 1
        work["steps"] += 1
        work["tokens"] += 0 if count_tokens is None else count_tokens(batch)
        last = step == total_steps
        measure = last or (evaluate_every > 0 and step % evaluate_every == 0)
        running = (step, values)
        if last or measure or journal.stop.poll() or (checkpoints is not None and checkpoints.due(step)):
            wanted = step % log_every == 0 or last or (measure and evaluate is not None)
            finish(fetch(step, values, wanted), write=wanted, measure=measure)
            running = None
            clock.restart()
    return state


def _next(batches: Batches, step: int) -> Any:
    try:
        return next(batches)  # pyright: ignore[reportArgumentType]
    except StopIteration:
        raise UserError(
            f"the data ended after {step} batches",
            at="training",
            expected="a stream that repeats, or as many batches as steps",
            fix="repeat the data, or ask for fewer steps",
            exit_code=BAD_DATA,
        ) from None
