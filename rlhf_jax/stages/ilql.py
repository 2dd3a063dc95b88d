"""Offline reinforcement learning by ILQL: values on a language model from responses with rewards, and steering."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from rlhf_jax.data.rewarded import ResponseTable
from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer, init_params
from rlhf_jax.models.q_heads import GuidedTransformer, guided, with_heads
from rlhf_jax.objectives.ilql import ImplicitQ, OfflineValues, frozen_targets
from rlhf_jax.rewards.base import Reward, check_reward, models_of
from rlhf_jax.stages.judging import KINDS
from rlhf_jax.stages.language import check_length, check_weights
from rlhf_jax.stages.outputs import Output, check_same_architecture
from rlhf_jax.stages.recorded import judged, read_responses
from rlhf_jax.stages.settings import Source, Training
from rlhf_jax.stages.supervised import train_supervised
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.types import PyTree, RewardedBatch


@dataclass(frozen=True, kw_only=True)
class ILQL:
    """Action values and a language model from responses of any quality with their rewards.

    A response's reward is given at its last token. What the stage leaves samples from the language model steered by
    its values, ``log pi + beta (min Q - V)``; ``Steer`` gives the same with another ``beta``.

    Args:
        train: steps or epochs, batch (of responses), length (of prompt and response), optimizer. No average of weights.
        data: demonstrations of any quality; with rewards (``data.rewarded.Rewarded``) where ``reward`` is None.
        weights: shares of the sources.
        init: the language model to start from; None draws the weights.
        reward: what the responses are worth: the stage or path of a reward model, any other of ``rlhf_jax.rewards``, or
            None for the field ``reward`` of the records.
        standardise: rewards of all sources together get mean 0 and deviation 1, as in trlX.
        rule: the choices of the losses.
        heads: of action values, the smallest of which counts (trlX's ``two_qs``).
        beta: of the policy that the stage leaves.
        too_long: what becomes of a record longer than a row.
    """

    train: Training
    data: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    init: str | None = "sft"
    reward: Reward | None = None
    standardise: bool = True
    rule: ImplicitQ = ImplicitQ()
    heads: int = 2
    beta: float = 1.0
    too_long: Literal["error", "drop"] = "error"
    name: str = "ilql"

    def __post_init__(self):
        if self.reward is not None:
            check_reward(self.reward, f"stages.{self.name}.reward")
        if self.train.ema_decay is not None:
            raise UserError(f"ema_decay={self.train.ema_decay}", at=f"stages.{self.name}.train", expected="None",
                            fix="leave it out: the slow copies of the values are averages already")  # fmt: skip

    def model(self, model: Transformer) -> GuidedTransformer:
        """What is trained."""
        return guided(model, self.heads, self.beta)

    def objective(self, model: Transformer) -> OfflineValues:
        """What is minimised."""
        return OfflineValues(self.model(model), self.rule, name=self.name)

    @property
    def training(self) -> Training:
        """``train`` with an optimizer that leaves the slow copies alone."""
        return dataclasses.replace(self.train, optimizer=frozen_targets(self.train.optimizer))

    def check(self, workspace: Workspace) -> None:
        check_length(workspace, self.train.length, self.name)
        check_weights(self.weights, self.data, self.name)
        at = f"stages.{self.name}"
        if self.init is not None:
            workspace.check_reference(self.init, f"{at}.init", self.name)
        models = [] if self.reward is None else models_of(self.reward)
        for reference, kind in models:
            workspace.check_reference(reference, f"{at}.reward", self.name, KINDS[kind])
        tables = [self._table(workspace, source) for source in self.data]
        if not models:  # those of models that an earlier stage will leave cannot be known yet
            self._rewards(workspace, tables)
        self.train.check(sum(len(table.records) for table in tables), f"{at}.train", workspace.placement)

    def run(self, workspace: Workspace) -> None:
        model = self.model(workspace.model)
        found = [self._table(workspace, source) for source in self.data]
        tables, notes = self._rewarded(found, self._rewards(workspace, found))
        objective = self.objective(workspace.model)
        train_supervised(
            workspace, self.name, self.training, model, self._start(workspace, model),
            workspace.batches(self.name, "order", tables, self.train.batch, self.weights),
            self.train.total_steps(sum(len(table.tokens) for table in tables)),
            loss=objective.loss, with_weights=objective.with_weights, conclude=objective.conclude,
            finish=lambda params: (params, {"rewards": notes}),
        )  # fmt: skip

    def _start(self, workspace: Workspace, model: GuidedTransformer) -> PyTree:
        """Fresh heads on the language model to start from; its own fresh weights are let go."""
        fresh = init_params(model, workspace.key(self.name, "init"), workspace.placement.params(model))
        if self.init is None:
            return with_heads(fresh, fresh)
        start = workspace.output(self.init, f"stages.{self.name}.init")
        check_same_architecture(start.trunk, workspace.model, self.init)
        return with_heads(fresh, start.trunk_params)

    def _table(self, workspace: Workspace, source: Source) -> ResponseTable:
        return read_responses(workspace, source, self.train.length, self.too_long, self.name)

    def _rewards(self, workspace: Workspace, tables: list[ResponseTable]) -> list[Float[np.ndarray, " B"]]:
        """The reward of each response, by source."""
        at = f"stages.{self.name}.reward"
        return [judged(workspace, self.reward, table, self.train.batch, at) for table in tables]

    def _rewarded(
        self, tables: list[ResponseTable], rewards: list[Float[np.ndarray, " B"]]
    ) -> tuple[list[RewardedBatch], dict[str, float]]:
        """The batches with their rewards, and what these were like."""
        every = np.concatenate(rewards)
        mean, std = float(every.mean()), float(every.std(ddof=1)) if len(every) > 1 else 0.0
        if self.standardise:
            rewards = [(own - mean) / (std + np.finfo(np.float32).eps) for own in rewards]
        batches = [table.rewarded(own) for table, own in zip(tables, rewards, strict=True)]
        return batches, {"mean": mean, "std": std, "responses": len(every)}


@dataclass(frozen=True, kw_only=True)
class Steer:
    """The policy of an ILQL stage with another ``beta``; nothing is trained.

    Args:
        policy: the stage or path of a guided model.
        beta: how much values steer; 0 is the language model alone.
    """

    policy: str = "ilql"
    beta: float
    name: str

    def check(self, workspace: Workspace) -> None:
        workspace.check_reference(self.policy, f"stages.{self.name}.policy", self.name, GuidedTransformer)

    def run(self, workspace: Workspace) -> None:
        start = workspace.output(self.policy, f"stages.{self.name}.policy", GuidedTransformer)
        assert isinstance(start.model, GuidedTransformer)
        model = start.model.clone(beta=self.beta)
        notes = {"stage": self.name, "beta": self.beta}
        workspace.save(self.name, Output(model, start.params, workspace.tokenizer, notes))
