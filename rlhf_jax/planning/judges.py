"""The passes of models that rewards read: of scalar models over rollouts, of language models over a rubric's questions.

Rewards in plain Python take nothing on the devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rlhf_jax.models import ScalarModel, Transformer
from rlhf_jax.planning import work
from rlhf_jax.planning.pieces import Program, ints, params_of, placed
from rlhf_jax.rewards.base import Leaf, Reward, leaves, models_of
from rlhf_jax.rewards.learned import Learned, Process, Rubric
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.responses import score_continuations, score_rollout, score_tokens
from rlhf_jax.types import PyTree, Rollout


def judging_models(rewards: Sequence[Reward], model: Transformer, placement: Placement) -> dict[str, PyTree]:
    """What lies on the devices for these rewards, as "reward"; all models are taken to have the policy's trunk."""
    kinds = list(dict(pair for reward in rewards for pair in models_of(reward)).values())
    if not kinds:
        return {}
    held = [params_of(_scorer(model) if kind == "scalar" else model, placement) for kind in kinds]
    return {"reward": held[0] if len(held) == 1 else held}


def judging_programs(
    rewards: Sequence[Reward],
    model: Transformer,
    placement: Placement,
    rollout: Rollout,
    rows: int | None,
    parked: tuple[str, ...] = (),
    times: int = 1,
) -> list[Program]:
    """One program for each kind of pass, with the number of its runs.

    Args:
        rewards: each of which judges the rollout.
        model: the policy.
        placement: of the rollout.
        rollout: abstract.
        rows: of it in one pass; None takes all.
        parked: what waits in the host's memory meanwhile.
        times: rollouts of this size.
    """
    asked = [leaf for reward in rewards for leaf in leaves(reward)]
    total, width = rollout.tokens.shape
    some = total if rows is None else min(rows, total)
    scorer = _scorer(model)
    judge, read = params_of(scorer, placement), work.reading(model, total, width)
    programs = []
    for name, function, count in (("score", score_rollout, _count(asked, str | Learned)),
                                  ("process", score_tokens, _count(asked, Process))):  # fmt: skip
        if count:
            programs.append(Program(
                name, functools.partial(function, scorer, rows=rows), (judge, rollout), placement, read, (some, width),
                runs=count * times, transient={"rollout": rollout}, parked=parked,
            ))  # fmt: skip
    rubrics = [leaf for leaf in asked if isinstance(leaf, Rubric)]
    for length in dict.fromkeys(leaf.length for leaf in rubrics):
        questions = placed((ints(some, length), ints(some), ints(some)), placement)
        answers = sum(len(leaf.answers) for leaf in rubrics if leaf.length == length)
        programs.append(Program(
            "rubric", functools.partial(score_continuations, model), (params_of(model, placement), *questions),
            placement, work.reading(model, some, length, unembedded=some * length), (some, length),
            runs=answers * -(-total // some) * times, transient={"rollout": rollout, "questions": questions},
            parked=parked,
        ))  # fmt: skip
    return programs


def _scorer(model: Transformer) -> ScalarModel:
    return ScalarModel(model.clone(parent=None), head_init="reward")


def _count(asked: Sequence[Leaf], kind: Any) -> int:
    return sum(isinstance(leaf, kind) for leaf in asked)
