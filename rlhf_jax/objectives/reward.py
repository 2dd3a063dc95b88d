"""Reward models from rankings: one number per response, trained on all pairs of each prompt.

Each of a prompt's K responses is read once, and its C(K,2) pairs stay in one batch element (Ouyang et al. 2022,
section 3.5, https://arxiv.org/abs/2203.02155): as separate examples they overfit within an epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.models import Aux, ScalarModel
from rlhf_jax.objectives.mixture import conclude, routing_terms
from rlhf_jax.ops.losses import pair_losses, ranking_pairs
from rlhf_jax.types import Context, Key, Metrics, PyTree, RankingBatch


@struct.dataclass
class WeightedRankings:
    """Rankings with the weight of each of a prompt's pairs; summed over all pairs they add up to one."""

    batch: RankingBatch
    pair_weight: Float[Array, "B"]


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry loss over all pairs of each prompt's ranked responses, ties dropped.

    Args:
        model: the scalar model; a response's score is its output at the last token.
        normalise: ``prompt`` is InstructGPT's mean over prompts of the mean over their pairs; ``pair`` weighs all
            pairs of the minibatch alike, hence prompts with many responses more.
        centre_coef: weight of ``(r_better + r_worse)^2``, averaged like the loss, which holds scores near 0 (Eisenstein
            et al. 2023, https://arxiv.org/abs/2312.09244; TRL: 0.01).
        name: prefix of the metrics.
    """

    model: ScalarModel
    normalise: Literal["prompt", "pair"] = "prompt"
    centre_coef: float = 0.0
    name: str = "rm"

    def __post_init__(self):
        if self.normalise not in ("prompt", "pair"):
            raise ValueError(f"normalise is {self.normalise!r}; expected 'prompt' or 'pair'")
        if self.centre_coef < 0:
            raise ValueError(f"centre_coef is {self.centre_coef}; expected 0 or more")

    def with_weights(self, batch: RankingBatch) -> WeightedRankings:
        """The minibatch with its weights. Before any split of it."""
        pairs = jnp.sum(ranking_pairs(batch.ranks), axis=(1, 2)).astype(jnp.float32)
        if self.normalise == "pair":
            weight = (pairs > 0) / jnp.maximum(jnp.sum(pairs), 1)
        else:
            weight = (pairs > 0) / jnp.maximum(pairs, 1) / jnp.maximum(jnp.sum(pairs > 0), 1)
        return WeightedRankings(batch, weight)

    def scores(self, params: PyTree, batch: RankingBatch, key: Key | None = None) -> Float[Array, "B K"]:
        """One score per response, from one forward pass each. ``key`` is for dropout; None switches that off."""
        return self._scores(params, batch, key)[0]

    def _scores(self, params: PyTree, batch: RankingBatch, key: Key | None) -> tuple[Float[Array, "B K"], Aux]:
        tokens, lengths = rearrange(batch.tokens, "B K T -> (B K) T"), rearrange(batch.lengths, "B K -> (B K)")
        apply = cast(Callable[..., Any], functools.partial(self.model.apply, {"params": params}))
        dropout = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        outputs, aux = apply(tokens, Context.of_lengths(lengths, tokens.shape[1]), method="report", **dropout)
        last = jnp.maximum(lengths - 1, 0)[:, None]
        scores = jnp.take_along_axis(outputs, last, axis=1)[:, 0]
        return rearrange(scores, "(B K) -> B K", K=batch.ranks.shape[1]), aux

    def loss(self, params: PyTree, batch: WeightedRankings, key: Key | None) -> tuple[Float[Array, ""], Metrics]:
        """The loss and its metrics, sums under the weights. A pair of equal scores counts as half right."""
        scores, aux = self._scores(params, batch.batch, key)
        loss, metrics = self.loss_of_scores(scores, batch)
        routed, routing_metrics = routing_terms(aux, *self._rows(batch))
        return loss + routed, metrics | routing_metrics

    def _rows(self, batch: WeightedRankings) -> tuple[Float[Array, " BK"], Bool[Array, "BK T"]]:
        """The weight of each response in a mean over responses, their prompts weighed as in the loss; real tokens."""
        rankings, responses = batch.batch, batch.batch.ranks >= 0
        prompt = batch.pair_weight * jnp.sum(ranking_pairs(rankings.ranks), axis=(1, 2))
        weights = prompt[:, None] * responses / jnp.maximum(responses.sum(axis=1, keepdims=True), 1)
        real = jnp.arange(rankings.tokens.shape[2]) < rankings.lengths[:, :, None]
        return rearrange(weights, "B K -> (B K)"), rearrange(real, "B K T -> (B K) T")

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update, see ``mixture.conclude``."""
        trunk, metrics = conclude(self.model.trunk, params["trunk"], metrics)
        return {**params, "trunk": trunk}, metrics

    def loss_of_scores(self, scores: Float[Array, "B K"], batch: WeightedRankings) -> tuple[Float[Array, ""], Metrics]:
        """What ``loss`` computes after the model."""
        pairs = ranking_pairs(batch.batch.ranks)
        weights = jnp.where(pairs, batch.pair_weight[:, None, None], 0.0)
        better, worse = jnp.where(pairs, scores[:, :, None], 0.0), jnp.where(pairs, scores[:, None, :], 0.0)
        ranking = jnp.sum(weights * pair_losses(scores, pairs))
        loss = ranking + self.centre_coef * jnp.sum(weights * jnp.square(better + worse))
        right = (jnp.sign(better - worse) + 1) / 2
        metrics = {
            "loss": ranking,
            "accuracy": jnp.sum(weights * right),
            "margin": jnp.sum(weights * (better - worse)),
            "pairs": jnp.sum(pairs).astype(jnp.float32),
        }
        return loss, jax.lax.stop_gradient({f"{self.name}/{key}": value for key, value in metrics.items()})


def normalise_scores(
    params: PyTree, scores: Float[Array, "B"], *, mean: float = 0.0, std: float | None = None
) -> PyTree:
    """Parameters of a ``ScalarModel`` whose ``scores`` will have the given mean and, unless None, deviation.

    ``gain = std / std(scores)``; ``bias = mean - gain * mean(scores)``, folded into the head (Ziegler et al. 2019,
    section 2.1: mean 0 and deviation 1 on samples of the first policy).

    Args:
        params: with ``params["head"]["kernel"]`` and ``["bias"]``.
        scores: what the model gives to the reference responses now.
        mean: wanted mean.
        std: wanted deviation (biased); None leaves the scale alone.
    """
    scores = jnp.asarray(scores, jnp.float32)
    spread = jnp.std(scores)
    gain = jnp.float32(1) if std is None else std / jnp.where(spread > 0, spread, 1.0)
    offset = mean - gain * jnp.mean(scores)
    head = params["head"]
    moved = {
        "kernel": (head["kernel"] * gain).astype(head["kernel"].dtype),
        "bias": (head["bias"] * gain + offset).astype(head["bias"].dtype),
    }
    return {**params, "head": moved}


def bias_to_zero_mean(params: PyTree, scores: Float[Array, "B"]) -> PyTree:
    """Parameters with the head's bias moved so that these responses (demonstrations) score 0 on average."""
    return normalise_scores(params, scores, mean=0.0, std=None)
