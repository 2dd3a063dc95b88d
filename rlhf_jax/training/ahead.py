"""Where the loop of reinforcement learning gets its rollouts from: drawn when they are needed, or one iteration ahead.

Ahead, the rollout of the next iteration is begun before the updates of this one, with the parameters as they are then;
a thread judges it while they run. Whatever takes how long, it is always exactly one iteration old (the first is not),
so results depend on nothing but seed and configuration. Threads other than the loop's own dispatch no updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax.errors import DIVERGED, UserError
from rlhf_jax.sharding import fetch
from rlhf_jax.training.loop import Batches
from rlhf_jax.types import Key, PyTree, Rollout, Scores, TrainState

AGREEMENT = 0.01
"""How far from 1 the mean ratio of sampler and scorer may lie before they count as two models."""

Collected = tuple[Rollout, Scores, Mapping[str, float]]
"""A rollout, what the rewards say of it, and numbers to log."""
Collect = Callable[[PyTree, Batches, Key, Array], Collected]
"""``(params, stream of prompts, key, step)``: samples and scores, with as many prompts as it needs."""
Begin = Callable[[PyTree, Batches, Key, Array], Callable[[], Collected]]
"""The same in two halves: dispatches what can be dispatched; what comes back judges and waits, in any thread."""


@dataclass(frozen=True)
class Ahead:
    """What it takes to draw a rollout ahead of the updates of the iteration before.

    Args:
        begin: see ``Begin``.
        copy: of all parameters, what ``begin`` and ``ratios`` read, in memory of its own: updates donate theirs.
        ratios: ``(copied params, rollout) -> (mean, largest distance from 1)`` of the probability ratios between scorer
            and sampler. In the first minibatch the policy is no longer what sampled it, so nothing else tells.
    """

    begin: Begin
    copy: Callable[[PyTree], PyTree]
    ratios: Callable[[PyTree, Rollout], tuple[Array, Array]]


class Rollouts:
    """The rollouts of a run, taken in order. Left as a context, no thread and no rollout is on its way.

    Args:
        collect: samples and scores.
        prompts: the stream of them, in nobody else's hands.
        key: the root of all randomness; that of a rollout derives from its iteration.
        last: the last iteration.
        ahead: draws each but the first one iteration earlier; None draws them when they are taken.
    """

    def __init__(self, collect: Collect, prompts: Batches, key: Key, last: int, ahead: Ahead | None = None):
        self._collect, self._prompts, self._key, self._last, self._ahead = collect, prompts, key, last, ahead
        self._next: Future[Collected] | None = None
        self._worker = None if ahead is None else ThreadPoolExecutor(1, thread_name_prefix="rollout")

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def take(self, iteration: int, state: TrainState) -> Collected:
        """That of an iteration; ``state`` is the one before its updates.

        Raises:
            UserError: for a score that is not finite, and where sampler and scorer disagree; also what rewards raise.
        """
        key = self._key_of(iteration)
        if self._ahead is None:
            found = self._collect(state.whole, self._prompts, key, state.step)
            check_scores(found[1], found[0], iteration)
            return found
        found = self._begin(self._ahead, iteration, state)() if self._next is None else self._next.result()
        self._next = None
        if iteration < self._last:
            assert self._worker is not None
            self._next = self._worker.submit(self._begin(self._ahead, iteration + 1, state))
        return found

    def wait(self) -> None:
        """Until the rollout of the next iteration is there, or has failed."""
        if self._next is not None:
            wait([self._next])

    def capture(self) -> tuple[PyTree, dict[str, Any]]:
        """The rollout that the next iteration takes, as arrays and extras of a checkpoint; waits for it.

        One that failed raises here, and nothing is saved: its parameters are gone, so it could not be drawn again.
        """
        if self._next is None:
            return {}, {}
        rollout, scores, metrics = self._next.result()
        extra = {"temperature": rollout.temperature, "metrics": {name: float(x) for name, x in metrics.items()}}
        return {"rollout": rollout, "scores": scores}, extra

    def restore(self, arrays: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Any]) -> None:
        """Go on from what ``capture`` gave, whose arrays are nested dictionaries now."""
        if not arrays:
            return
        rollout = Rollout(**arrays["rollout"], temperature=extra["temperature"])
        self._next = Future()
        self._next.set_result((rollout, Scores(**arrays["scores"]), extra["metrics"]))

    def _key_of(self, iteration: int) -> Key:
        return jax.random.fold_in(jax.random.fold_in(self._key, iteration), 0)

    def _begin(self, ahead: Ahead, iteration: int, state: TrainState) -> Callable[[], Collected]:
        # Here and not in the worker: what is dispatched first is computed first, and updates are dispatched next.
        params, step = ahead.copy(state.whole), jnp.copy(state.step)
        rest = ahead.begin(params, self._prompts, self._key_of(iteration), step)

        def finish() -> Collected:
            rollout, scores, metrics = rest()
            check_scores(scores, rollout, iteration)
            mean, deviation = (float(x) for x in jax.device_get(ahead.ratios(params, rollout)))
            check_agreement(mean, iteration)
            return rollout, scores, {**metrics, "ppo/first_ratio_deviation": deviation}

        return finish


def check_scores(scores: Scores, rollout: Rollout, iteration: int) -> None:
    """A score that is not a finite number never reaches the loss."""
    for name in ("score", "token_rewards", "cost", "baseline"):
        if getattr(scores, name) is None:
            continue
        values = np.asarray(fetch(getattr(scores, name)))
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            index, words = int(fetch(rollout.index)[wrong[0][0]]), _WORDS[name]
            raise UserError(
                f"{len(wrong)} of {values.size} {words} are not finite, the first is {values[tuple(wrong[0])]} for "
                f"prompt {index}", at=f"iteration {iteration}", expected="finite numbers",
                fix="look at the reward of that prompt's response", exit_code=DIVERGED,
            )  # fmt: skip


_WORDS = {"score": "scores", "token_rewards": "rewards of tokens", "cost": "costs", "baseline": "greedy scores"}


def check_agreement(ratio: float, iteration: int) -> None:
    """The policy that sampled a rollout gives its tokens the same probabilities when it scores them."""
    if math.isfinite(ratio) and abs(ratio - 1) > AGREEMENT:
        raise UserError(
            f"the first minibatch has a mean probability ratio of {ratio:.4f} although nothing was learned from its "
            "rollout yet", at=f"iteration {iteration}", expected=f"1 within {AGREEMENT}",
            fix="sampler and scorer disagree: compute in float32, or report it", exit_code=DIVERGED,
        )  # fmt: skip
