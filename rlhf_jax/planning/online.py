"""The programs of reinforcement learning: sample, score, prepare, update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import Transformer
from rlhf_jax.objectives.critic_free import PolicyAlone
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.lagrangian import TwoCritics
from rlhf_jax.objectives.policy import SharedCritic
from rlhf_jax.objectives.ptx import PtxMix
from rlhf_jax.planning import work
from rlhf_jax.planning.judges import judging_models, judging_programs
from rlhf_jax.planning.pieces import (
    Program,
    Stage,
    ints,
    of_trained,
    params_of,
    placed,
    random_key,
    resident,
    texts,
    train_state,
)
from rlhf_jax.planning.sampler import sampling_program
from rlhf_jax.rewards.base import has_steps
from rlhf_jax.sharding import Placement, with_shardings
from rlhf_jax.stages.freezing import above, parted
from rlhf_jax.stages.learners import abstract_start, mix, preparation, update_step
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.training.reinforcement import take_rows
from rlhf_jax.types import PyTree, Rollout, Scores


def reinforcement(stage: Reinforce, model: Transformer, placement: Placement, devices: Sequence[Any] | None) -> Stage:
    """The programs of one iteration; see ``planning.programs.stage_programs`` for the arguments.

    Conversations of several turns are planned as one response of their whole length. With ``ahead``, sampling and
    updates are planned one by one, beside a copy of the policy; what one of them needs may be there during the other.
    """
    if stage.turns is not None:
        sampling = replace(stage.sampling, max_new_tokens=stage.turns.length)
        stage = replace(stage, sampling=sampling, turns=None)
    objective, shapes = abstract_start(stage, model)
    models, policy = objective.models, objective.models.policy
    params = with_shardings(shapes, models.placed(placement))
    compared = not isinstance(stage.ppo, GroupPolicy) or stage.ppo.uses_reference
    reference = params_of(policy, placement) if compared else None
    optimizer, ema = stage.transformation, stage.ema_decay is not None
    placements, below = parted(models, models.placed(placement), stage.frozen_rounds)
    moved, fixed = parted(models, params, stage.frozen_rounds)
    shardings = placement.state(optimizer, moved, placements, ema, below)
    state = train_state(moved, optimizer, ema, shardings, fixed)
    frozen: dict[str, PyTree] = (
        {"reference": above(reference) if stage.frozen_rounds else reference} if compared else {}
    )
    rewards = [stage.reward] if stage.gold is None else [stage.reward, stage.gold]
    rewards += [] if stage.cost is None else stage.cost.sources
    frozen |= judging_models(rewards, model, placement)
    if stage.ahead:
        frozen["policy of the next rollout"] = params_of(policy, placement)
    separate = placement.folded() if stage.sampling_layout is None else stage.sampling_layout.place(devices)
    parts = stage.rollout_parts
    draw = functools.partial(
        sampling_program, policy, prompts=stage.prompts_per_iteration // parts, width=stage.prompt_length,
        placement=separate, moved=separate.mesh != placement.mesh, parked=_parked(stage), runs=parts,
    )  # fmt: skip
    programs = [draw(stage.sampling)]
    drawn = jax.eval_shape(programs[0].function, *programs[0].arguments)
    rollout = placed(jax.eval_shape(take_rows, drawn, ints(stage.rollout)), placement)
    judged = functools.partial(
        judging_programs, rewards, model, placement, rows=stage.rows_at_a_time, parked=_parked(stage, "reward"),
        times=parts,
    )  # fmt: skip
    programs += judged(placed(drawn, placement))
    if stage.ahead:
        frozen["ahead"] = (params_of(policy, placement), rollout)
    if _against_greedy(stage):
        greedy = draw(replace(stage.sampling, greedy=True, samples_per_prompt=1, record_routing=False, slots=None),
                      name="greedy")  # fmt: skip
        drawn = placed(jax.eval_shape(greedy.function, *greedy.arguments), placement)
        programs += [greedy, *(replace(each, name=f"{each.name} greedy") for each in judged(drawn))]
    width, new = stage.prompt_length + stage.sampling.max_new_tokens, stage.sampling.max_new_tokens
    read = work.reading(model, stage.rollout, width)
    answers = work.reading(model, stage.rollout, width, unembedded=stage.rollout * new)
    controller, scores = jax.eval_shape(objective.start), _scores(stage, rollout)
    prepare, rows = preparation(objective), stage.rollout if stage.rows_at_a_time is None else stage.rows_at_a_time
    arguments = (params, reference, rollout, scores, controller)
    critics = 2 if isinstance(models, TwoCritics) else 1
    prepared = answers + read.times(critics)
    if isinstance(stage.ppo, GroupPolicy):
        prepared = answers.times(stage.ppo.uses_reference + (stage.ppo.correction is not None))
    programs.append(Program("prepare", prepare, arguments, placement, prepared, (rows, width),
                            transient={"rollout": rollout}, parked=_parked(stage, "reference")))  # fmt: skip
    experience = placed(jax.eval_shape(prepare, *arguments)[0], placement)

    whole = mix(stage, objective)

    def minibatch(rows: int) -> PyTree:
        chosen = jax.eval_shape(take_rows, experience, jax.ShapeDtypeStruct((rows,), jnp.int32))
        if stage.ptx is None or not isinstance(whole, PtxMix):
            return chosen
        return jax.eval_shape(whole.join, chosen, texts(stage.ptx.length, rows * stage.ptx.texts_per_episode))

    step = update_step(stage, objective, optimizer, shardings)

    def forward(model: Transformer) -> work.Work:
        found = work.reading(model, stage.minibatch, width, unembedded=stage.minibatch * new)
        if not isinstance(models, SharedCritic | PolicyAlone):
            found += read.times(critics * stage.minibatch / stage.rollout)
        if stage.ptx is not None:
            added = stage.minibatch * stage.ptx.texts_per_episode
            found += work.reading(model, added, stage.ptx.length, unembedded=added * stage.ptx.length)
        return found

    each = objective if stage.share_prompts else whole  # rows by themselves, where those of a prompt go together
    moving = model.clone(repeats=model.repeats - stage.frozen_rounds)
    batch = placed(minibatch(stage.minibatch), placement)
    programs.append(Program(
        "update", step, (state, batch, random_key()), placement, forward(model) + forward(moving).times(2),
        (stage.minibatch // stage.microbatches, width),
        runs=stage.epochs * (stage.rollout // stage.minibatch), transient={"batch": batch, "experience": experience},
        parked=_parked(stage, "optimizer"),
        loss=(of_trained(each.loss, fixed), moved, lambda n: jax.eval_shape(each.with_weights, minibatch(n)),
              stage.minibatch // stage.microbatches),
    ))  # fmt: skip
    return Stage(stage.name, tuple(programs), resident(state) | frozen, stage.rollout * new,
                 "response tokens")  # fmt: skip


def _scores(stage: Reinforce, rollout: Rollout) -> Scores:
    """What the rewards of a stage say of its rollout, abstract."""
    rows = rollout.response_mask.shape[0]
    each, used = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.bool_)
    found: dict[str, Any] = {"score": each}
    if has_steps(stage.reward):
        shape = rollout.response_mask.shape
        found["token_rewards"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        found["steps"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    if stage.on_error == "drop":
        found["used"] = used
    if stage.cost is not None:
        found["cost"] = each
    if _against_greedy(stage):
        found["baseline"] = each
    return Scores(**found)


def _against_greedy(stage: Reinforce) -> bool:
    return isinstance(stage.ppo, GroupPolicy) and stage.ppo.baseline == "greedy"


def _parked(stage: Reinforce, *needed: str) -> tuple[str, ...]:
    """What waits in the host's memory while only these of it are needed; the average goes with the optimizer."""
    found = [kind for kind in stage.offload if kind not in needed]
    return (*found, "average") if "optimizer" in found else tuple(found)
