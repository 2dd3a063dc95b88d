"""What a policy learns by in a stage of reinforcement learning: its objective, and the compiled programs made of it.

Planning builds the same programs from shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import ScalarModel, Transformer, abstract_params, init_params, split_lower
from rlhf_jax.objectives.critic_free import GroupOptimization, PolicyAlone
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.lagrangian import LagrangianOptimization, TwoCritics
from rlhf_jax.objectives.language import LanguageModel
from rlhf_jax.objectives.policy import PolicyOptimization, SeparateCritic, SharedCritic
from rlhf_jax.objectives.ptx import PtxMix
from rlhf_jax.objectives.shared_prompts import SharedPrompts
from rlhf_jax.objectives.trimmed import Trimmed
from rlhf_jax.ops.lagrange import Lagrangian
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.reinforcement import take_rows
from rlhf_jax.training.step import TrainStep, make_train_step
from rlhf_jax.types import PyTree, Rollout, Scores

if TYPE_CHECKING:
    from rlhf_jax.stages.reinforce import Reinforce

Objective = PolicyOptimization | GroupOptimization | LagrangianOptimization


def objective_of(
    stage: Reinforce, policy: Transformer, critic: ScalarModel | None, cost_critic: ScalarModel | None = None
) -> Objective:
    """The objective that a stage names; critics are the models they start from, None for methods without one."""
    rows, replay = stage.rows_at_a_time, stage.replay_routing
    if isinstance(stage.ppo, GroupPolicy):
        return GroupOptimization(
            stage.ppo, PolicyAlone(policy), stage.sampling, rows=rows, replay=replay, lengths=stage.update_lengths,
            share_prompts=stage.share_prompts,
        )  # fmt: skip
    assert critic is not None
    if stage.cost is not None and isinstance(stage.cost.by, Lagrangian):
        both = TwoCritics(policy, critic, critic if cost_critic is None else cost_critic)
        return LagrangianOptimization(stage.ppo, both, stage.sampling, stage.cost.by, rows=rows, replay=replay)
    models = SharedCritic(critic) if stage.critic == "shared" else SeparateCritic(policy, critic)
    return PolicyOptimization(stage.ppo, models, stage.sampling, rows=rows, replay=replay)


def trained_model(stage: Reinforce, model: Transformer) -> Transformer:
    """The policy's model, with frozen rounds apart."""
    return model.clone(parent=None, split=stage.frozen_rounds)


def begin(
    stage: Reinforce, workspace: Workspace, policy: Output, scorer: Output | None, judges: Mapping[str, Output]
) -> tuple[Objective, PyTree]:
    """The objective, and the parameters that it starts from; ``judges`` are what rewards and costs read."""
    whole, model = workspace.model.clone(parent=None), trained_model(stage, workspace.model)
    start = policy.params
    if stage.frozen_rounds:
        below, rest = split_lower(policy.params, stage.frozen_rounds)
        start = below | rest
    if stage.critic is None:
        return objective_of(stage, model, None), start
    if stage.critic == "reward":
        assert scorer is not None and isinstance(scorer.model, ScalarModel)
        critic, critic_params = scorer.model, scorer.params
    else:
        shared = stage.critic == "shared"
        critic = ScalarModel(model if shared else whole, head_init="zero")
        fresh = init_params(critic, workspace.key(stage.name, "critic"), workspace.placement.params(critic))
        critic_params = {**fresh, "trunk": start if shared else policy.params}
    if stage.cost is not None and stage.critic == "reward" and isinstance(stage.cost.of, str):
        of_cost = judges[stage.cost.of]
        assert isinstance(of_cost.model, ScalarModel)
        cost_critic, cost_params = of_cost.model, of_cost.params
    else:
        cost_critic, cost_params = critic, critic_params
    objective = objective_of(stage, model, critic, cost_critic)
    if isinstance(objective, LagrangianOptimization):
        return objective, objective.models.join(start, critic_params, cost_params)
    assert isinstance(objective, PolicyOptimization)
    return objective, objective.models.join(start, critic_params)


def abstract_start(stage: Reinforce, model: Transformer) -> tuple[Objective, PyTree]:
    """The same from shapes alone; a reward model is taken to have the policy's architecture."""
    policy = trained_model(stage, model)
    head = "reward" if stage.critic == "reward" else "zero"
    critic = ScalarModel(policy if stage.critic == "shared" else model.clone(parent=None), head_init=head)
    objective, params = objective_of(stage, policy, critic), abstract_params(policy)
    if isinstance(objective, LagrangianOptimization):
        params = objective.models.join(params, abstract_params(critic), abstract_params(critic))
    if isinstance(objective, PolicyOptimization):
        params = objective.models.join(params, abstract_params(critic))
    return objective, params


def preparation(objective: Objective) -> Callable[..., Any]:
    """Compiled: from a rollout and its scores to experience and the metrics of the rollout."""

    @jax.jit
    def compiled(params: PyTree, ref_params: PyTree, rollout: Rollout, scores: Scores, controller: PyTree):
        experience: Any = objective.prepare(params, ref_params, rollout, scores, controller)
        return experience, objective.rollout_metrics(experience)

    return compiled


def mix(stage: Reinforce, objective: Objective) -> Objective | Trimmed | SharedPrompts | PtxMix:
    """What an update minimises: the objective, on rows cut short or with shared prompts where the stage says so, with
    its pretraining text."""
    if stage.share_prompts:
        assert isinstance(objective, GroupOptimization)
        return SharedPrompts(objective, stage.sampling.samples_per_prompt, stage.update_lengths, stage.microbatches)
    language = LanguageModel(objective.models.policy, name="ptx")
    whole = Trimmed(objective, stage.update_lengths, stage.microbatches) if stage.update_lengths else objective
    return whole if stage.ptx is None else PtxMix(whole, language, stage.ptx.coef, stage.ptx.texts_per_episode)


def batches(stage: Reinforce, objective: Objective, placement: Placement) -> Callable[..., Any]:
    """Minibatches: chosen rows of the experience, joined by text where the stage has some."""
    whole = mix(stage, objective)

    def batch(experience: PyTree, rows: np.ndarray, streams: Mapping[str, Any]) -> Any:
        chosen = placement.put_batch(take_rows(experience, rows))
        if not isinstance(whole, PtxMix):
            return chosen
        return whole.join(chosen, jax.tree.map(jnp.asarray, placement.put_batch(next(streams["text"]))))

    return batch


def update_step(stage: Reinforce, objective: Objective, optimizer: Any, shardings: PyTree) -> TrainStep:
    """Compiled: one optimizer step on a minibatch."""
    whole = mix(stage, objective)
    return make_train_step(
        whole.loss, optimizer, with_weights=whole.with_weights, conclude=whole.conclude,
        microbatches=1 if stage.share_prompts else stage.microbatches, ema_decay=stage.ema_decay,
        state_shardings=shardings,
    )  # fmt: skip
