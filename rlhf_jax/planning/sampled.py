"""The programs of stages that sample without a policy gradient: expert iteration, distillation, labelling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import Transformer
from rlhf_jax.objectives.distillation import Distillation
from rlhf_jax.objectives.imitation import Chosen, Imitation
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
    train_state,
)
from rlhf_jax.planning.sampler import sampling_program
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.best_of_n import ExpertIteration
from rlhf_jax.stages.distill import Distill
from rlhf_jax.stages.label import Label
from rlhf_jax.stages.labellers import Programmatic
from rlhf_jax.training.reinforcement import take_rows
from rlhf_jax.training.step import make_train_step
from rlhf_jax.types import PyTree


def expert_iteration(stage: ExpertIteration, model: Transformer, placement: Placement) -> Stage:
    """One round: sample batch by batch, judge all, imitate what was kept."""
    sampling, new = stage.sampling, stage.sampling.max_new_tokens
    sampler = sampling_program(
        model, sampling, prompts=stage.prompts_at_once, width=stage.prompt_length, placement=placement.folded(),
        runs=stage.prompts_per_round // stage.prompts_at_once,
    )  # fmt: skip
    drawn = jax.eval_shape(sampler.function, *sampler.arguments)
    responses, width = stage.prompts_per_round * sampling.samples_per_prompt, stage.prompt_length + new
    rollout = placed(_rows(drawn, responses), placement)
    rewards = [stage.reward] if stage.gold is None else [stage.reward, stage.gold]
    params, objective = params_of(model, placement), Imitation(model, stage.name, stage.mean)
    optimizer = stage.optimizer.build(stage.scheduled)
    shardings = placement.state(optimizer, params, placement.params(model), ema=False)
    state = train_state(params, optimizer, False, shardings)
    step = make_train_step(
        objective.loss, optimizer, with_weights=objective.with_weights, conclude=objective.conclude,
        microbatches=stage.microbatches, state_shardings=shardings,
    )  # fmt: skip

    def minibatch(rows: int) -> Chosen:
        used: Any = jax.ShapeDtypeStruct((rows,), jnp.float32)
        return Chosen(_rows(drawn, rows), used)

    batch, micro = placed(minibatch(stage.minibatch), placement), stage.minibatch // stage.microbatches
    forward = work.reading(model, stage.minibatch, width, unembedded=stage.minibatch * new)
    update = Program(
        "update", step, (state, batch, random_key()), placement, forward.trained(), (micro, width),
        runs=stage.updates_per_round, transient={"batch": batch},
        loss=(objective.loss, params, lambda n: jax.eval_shape(objective.with_weights, minibatch(n)), micro),
    )  # fmt: skip
    judges = judging_programs(rewards, model, placement, rollout, stage.rows_at_a_time)
    held = resident(state) | ({"start": params_of(model, placement)} if stage.restart else {})
    return Stage(stage.name, (sampler, *judges, update), held | judging_models(rewards, model, placement),
                 responses * new, "response tokens")  # fmt: skip


def distillation(stage: Distill, model: Transformer, placement: Placement) -> Stage:
    """One iteration on the student's own responses; the teacher is taken to have the student's architecture."""
    sampling, new = stage.sampling, stage.sampling.max_new_tokens
    sampler = sampling_program(
        model, sampling, prompts=stage.prompts_per_iteration, width=stage.prompt_length, placement=placement.folded()
    )
    rollout = placed(jax.eval_shape(sampler.function, *sampler.arguments), placement)
    width, total = stage.prompt_length + new, stage.rollout
    rewards = [] if stage.gold is None else [stage.gold]
    objective = Distillation(model, model, stage.divergence, stage.mean, stage.rows_at_a_time, name=stage.name)
    params, teacher, placements = (params_of(model, placement), params_of(model, placement), placement.params(model))
    frozen, optimizer = objective.frozen(teacher), stage.optimizer.build(stage.updates)
    shardings = placement.state(
        optimizer, params, placements, ema=False, frozen=None if placements is None else objective.frozen(placements)
    )
    state = train_state(params, optimizer, False, shardings, frozen)
    prepare = jax.jit(objective.prepare)
    experience = placed(jax.eval_shape(prepare, teacher, rollout), placement)
    rows = total if stage.rows_at_a_time is None else stage.rows_at_a_time
    reading = Program("prepare", prepare, (teacher, rollout), placement, work.reading(model, total, width),
                      (rows, width), transient={"rollout": rollout})  # fmt: skip
    step = make_train_step(
        objective.loss, optimizer, with_weights=objective.with_weights, conclude=objective.conclude,
        microbatches=stage.microbatches, state_shardings=shardings,
    )  # fmt: skip
    batch, micro = placed(_rows(experience, stage.minibatch), placement), stage.minibatch // stage.microbatches
    forward = work.reading(model, stage.minibatch, width, unembedded=stage.minibatch * new)
    unembedded = work.Work(2.0 * stage.minibatch * new * model.vocab_size * model.d_model, 0)  # the teacher's
    update = Program(
        "update", step, (state, batch, random_key()), placement, forward.trained() + unembedded, (micro, width),
        runs=stage.epochs * (total // stage.minibatch), transient={"batch": batch, "experience": experience},
        loss=(of_trained(objective.loss, frozen), params,
              lambda n: jax.eval_shape(objective.with_weights, _rows(experience, n)), micro),
    )  # fmt: skip
    judges = judging_programs(rewards, model, placement, rollout, stage.rows_at_a_time)
    held = resident(state) | {"teacher": teacher} | judging_models(rewards, model, placement)
    return Stage(stage.name, (sampler, *judges, reading, update), held, total * new, "response tokens")


def labelling(stage: Label, model: Transformer, placement: Placement) -> Stage:
    """One batch of prompts: sampled, and judged where a reward ranks."""
    sampler = sampling_program(
        model, stage.sampling, prompts=stage.batch, width=stage.prompt_length, placement=placement.folded()
    )
    rollout = placed(jax.eval_shape(sampler.function, *sampler.arguments), placement)
    rewards = [stage.labeller.reward] if isinstance(stage.labeller, Programmatic) else []
    held = {"parameters": params_of(model, placement)} | judging_models(rewards, model, placement)
    tokens = rollout.response_mask.shape[0] * stage.sampling.max_new_tokens
    judges = judging_programs(rewards, model, placement, rollout, None)
    return Stage(stage.name, (sampler, *judges), held, tokens, "response tokens")


def _rows(tree: PyTree, rows: int) -> Any:
    """So many rows of every array, abstract."""
    return jax.eval_shape(take_rows, tree, ints(rows))
