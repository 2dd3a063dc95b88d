"""How an iteration comes to its rollout: one batch of prompts, or more until groups have something to teach.

A ``Respond`` answers one batch of prompts and has the answers scored; a collector draws batches from the stream of
prompts and makes of them the rollout of an iteration. Both work in two halves: what is called dispatches to the device
and returns at once, and the function that comes back judges, and waits. So the device draws while the host judges:
later parts of the same rollout, or updates where a rollout is drawn ahead of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.sharding import Placement, fetch
from rlhf_jax.stages.rollouts import Draw, JudgeOfParts
from rlhf_jax.training.ahead import Begin, Collected
from rlhf_jax.training.loop import Batches
from rlhf_jax.types import Key, PromptBatch, PyTree, Rollout, Scores

Respond = Callable[[PyTree, PromptBatch, Key, jax.Array], Callable[[], Collected]]


def responding(draw: Draw, judge: JudgeOfParts, parts: int = 1) -> Respond:
    """Sampled, then scored.

    Responses to a prompt stay together. Their random keys derive from the prompt's index, so what is drawn does not
    depend on ``parts`` beyond the rounding of programs for fewer rows.

    Args:
        draw: samples.
        judge: scores; asked about each part while the device draws the later ones.
        parts: that the prompts are cut into, equal ones; in the order of their rows.
    """

    def respond(params: PyTree, prompts: PromptBatch, key: Key, step: jax.Array) -> Callable[[], Collected]:
        drawn, rest = [], []
        for part in _cut(prompts, parts):
            drawn.append(draw(params, part, key, step))
            rest.append(judge.begin(drawn[-1]))  # before the next part is dispatched, which it would wait for
        rollout: Rollout = drawn[0] if parts == 1 else _under_each_other(drawn)
        return lambda: (rollout, *judge.conclude(rollout, [hear() for hear in rest]))

    return respond


def later(respond: Callable[[PyTree, PromptBatch, Key, jax.Array], Collected]) -> Respond:
    """One that begins with nothing, since it asks the host all along."""
    return lambda *asked: functools.partial(respond, *asked)


def against_greedy(respond: Respond, greedy: Respond, samples_per_prompt: int) -> Respond:
    """The same with the score of the policy's greedy response as a baseline (ReMax, Li et al. 2023).

    Args:
        respond: answers that are learned from.
        greedy: gives one greedy response to each prompt.
        samples_per_prompt: of ``respond``.
    """

    def compared(params: PyTree, prompts: PromptBatch, key: Key, step: jax.Array) -> Callable[[], Collected]:
        likeliest, own = greedy(params, prompts, key, step), respond(params, prompts, key, step)

        def finish() -> Collected:
            _, found, _ = likeliest()
            rollout, scores, metrics = own()
            baseline = np.repeat(np.asarray(fetch(found.score)), samples_per_prompt)
            scores = dataclasses.replace(scores, baseline=baseline)
            return rollout, scores, {**metrics, "group/greedy_score": float(baseline.mean())}

        return finish

    return compared


def once(respond: Respond) -> Begin:
    """One batch of prompts an iteration."""

    def collect(params: PyTree, prompts: Batches, key: Key, step: jax.Array) -> Callable[[], Collected]:
        return respond(params, next(prompts), key, step)

    return collect


def until_signal(respond: Respond, samples_per_prompt: int, more: int, placement: Placement) -> Begin:
    """Up to ``more`` further batches, until as many groups as a batch has carry signal (DAPO's dynamic sampling).

    A group whose scores are all equal has no advantages; the groups of later batches that have some take its place,
    in the order in which they were drawn. Groups without signal remain where too few were found.

    Source: Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2.
    """

    def collect(params: PyTree, prompts: Batches, key: Key, step: jax.Array) -> Callable[[], Collected]:
        first = respond(params, next(prompts), key, step)

        def finish() -> Collected:
            found = [first()]
            groups = len(fetch(found[0][1].score)) // samples_per_prompt
            while len(found) <= more and sum(_signal(s, samples_per_prompt).sum() for _, s, _ in found) < groups:
                again = jax.random.fold_in(key, len(found))
                found.append(respond(params, next(prompts), again, step)())
            names = found[0][2].keys()
            metrics = {name: float(np.mean([metrics[name] for *_, metrics in found])) for name in names}
            metrics["group/batches"] = float(len(found))
            if len(found) == 1:
                return *found[0][:2], metrics
            signal = np.concatenate([_signal(scores, samples_per_prompt) for _, scores, _ in found])
            rows = chosen_rows(signal, groups, samples_per_prompt)
            rollout, scores = (_taken([fetch(batch[part]) for batch in found], rows) for part in (0, 1))
            return placement.put_batch(rollout), scores, metrics

        return finish

    return collect


def chosen_rows(signal: np.ndarray, groups: int, samples_per_prompt: int) -> np.ndarray:
    """The rows of so many groups: those with signal first, then others, in the order in which they were drawn."""
    order = np.argsort(~signal, kind="stable")[:groups]
    return (np.sort(order)[:, None] * samples_per_prompt + np.arange(samples_per_prompt)).ravel()


def _signal(scores: Scores, samples_per_prompt: int) -> np.ndarray:
    """Which groups have scores that are not all equal; responses that are not used have none."""
    score = np.asarray(fetch(scores.score))
    used = np.ones(len(score), bool) if scores.used is None else np.asarray(fetch(scores.used))
    least, most = (np.where(used, score, other).reshape(-1, samples_per_prompt) for other in (np.inf, -np.inf))
    return most.max(axis=1) > least.min(axis=1)


def _cut(prompts: PromptBatch, parts: int) -> list[PromptBatch]:
    """Neighbouring rows of the host, in their order."""
    if parts == 1:
        return [prompts]
    rows = len(prompts.lengths) // parts
    return [jax.tree.map(lambda x, n=n: x[n * rows : (n + 1) * rows], prompts) for n in range(parts)]


def _under_each_other(parts: list[Any]) -> Any:
    """Rows of arrays on the device, joined there; a scalar is the first one's."""
    return jax.tree.map(lambda *leaves: leaves[0] if jnp.ndim(leaves[0]) == 0 else jnp.concatenate(leaves), *parts)


def _taken(parts: list[PyTree], rows: np.ndarray) -> Any:
    """These rows of batches that follow each other; a scalar is the first one's."""

    def take(*leaves: np.ndarray) -> np.ndarray:
        return leaves[0] if np.ndim(leaves[0]) == 0 else np.concatenate(leaves)[rows]

    return jax.tree.map(take, *parts)
