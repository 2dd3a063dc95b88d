"""What of reinforcement learning goes on at the same time: rollouts in parts and ahead of updates, and where not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rlhf_jax import processes
from rlhf_jax.errors import UserError
from rlhf_jax.ops.returns import masked_mean
from rlhf_jax.scoring import score_responses
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.learners import Objective
from rlhf_jax.training.ahead import Ahead, Begin
from rlhf_jax.training.reinforcement import take_rows
from rlhf_jax.types import PyTree, Rollout

if TYPE_CHECKING:
    from rlhf_jax.stages.reinforce import Reinforce


COMPARED = 8
"""Rows of a rollout that are scored again to compare sampler and scorer, which differ everywhere if anywhere."""


def check_overlap(stage: Reinforce) -> None:
    """Fields that do not go together, whatever the run."""
    parts, at, rows = stage.rollout_parts, f"stages.{stage.name}", stage.rows_at_a_time
    if parts < 1 or stage.prompts_per_iteration % parts:
        raise UserError(f"rollout_parts={parts}", at=at, fix="change one of them",
                        expected=f"a divisor of prompts_per_iteration={stage.prompts_per_iteration}")  # fmt: skip
    if stage.ahead not in (0, 1):
        raise UserError(f"ahead={stage.ahead}", at=at, expected="0 or 1 rollouts", fix="change it")
    part = stage.rollout // parts
    for name, fine, expected in (
        (f"rollout_parts={parts} with turns", parts == 1 or stage.turns is None,
         "rollout_parts=1: conversations ask the host after every turn"),
        (f"rollout_parts={parts} with offload='reward'", parts == 1 or "reward" not in stage.offload,
         "reward models that stay: they would be moved once for each part"),
        (f"rollout_parts={parts} with rows_at_a_time={rows}", parts == 1 or rows is None or part % min(rows, part) == 0,
         f"a divisor of the {part} responses of a part"),
        (f"ahead=1 with offload={stage.offload}", not (stage.ahead and stage.offload),
         "offload=(): sampling, scoring and updates are in memory together"),
    ):  # fmt: skip
        if not fine:
            raise UserError(name, at=at, expected=expected, fix="change one of them")


def check_one_device(stage: Reinforce, placement: Placement) -> None:
    """On several devices neither is possible: rows, or the order of programs, would differ from device to device."""
    at, drawing = f"stages.{stage.name}", stage.sampling_placement(placement)
    alone = placement.mesh is None and drawing.mesh is None and processes.count() == 1
    if stage.rollout_parts > 1 and not alone:
        raise UserError(f"rollout_parts={stage.rollout_parts} on several devices", at=at, fix="set rollout_parts=1",
                        expected="one device: joined parts would move rows from device to device")  # fmt: skip
    if stage.ahead and not alone:
        raise UserError(f"ahead={stage.ahead} on several devices", at=at, fix="set ahead=0",
                        expected="one process and one device: of two threads, each device might take the programs in "
                        "another order, and then they wait for each other")  # fmt: skip


def ahead_of_updates(stage: Reinforce, objective: Objective, begin: Begin) -> Ahead:
    """How the rollouts of a stage are drawn ahead; ``begin`` is given the policy's parameters alone."""
    model, rows = objective.models.policy, min(COMPARED, stage.minibatch // stage.microbatches)

    @jax.jit
    def ratios(params: PyTree, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
        some = take_rows(rollout, jnp.arange(rows))
        scored = score_responses(model, params, some, stage.sampling, entropy=False, replay=stage.replay_routing)
        mask = some.response_mask
        ratio = jnp.where(mask, jnp.exp(scored.logprobs - some.logprobs), 1)
        return masked_mean(ratio, mask), jnp.max(jnp.abs(ratio - 1))

    def copy(params: PyTree) -> PyTree:
        return jax.tree.map(jnp.copy, objective.models.policy_params(params))

    return Ahead(begin, copy, ratios)
