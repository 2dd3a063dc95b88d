"""Next-token likelihood: pretraining, supervised fine-tuning, and the pretraining term of PPO-ptx.

Which tokens are targets is the batch's affair (``TokenBatch.loss_mask``); packed documents are told apart by segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.models import Transformer
from rlhf_jax.objectives.mixture import conclude, routing_terms
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.types import Key, Metrics, PyTree, TokenBatch


@struct.dataclass
class WeightedTokens:
    """Rows of tokens with the weight of each as a target; over the whole minibatch they add up to one."""

    batch: TokenBatch
    weights: Float[Array, "B T"]


@dataclass(frozen=True)
class LanguageModel:
    """Weighted negative log-likelihood of the target tokens: ``-sum w_t log p(x_t | x_<t)``.

    Args:
        model: the language model.
        name: prefix of the metrics: ``lm``, ``sft``, ``ptx``.
        mean: ``token`` weighs all target tokens of the minibatch alike; ``sequence`` weighs documents (segments)
            alike, and the tokens inside one.
        chunk: positions that are unembedded at a time; bounds the memory of logits.
        entropy: whether the mean entropy of the predictions is reported (it costs a pass over the logits).
    """

    model: Transformer
    name: str = "lm"
    mean: Literal["token", "sequence"] = "token"
    chunk: int = 4096
    entropy: bool = False

    def __post_init__(self):
        if self.mean not in ("token", "sequence"):
            raise ValueError(f"mean is {self.mean!r}; expected 'token' or 'sequence'")

    def with_weights(self, batch: TokenBatch) -> WeightedTokens:
        """The minibatch with its weights. Before any split of it."""
        targets = jnp.where(predictable(batch), batch.loss_mask, 0.0)
        if self.mean == "sequence":
            return WeightedTokens(batch, _per_segment(targets, batch))
        total = jnp.sum(targets)
        return WeightedTokens(batch, targets / jnp.where(total > 0, total, 1.0))

    def loss(self, params: PyTree, batch: WeightedTokens, key: Key | None) -> tuple[Float[Array, ""], Metrics]:
        """The loss and its metrics, sums under the weights. ``key`` is for dropout; None switches that off."""
        tokens, context = batch.batch.tokens, batch.batch.context
        apply = cast(Callable[..., Any], functools.partial(self.model.apply, {"params": params}))
        dropout = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        hidden, _, aux = apply(tokens, context, method="hidden", **dropout)
        # Each state predicts the token behind it; the last state meets the first token, whose weight is 0.
        targets, weights = jnp.roll(tokens, -1, axis=1), jnp.roll(batch.weights, -1, axis=1)
        logprobs, entropy = token_logprobs(
            hidden,
            functools.partial(apply, method="unembed"),
            targets,
            chunk=self.chunk,
            entropy=self.entropy,
        )
        loss = -jnp.sum(jnp.where(weights > 0, weights * logprobs, 0.0))
        metrics = {f"{self.name}/loss": loss, f"{self.name}/tokens": jnp.sum(weights > 0).astype(jnp.float32)}
        if entropy is not None:
            metrics[f"{self.name}/entropy"] = jnp.sum(weights * entropy)
        routed, routing_metrics = routing_terms(aux, batch.weights.sum(axis=1), context.segments > 0)
        return loss + routed, jax.lax.stop_gradient(metrics) | routing_metrics

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update, see ``mixture.conclude``."""
        return conclude(self.model, params, metrics)


def predictable(batch: TokenBatch) -> Bool[Array, "B T"]:
    """Tokens with a token before them in their own document."""
    before = jnp.pad(batch.segments[:, :-1], ((0, 0), (1, 0)))
    return (batch.segments == before) & (batch.segments > 0)


def _per_segment(targets: Float[Array, "B T"], batch: TokenBatch) -> Float[Array, "B T"]:
    """Weights of a mean over documents of means over their target tokens."""
    rows, width = targets.shape
    row = jnp.arange(rows)[:, None]
    totals = jnp.zeros((rows, width + 1)).at[row, batch.segments].add(targets)
    documents = jnp.maximum(jnp.sum(totals > 0), 1)
    own = totals[row, batch.segments]
    return targets / jnp.where(own > 0, own, 1.0) / documents
