"""The loop of online reinforcement learning: sample, score, prepare, then epochs of minibatches; and again.

It knows no algorithm: what an iteration is made of comes as functions in a ``Program``. All randomness derives from
(key, iteration), and checkpoints lie between iterations: one that was interrupted is done again. A rollout is stored
only where it was drawn ahead, see ``ahead.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax.training.ahead import Ahead, Collect, Collected, Rollouts, check_agreement
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.journal import Journal
from rlhf_jax.training.loop import Batches
from rlhf_jax.training.metrics import MetricsWriter, Row, Throughput
from rlhf_jax.training.signals import StopSignal
from rlhf_jax.training.step import TrainStep
from rlhf_jax.types import Key, Metrics, PyTree, Rollout, Scores, TrainState


@dataclass(frozen=True)
class Program:
    """What one iteration consists of.

    Args:
        collect: ``(params, stream of prompts, key, step) -> (rollout, scores, metrics)``: samples and scores, with as
            many prompts as it needs; ``params`` are all that the state holds, trained or not.
        prepare: ``(params, rollout, scores, controller) -> (experience, metrics)``, without gradient.
        batch: ``(experience, rows, streams) -> minibatch``; takes rows, and adds text where there is some.
        update: one optimizer step on a minibatch.
        control: ``(controller, scores, metrics) -> controller``, after the updates.
        rest: ``(state) -> state`` before an iteration's sampling: puts away what only updates need.
        wake: brings it back before the updates.
        ahead: draws and scores each rollout but the first before the updates of the iteration before, in the place of
            ``collect``; None collects them when they are needed.
    """

    collect: Collect
    prepare: Callable[[PyTree, Rollout, Scores, PyTree], tuple[PyTree, Metrics]]
    batch: Callable[[PyTree, np.ndarray, Mapping[str, Batches]], Any]
    update: TrainStep
    control: Callable[[PyTree, Scores, Metrics], PyTree]
    rest: Callable[[TrainState], TrainState] = lambda state: state
    wake: Callable[[TrainState], TrainState] = lambda state: state
    ahead: Ahead | None = None


@dataclass(frozen=True)
class Plan:
    """How often and how much.

    Args:
        iterations: of sampling and learning.
        minibatch: rows of a rollout in one update.
        epochs: passes over each rollout.
        evaluate_every: iterations between evaluations; None evaluates at the end only.
        streams: further data that minibatches take from, by name.
        together: rows that stay side by side in a minibatch, such as all responses to a prompt.
    """

    iterations: int
    minibatch: int
    epochs: int = 1
    evaluate_every: int | None = None
    streams: Mapping[str, Batches] = field(default_factory=dict)
    together: int = 1


def reinforce(
    program: Program,
    plan: Plan,
    state: TrainState,
    controller: PyTree,
    prompts: Batches,
    *,
    key: Key,
    checkpoints: Checkpoints | None = None,
    metrics: MetricsWriter | None = None,
    stop: StopSignal | None = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    prefix: str = "",
    on_row: Callable[[Row], None] | None = None,
) -> TrainState:
    """Train ``state`` for ``plan.iterations`` in all, from the newest checkpoint on if there is one.

    There is one row for each iteration. A metric of updates is the mean over the iteration's updates (the largest, for
    names that end in ``deviation``).

    Args:
        program: the pieces of an iteration.
        plan: their sizes and number, and further streams of data.
        state: before the first update; donated.
        controller: arrays that change once an iteration, such as the KL coefficient.
        prompts: an endless stream of them.
        key: the root of all randomness.
        checkpoints: saved when due, when stopped, and after the last iteration.
        metrics: one row an iteration.
        stop: polled after every iteration; let ``evaluate`` poll the same one.
        evaluate: measures the state; at ``plan.evaluate_every`` and after the last iteration.
        prefix: of names without a slash, such as ``loss``.
        on_row: called with every row.

    Raises:
        Preempted: a stop was asked for; the iteration is finished and saved.
        UserError: for a score, loss or gradient that is not finite, and where sampler and scorer disagree.
    """
    streams = {"prompts": prompts, **plan.streams}
    journal = Journal(checkpoints, metrics, stop, prefix=prefix, on_row=on_row)
    snapshot = journal.resume({"state": state, "controller": controller}, loose=("rollout",))
    iteration = 0
    with Rollouts(program.collect, prompts, key, plan.iterations, program.ahead) as rollouts:
        if snapshot is not None:
            iteration, state, controller = snapshot.step, snapshot.tree["state"], snapshot.tree["controller"]
            rollouts.restore(snapshot.tree["rollout"], snapshot.extra.get("rollout", {}))
            for name, stream in streams.items():
                stream.set_state(snapshot.extra[name])

        def capture() -> tuple[PyTree, dict[str, Any]]:
            rollout, noted = rollouts.capture()  # waits, so before the streams: it may take from that of prompts
            states = {name: stream.get_state() for name, stream in streams.items()}
            return {"state": state, "controller": controller, "rollout": rollout}, {**states, "rollout": noted}

        def finish(row: Row, measure: bool) -> None:
            found = functools.partial(evaluate, state) if measure and evaluate is not None else None
            journal.finish(iteration, row, capture, evaluate=found, last=iteration == plan.iterations)

        if journal.unfinished:
            finish({}, measure=True)
        clock = Throughput()
        while iteration < plan.iterations:
            iteration += 1
            state = program.rest(state)
            collected = rollouts.take(iteration, state)
            state, controller, row, tokens = _learn(
                program, plan, state, controller, collected, streams, key, iteration
            )
            if checkpoints is not None and checkpoints.due(iteration):
                rollouts.wait()  # saving would, and no rate would tell
            row |= clock.rates(response_tokens=tokens, iterations=1)
            due = plan.evaluate_every is not None and iteration % plan.evaluate_every == 0
            finish(row, measure=due or iteration == plan.iterations)
            clock.restart()
    return state


def _learn(
    program: Program,
    plan: Plan,
    state: TrainState,
    controller: PyTree,
    collected: Collected,
    streams: Mapping[str, Batches],
    key: Key,
    iteration: int,
) -> tuple[TrainState, PyTree, Row, int]:
    """The updates on a rollout; also returns the row of metrics and the number of sampled tokens."""
    own = jax.random.fold_in(key, iteration)
    rollout, scores, score_metrics = collected
    experience, rollout_metrics = program.prepare(state.whole, rollout, scores, controller)
    rows, state = rollout.tokens.shape[0], program.wake(state)
    updates: list[Metrics] = []
    for epoch in range(plan.epochs):
        groups = np.asarray(jax.random.permutation(jax.random.fold_in(own, 1 + epoch), rows // plan.together))
        order = groups[:, None] * plan.together + np.arange(plan.together)
        for chosen in order.reshape(-1, plan.minibatch):
            batch = program.batch(experience, chosen, streams)
            state, metrics = program.update(state, batch, jax.random.fold_in(own, plan.epochs + 1 + len(updates)))
            updates.append(metrics)
    controller = program.control(controller, scores, rollout_metrics)
    fetched, rollout_row, tokens = jax.device_get((updates, rollout_metrics, rollout.response_mask.sum()))
    if program.ahead is None:
        check_agreement(float(fetched[0].get("ppo/ratio_mean", 1.0)), iteration)
    first = "ppo/first_ratio_deviation" if program.ahead is None else "ppo/stale_ratio_deviation"
    return state, controller, {**_named(score_metrics), **_named(rollout_row), **_merge(fetched, first)}, int(tokens)


def _merge(updates: list[dict[str, np.ndarray]], first: str) -> dict[str, float]:
    """One number for each metric of an iteration's updates; ``first`` names what the first update tells about the
    sampler."""
    merged = {}
    for name in updates[0]:
        values = np.array([update[name] for update in updates], np.float64)
        merged[name] = float(values.max() if name.endswith("deviation") else values.mean())
    if "ppo/ratio_max_deviation" in updates[0]:
        merged[first] = float(updates[0]["ppo/ratio_max_deviation"])
    return merged


def _named(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@jax.jit
def take_rows(tree: PyTree, rows: Array) -> PyTree:
    """The given rows of every array; scalars stay."""
    return jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else x[rows], tree)
