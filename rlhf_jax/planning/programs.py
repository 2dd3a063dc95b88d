"""The compiled programs of a stage and the shapes that go into them, from its settings alone: nothing is allocated.

They are built from the same public parts as in ``stages``, with the same shardings; ``tests/test_planning_programs.py``
compares their text with that of the programs which a stage runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.experiment import AnyStage
from rlhf_jax.models import ScalarModel, Transformer
from rlhf_jax.objectives.language import LanguageModel
from rlhf_jax.objectives.reward import RewardModel
from rlhf_jax.objectives.unpaired import Unpaired
from rlhf_jax.planning import work
from rlhf_jax.planning.online import reinforcement
from rlhf_jax.planning.pieces import (
    STEPS,
    Program,
    Stage,
    labels,
    params_of,
    placed,
    preferences,
    random_key,
    rankings,
    resident,
    rewarded,
    safety,
    texts,
    train_state,
)
from rlhf_jax.planning.sampled import distillation, expert_iteration, labelling
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.best_of_n import ExpertIteration
from rlhf_jax.stages.cost import TrainCost
from rlhf_jax.stages.distill import Distill
from rlhf_jax.stages.ilql import ILQL, Steer
from rlhf_jax.stages.label import Label
from rlhf_jax.stages.preference import PreferenceTune
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.training.step import make_train_step


def stage_programs(
    stage: AnyStage, model: Transformer, placement: Placement, devices: Sequence[Any] | None, responses: int = 2
) -> Stage:
    """The programs of one stage on these devices; call it with no mesh active, as the devices need not be there.

    Args:
        stage: of the experiment.
        model: the language model. Reward models are taken to have its architecture, also those from other runs.
        placement: of the experiment's layout.
        devices: for a sampling layout of its own.
        responses: K of rankings.
    """
    if isinstance(stage, Reinforce):
        return reinforcement(stage, model, placement, devices)
    if isinstance(stage, ExpertIteration):
        return expert_iteration(stage, model, placement)
    if isinstance(stage, Distill):
        return distillation(stage, model, placement)
    if isinstance(stage, Label):
        return labelling(stage, model, placement)
    if isinstance(stage, Steer):
        raise UserError(f"stage {stage.name!r} is not planned", at=f"stages.{stage.name}",
                        expected="a stage that computes something on devices", fix="name another")  # fmt: skip
    train, trained, sequences, more, unembedded = stage.train, model, 1, work.Work(0, 0), True
    if isinstance(stage, ILQL):
        trained, train, objective, made = stage.model(model), stage.training, stage.objective(model), rewarded
        # All heads of values, and their slow copies, are perceptrons over the vocabulary of twice the trunk's width.
        heads = 2.0 * (2 * stage.heads + 1) * 2 * model.d_model * (model.d_model + model.vocab_size)
        more = work.Work(heads * train.batch * train.length, 0)
    elif isinstance(stage, TrainReward):
        trained, sequences, unembedded = ScalarModel(model.clone(parent=None), head_init="reward"), responses, False
        objective = RewardModel(trained, normalise=stage.normalise, centre_coef=stage.centre_coef, name=stage.name)
        made = functools.partial(rankings, responses)
    elif isinstance(stage, TrainCost):
        trained, sequences, unembedded = ScalarModel(model.clone(parent=None), head_init="reward"), responses, False
        objective, made = stage.objective(trained), functools.partial(safety, responses)
    elif isinstance(stage, PreferenceTune):
        objective, sequences = stage.objective(model), stage.sequences(responses)
        made = functools.partial(labels if isinstance(objective, Unpaired) else preferences, sequences)
    else:
        objective, made = LanguageModel(model, name=stage.name, mean=getattr(stage, "mean", "token")), texts
    rows, read = functools.partial(made, train.length), train.batch * sequences
    tokens = read * train.length
    forward = work.reading(model, read, train.length, unembedded=tokens if unembedded else 0) + more
    params = params_of(trained, placement)
    optimizer, ema = train.optimizer.build(STEPS if train.steps is None else train.steps), train.ema_decay is not None
    shardings = placement.state(optimizer, params, placement.params(trained), ema)
    state = train_state(params, optimizer, ema, shardings)
    step = make_train_step(
        objective.loss, optimizer, with_weights=objective.with_weights, conclude=objective.conclude,
        microbatches=train.microbatches, ema_decay=train.ema_decay, state_shardings=shardings,
    )  # fmt: skip
    batch = placed(rows(train.batch), placement)
    update = Program(
        "update", step, (state, batch, random_key()), placement, forward.trained(),
        (read // train.microbatches, train.length), transient={"batch": batch},
        loss=(objective.loss, params, lambda n: jax.eval_shape(objective.with_weights, rows(n)),
              train.batch // train.microbatches),
    )  # fmt: skip
    # What training began with is held beside the state; a reward model also as it was drawn, for the sake of its head.
    start = (params, jax.tree.map(copy.copy, params)) if isinstance(stage, TrainReward | TrainCost) else params
    return Stage(stage.name, (update,), resident(state) | {"start": start}, tokens, "tokens")
