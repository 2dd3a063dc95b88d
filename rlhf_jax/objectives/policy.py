"""A policy and a critic trained by PPO: where parameters meet the arithmetic of ``ppo.py``.

Dropout stays off here, as in the sampler: with it the first ratio would not be 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.models import Aux, ScalarModel, Transformer
from rlhf_jax.objectives.mixture import conclude, routing_of_models
from rlhf_jax.objectives.ppo import PPO, Experience
from rlhf_jax.objectives.scaling import Moments
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.sampling import Sampling
from rlhf_jax.scoring import (
    LOGITS_AT_A_TIME,
    recorded_routing,
    report_values,
    response_logprobs,
    response_values,
    score_responses,
)
from rlhf_jax.sharding import Placement
from rlhf_jax.types import Key, Metrics, PyTree, Rollout, Scores


@struct.dataclass
class Controller:
    """What changes once a rollout: the coefficient of the KL penalty, and moments of the scores (None without use)."""

    kl_coef: Float[Array, ""]
    moments: Moments | None = None


Reports = dict[str, Aux]
"""What the layers of each model report, by the prefix of the metrics that are made of it."""
Evaluation = tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"], Reports]
"""Log-probabilities, entropies and values of a rollout's responses."""


@dataclass(frozen=True)
class SeparateCritic:
    """Two models that share nothing: ``params = {"policy": ..., "critic": ...}``.

    Their gradients never meet, so one optimizer can hold a learning rate for each (``optax.multi_transform`` with the
    two names as labels).
    """

    policy: Transformer
    critic: ScalarModel

    def join(self, policy_params: PyTree, critic_params: PyTree) -> PyTree:
        """The parameters to train, from those of the two models."""
        return {"policy": policy_params, "critic": critic_params}

    def placed(self, placement: Placement) -> PyTree:
        """Shardings of the parameters to train; None on one device."""
        found = placement.params(self.policy), placement.params(self.critic)
        return None if placement.mesh is None else self.join(*found)

    def policy_params(self, params: PyTree) -> PyTree:
        """Parameters of the language model, as the sampler takes them."""
        return params["policy"]

    def values(self, params: PyTree, rollout: Rollout, value_mask: Bool[Array, "B N"]) -> Float[Array, "B N"]:
        """The critic's value of each state in ``value_mask``."""
        return response_values(self.critic, params["critic"], replace(rollout, response_mask=value_mask))

    def evaluate(
        self,
        params: PyTree,
        rollout: Rollout,
        value_mask: Bool[Array, "B N"],
        sampling: Sampling,
        chunk: int | None,
        replay: bool,
    ) -> Evaluation:
        """What the losses need, from one forward pass of each model."""
        scored = score_responses(self.policy, params["policy"], rollout, sampling, chunk=chunk, replay=replay)
        assert scored.entropy is not None
        values, aux = report_values(self.critic, params["critic"], replace(rollout, response_mask=value_mask))
        return scored.logprobs, scored.entropy, values, {"": scored.aux, "critic/": aux}

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update, see ``mixture.conclude``."""
        _, metrics = conclude(self.policy, params["policy"], metrics, frozen=True)
        _, metrics = conclude(self.critic.trunk, params["critic"]["trunk"], metrics, prefix="critic/", frozen=True)
        return params, metrics


@dataclass(frozen=True)
class SharedCritic:
    """One trunk with two heads: the parameters are those of a ``ScalarModel`` whose trunk is the policy."""

    critic: ScalarModel

    @property
    def policy(self) -> Transformer:
        """The language model."""
        return self.critic.trunk

    def join(self, policy_params: PyTree, critic_params: PyTree) -> PyTree:
        """The parameters to train: the policy's, with the critic's head (its trunk is not used)."""
        return {**critic_params, "trunk": policy_params}

    def placed(self, placement: Placement) -> PyTree:
        """Shardings of the parameters to train; None on one device."""
        return placement.params(self.critic)

    def policy_params(self, params: PyTree) -> PyTree:
        """Parameters of the language model, as the sampler takes them."""
        return params["trunk"]

    def values(self, params: PyTree, rollout: Rollout, value_mask: Bool[Array, "B N"]) -> Float[Array, "B N"]:
        """The critic's value of each state in ``value_mask``."""
        return response_values(self.critic, params, replace(rollout, response_mask=value_mask))

    def evaluate(
        self,
        params: PyTree,
        rollout: Rollout,
        value_mask: Bool[Array, "B N"],
        sampling: Sampling,
        chunk: int | None,
        replay: bool,
    ) -> Evaluation:
        """What the losses need, from one forward pass of the trunk."""
        apply = cast(Callable[..., Any], functools.partial(self.policy.apply, {"params": params["trunk"]}))
        routing = recorded_routing(rollout) if replay else None
        hidden, _, aux = apply(rollout.tokens, rollout.context, method="hidden", routing=routing)
        slots = rollout.prompt_lengths[:, None] + jnp.arange(rollout.response_mask.shape[1])
        slots = jnp.minimum(slots, rollout.tokens.shape[1] - 1)
        before = jnp.take_along_axis(hidden, slots[:, :, None] - 1, axis=1)
        logprobs, entropy = token_logprobs(
            before,
            functools.partial(apply, method="unembed"),
            jnp.take_along_axis(rollout.tokens, slots, axis=1),
            chunk=max(1, LOGITS_AT_A_TIME // self.policy.vocab_size) if chunk is None else chunk,
            transform=sampling.filter,
        )
        assert entropy is not None
        values = nn.Dense(1).apply({"params": params["head"]}, before.astype(jnp.float32))
        assert isinstance(values, jax.Array)
        mask = rollout.response_mask
        values = jnp.where(value_mask, values[..., 0], 0)
        return jnp.where(mask, logprobs, 0), jnp.where(mask, entropy, 0), values, {"": aux}

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update, see ``mixture.conclude``."""
        return params, conclude(self.policy, params["trunk"], metrics, frozen=True)[1]


@dataclass(frozen=True)
class PolicyOptimization:
    """PPO of a policy and its critic, as ``prepare``, ``with_weights`` and ``loss``.

    Args:
        ppo: the choices.
        models: how policy and critic hold their parameters.
        sampling: how rollouts are drawn; log-probabilities are those of that distribution.
        rows: rollout rows that ``prepare`` puts through the models at a time; None takes all.
        chunk: positions to unembed at a time; None leaves it to ``scoring``.
        replay: train with the experts that the rollout's tokens were sent to, instead of choosing them again; needs
            ``Sampling(record_routing=True)`` (arXiv 2507.18071 calls it routing replay).
    """

    ppo: PPO
    models: SeparateCritic | SharedCritic
    sampling: Sampling
    rows: int | None = None
    chunk: int | None = None
    replay: bool = False

    def start(self) -> Controller:
        """The controller before the first rollout."""
        scale = self.ppo.score_scale
        return Controller(self.ppo.kl.init(), None if scale is None else scale.init())

    def control(self, controller: Controller, metrics: Metrics, episodes: int, scores: Scores) -> Controller:
        """The controller after a rollout of so many episodes with these metrics and scores."""
        coef = self.ppo.kl.update(controller.kl_coef, metrics["kl/sequence"], episodes)
        return Controller(coef, self._moments(controller, scores))

    def prepare(
        self,
        params: PyTree,
        ref_params: PyTree,
        rollout: Rollout,
        scores: Scores,
        controller: Controller,
    ) -> Experience:
        """Experience from a whole rollout and its scores. No gradient.

        Args:
            params: as ``models.join`` makes them, the same that the rollout was sampled with.
            ref_params: of the reference policy, a language model like the policy.
            rollout: sampled responses.
            scores: what the rewards say of the responses.
            controller: as it was before this rollout; moments of scores are updated first, as ``control`` will do.
        """

        def forward(rollout: Rollout) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
            value_mask = self.ppo.value_mask(rollout.response_mask)
            ref_logprobs, _ = response_logprobs(
                self.models.policy, ref_params, rollout, self.sampling, entropy=False, chunk=self.chunk
            )
            return ref_logprobs, self.models.values(params, rollout, value_mask)

        ref_logprobs, values = by_rows(forward, rollout, self.rows)
        scale, moments = self.ppo.score_scale, self._moments(controller, scores)
        return self.ppo.prepare(
            rollout, scores.score, ref_logprobs, values, controller.kl_coef,
            token_rewards=scores.token_rewards, used=scores.used,
            scaled=None if scale is None or moments is None else scale.scaled(moments, scores.score),
        )  # fmt: skip

    def _moments(self, controller: Controller, scores: Scores) -> Moments | None:
        """Those of all scores so far, these among them; responses that are not used do not count."""
        scale = self.ppo.score_scale
        if scale is None or controller.moments is None:
            return None
        return scale.update(controller.moments, jnp.asarray(scores.score), scores.used)

    def rollout_metrics(self, experience: Experience) -> Metrics:
        """What a rollout was like, before any update."""
        return self.ppo.rollout_metrics(experience)

    def with_weights(self, experience: Experience) -> Experience:
        """The minibatch with its weights. Before any split of it."""
        return self.ppo.with_weights(experience)

    def loss(self, params: PyTree, experience: Experience, key: Key | None = None) -> tuple[Float[Array, ""], Metrics]:
        """Policy loss plus ``value_coef`` times value loss, and the metrics of both. ``key`` is not used."""
        del key
        logprobs, entropy, values, reports = self.models.evaluate(
            params, experience.rollout, experience.value_mask, self.sampling, self.chunk, self.replay
        )
        policy_loss, policy_metrics = self.ppo.policy_loss(logprobs, entropy, experience)
        value_loss, value_metrics = self.ppo.value_loss(values, experience)
        loss, metrics = policy_loss + self.ppo.value_coef * value_loss, {**policy_metrics, **value_metrics}
        rows, real = experience.token_weights.sum(axis=1), experience.rollout.context.segments > 0
        routed, found = routing_of_models(reports, rows, real)
        return loss + routed, metrics | found

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update: the load of experts as numbers. Their biases stay, as the policy is what sampled."""
        return self.models.conclude(params, metrics)


def by_rows(function: Callable[[Any], PyTree], rollout: Any, rows: int | None) -> PyTree:
    """``function(rollout)``, a few rows at a time; every ``total / rows``-th row together, so that shards stay put.

    ``rollout`` may be any arrays whose rows belong together; scalars are given to every part.
    """
    total = next(leaf.shape[0] for leaf in jax.tree.leaves(rollout) if leaf.ndim)
    if rows is None or rows >= total:
        return function(rollout)
    if total % rows:
        raise ValueError(f"{total} rows of a rollout do not split into parts of {rows}; expected a divisor of {total}")
    parts = total // rows

    def split(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        return jnp.swapaxes(x.reshape(rows, parts, *x.shape[1:]), 0, 1)

    def merge(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(total, *x.shape[2:])

    return jax.tree.map(merge, jax.lax.map(function, jax.tree.map(split, rollout)))
