"""Language models from rankings: the policy itself is the reward model (DPO and its kin).

A prompt's K responses are read once and make up to C(K,2) pairs, weighed as in ``objectives.reward``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import Aux, Transformer
from rlhf_jax.objectives.mixture import conclude, routing_terms
from rlhf_jax.objectives.rules import DPO, PlackettLuce, RankingRule, Responses
from rlhf_jax.ops.losses import ranking_pairs
from rlhf_jax.scoring import continuation_logprobs
from rlhf_jax.types import Key, LabelledBatch, Metrics, PreferenceBatch, PyTree

Batch = TypeVar("Batch", PreferenceBatch, LabelledBatch)


@struct.dataclass
class WeightedPreferences:
    """Rankings with the weight of each of a prompt's pairs, and that of each response in the likelihood term.

    Summed over all pairs the first add up to one; the second, each times the response's tokens, as well.
    """

    batch: PreferenceBatch
    pair_weight: Float[Array, "B"]
    sft_weight: Float[Array, "B K"]


@dataclass(frozen=True)
class Preference:
    """A loss over the ranked responses of each prompt, ties dropped, and the likelihood of the best.

    Args:
        model: the language model.
        rule: the loss and its choices, see ``objectives.rules``.
        normalise: ``prompt`` is the mean over prompts of the mean over their pairs; ``pair`` weighs all pairs of the
            minibatch alike, hence prompts with many responses more. A Plackett-Luce loss is one of the prompt.
        sft_coef: weight of the negative log-likelihood of the best responses; None is that of the rule's paper (1 for
            ORPO and CPO, otherwise 0).
        sft_mean: ``token`` averages it over all their tokens; ``sequence`` over prompts, then over each one's tokens
            (Pang et al. 2024, https://arxiv.org/abs/2404.19733).
        chunk: positions that are unembedded at a time; None for as many as is sensible.
        name: prefix of the metrics.
    """

    model: Transformer
    rule: RankingRule = DPO()
    normalise: Literal["prompt", "pair"] = "prompt"
    sft_coef: float | None = None
    sft_mean: Literal["token", "sequence"] = "token"
    chunk: int | None = None
    name: str = "preference"

    def __post_init__(self):
        if self.normalise not in ("prompt", "pair"):
            raise ValueError(f"normalise is {self.normalise!r}; expected 'prompt' or 'pair'")
        if self.sft_mean not in ("token", "sequence"):
            raise ValueError(f"sft_mean is {self.sft_mean!r}; expected 'token' or 'sequence'")
        if self.sft_coef is not None and self.sft_coef < 0:
            raise ValueError(f"sft_coef is {self.sft_coef}; expected 0 or more, or None")

    def prepare(self, ref_params: PyTree, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with what the reference says of its responses. No gradient; once for a data set is enough."""
        return with_reference(self.model, ref_params, batch, self.chunk)

    def with_weights(self, batch: PreferenceBatch) -> WeightedPreferences:
        """The minibatch with its weights. Before any split of it."""
        pairs = ranking_pairs(batch.ranks)
        count = jnp.sum(pairs, axis=(1, 2)).astype(jnp.float32)
        if self.normalise == "pair":
            weight = (count > 0) / jnp.maximum(jnp.sum(count), 1)
        else:
            weight = (count > 0) / jnp.maximum(count, 1) / jnp.maximum(jnp.sum(count > 0), 1)
        # The best are better than something, and nothing is better than they.
        best = jnp.any(pairs, axis=2) & ~jnp.any(pairs, axis=1)
        tokens = jnp.where(best, response_tokens(batch), 0).astype(jnp.float32)
        if self.sft_mean == "token":
            sft = best / jnp.maximum(jnp.sum(tokens), 1)
        else:
            share = jnp.maximum(jnp.sum(best, axis=1, keepdims=True), 1) * jnp.maximum(jnp.sum(count > 0), 1)
            sft = best / jnp.maximum(tokens, 1) / share
        return WeightedPreferences(batch, weight, sft)

    def rewards(self, params: PyTree, batch: PreferenceBatch) -> Float[Array, "B K"]:
        """The reward of each response that the policy implies: ``beta`` times the rule's statistic."""
        return self.rule.beta * self.rule.statistic(read_responses(self.model, params, batch, None, self.chunk)[0])

    def loss(self, params: PyTree, batch: WeightedPreferences, key: Key | None) -> tuple[Float[Array, ""], Metrics]:
        """The loss and its metrics, sums under the weights. A pair of equal rewards counts as half right."""
        responses, aux = read_responses(self.model, params, batch.batch, key, self.chunk)
        loss, metrics = self.loss_of_responses(responses, batch)
        routed, routing_metrics = routing_terms(aux, *self._rows(batch))
        return loss + routed, metrics | routing_metrics

    def loss_of_responses(self, responses: Responses, batch: WeightedPreferences) -> tuple[Float[Array, ""], Metrics]:
        """What ``loss`` computes after the model."""
        pairs, there = ranking_pairs(batch.batch.ranks), batch.batch.ranks >= 0
        weights = jnp.where(pairs, batch.pair_weight[:, None, None], 0.0)
        # Any number does in the place of absent responses, so that theirs stay out of the gradient too.
        logprobs, reference = (jnp.where(there, x, -1.0) for x in (responses.logprobs, responses.ref_logprobs))
        responses = Responses(logprobs, reference, responses.tokens)
        statistic = self.rule.statistic(responses)
        margin = jnp.where(pairs, statistic[:, :, None] - statistic[:, None, :], 0.0)
        if isinstance(self.rule, PlackettLuce):
            of_prompt = batch.pair_weight * jnp.sum(pairs, axis=(1, 2))
            preference = jnp.sum(of_prompt * self.rule.ranking(statistic, batch.batch.ranks))
        else:
            preference = jnp.sum(weights * self.rule.pair(margin))
        likelihood = jnp.where(batch.sft_weight > 0, batch.sft_weight * responses.logprobs, 0.0)
        sft, coef = -jnp.sum(likelihood), self.rule.sft_coef if self.sft_coef is None else self.sft_coef
        loss = preference + coef * sft

        def means(values: Float[Array, "B K"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            """Of the better and of the worse ones, weighed as in the loss."""
            better, worse = jnp.sum(weights, axis=2), jnp.sum(weights, axis=1)
            return (
                jnp.sum(jnp.where(better > 0, better * values, 0.0)),
                jnp.sum(jnp.where(worse > 0, worse * values, 0.0)),
            )

        chosen, rejected = means(self.rule.beta * statistic)
        chosen_logprobs, rejected_logprobs = means(responses.logprobs)
        metrics = {
            "loss": preference,
            "sft_loss": sft,
            "accuracy": jnp.sum(weights * (jnp.sign(margin) + 1) / 2),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": chosen_logprobs,
            "rejected_logprob": rejected_logprobs,
            "pairs": jnp.sum(pairs).astype(jnp.float32),
        }
        return loss, jax.lax.stop_gradient({f"{self.name}/{key}": value for key, value in metrics.items()})

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update, see ``mixture.conclude``."""
        return conclude(self.model, params, metrics)

    def _rows(self, batch: WeightedPreferences) -> tuple[Float[Array, " BK"], Bool[Array, "BK T"]]:
        """The weight of each response in a mean over responses, their prompts weighed as in the loss; real tokens."""
        present = batch.batch.ranks >= 0
        prompt = batch.pair_weight * jnp.sum(ranking_pairs(batch.batch.ranks), axis=(1, 2))
        weights = prompt[:, None] * present / jnp.maximum(present.sum(axis=1, keepdims=True), 1)
        return rearrange(weights, "B K -> (B K)"), real_tokens(batch.batch)


def with_reference(model: Transformer, ref_params: PyTree, batch: Batch, chunk: int | None = None) -> Batch:
    """The batch with the log-probabilities of its responses under the reference."""
    responses, _ = read_responses(model, ref_params, batch, None, chunk)
    return dataclasses.replace(batch, ref_logprobs=jax.lax.stop_gradient(responses.logprobs))


def read_responses(
    model: Transformer, params: PyTree, batch: PreferenceBatch | LabelledBatch, key: Key | None, chunk: int | None
) -> tuple[Responses, Aux]:
    """What a model says of all responses, from one forward pass each; ``key`` is for dropout, None without."""
    tokens, lengths = rearrange(batch.tokens, "B K T -> (B K) T"), rearrange(batch.lengths, "B K -> (B K)")
    of_each, count = batch.lengths.shape[1], {"K": batch.lengths.shape[1]}
    prompts = repeat(batch.prompt_lengths, "B -> (B K)", K=of_each)
    found = continuation_logprobs(model, params, tokens, prompts, lengths, chunk=chunk, dropout_key=key)
    logprobs = rearrange(found.logprobs, "(B K) -> B K", **count)
    return Responses(logprobs, batch.ref_logprobs, rearrange(found.tokens, "(B K) -> B K", **count)), found.aux


def response_tokens(batch: PreferenceBatch) -> Int[Array, "B K"]:
    """Tokens of each response, as ``scoring.continuation_logprobs`` counts them."""
    return jnp.maximum(batch.lengths - jnp.maximum(batch.prompt_lengths, 1)[:, None], 0)


def real_tokens(batch: PreferenceBatch | LabelledBatch) -> Bool[Array, "BK T"]:
    """Which tokens of each sequence are no padding."""
    return rearrange(jnp.arange(batch.tokens.shape[2]) < batch.lengths[:, :, None], "B K T -> (B K) T")
