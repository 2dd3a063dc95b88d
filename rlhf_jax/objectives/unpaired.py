"""Language models from responses that are good or bad, without pairs: KTO."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import repeat
from flax import struct
from jaxtyping import Array, Float

from rlhf_jax.models import Transformer
from rlhf_jax.objectives.mixture import conclude, routing_terms
from rlhf_jax.objectives.preference import read_responses, real_tokens, with_reference
from rlhf_jax.objectives.rules import KTO, Responses
from rlhf_jax.ops.preferences import kto_baseline, kto_loss
from rlhf_jax.types import Key, LabelledBatch, Metrics, PyTree


@struct.dataclass
class WeightedLabels:
    """Labelled responses with their weights, and the same of the good ones and of the bad ones; each adds up to one."""

    batch: LabelledBatch
    weight: Float[Array, "B"]
    good_weight: Float[Array, "B"]
    bad_weight: Float[Array, "B"]


@dataclass(frozen=True)
class Unpaired:
    """The KTO loss, a mean over responses.

    A baseline other than ``none`` is a mean over what it is computed with: it is that of the paper only where a
    minibatch is not split into microbatches.

    Args:
        model: the language model.
        rule: its choices.
        chunk: positions that are unembedded at a time; None for as many as is sensible.
        name: prefix of the metrics.
    """

    model: Transformer
    rule: KTO = KTO()
    chunk: int | None = None
    name: str = "preference"

    def prepare(self, ref_params: PyTree, batch: LabelledBatch) -> LabelledBatch:
        """The batch with what the reference says of its responses. No gradient; once for a data set is enough."""
        return with_reference(self.model, ref_params, batch, self.chunk)

    def with_weights(self, batch: LabelledBatch) -> WeightedLabels:
        """The minibatch with its weights. Before any split of it."""
        present = batch.lengths[:, 0] > 0
        parts = (present, present & batch.desirable, present & ~batch.desirable)
        return WeightedLabels(batch, *(part / jnp.maximum(jnp.sum(part), 1) for part in parts))

    def loss(self, params: PyTree, batch: WeightedLabels, key: Key | None) -> tuple[Float[Array, ""], Metrics]:
        """The loss and its metrics, sums under the weights. ``key`` is for dropout; None switches that off."""
        responses, aux = read_responses(self.model, params, self._needed(batch.batch), key, self.chunk)
        loss, metrics = self.loss_of_responses(responses, batch)
        read = responses.tokens.shape[1]
        rows = repeat(batch.weight / read, "B -> (B K)", K=read)
        routed, routing_metrics = routing_terms(aux, rows, real_tokens(self._needed(batch.batch)))
        return loss + routed, metrics | routing_metrics

    def loss_of_responses(self, responses: Responses, batch: WeightedLabels) -> tuple[Float[Array, ""], Metrics]:
        """What ``loss`` computes after the model."""
        present = batch.weight > 0
        ratios = jnp.where(present[:, None], responses.ratios(average=False), 0.0)
        # Inside a microbatch the weights do not add up to one.
        share = batch.weight / jnp.maximum(jnp.sum(batch.weight), 1e-9)
        match self.rule.baseline:
            case "mismatched":
                baseline = kto_baseline(ratios[:, 1], share)
            case "batch":
                baseline = kto_baseline(ratios[:, 0], share)
            case "none":
                baseline = jnp.float32(0)
        each = kto_loss(
            ratios[:, 0], batch.batch.desirable, baseline, self.rule.beta,
            self.rule.desirable_weight, self.rule.undesirable_weight,
        )  # fmt: skip
        loss = jnp.sum(batch.weight * each)
        rewards = self.rule.beta * ratios[:, 0]
        chosen, rejected = jnp.sum(batch.good_weight * rewards), jnp.sum(batch.bad_weight * rewards)
        metrics = {
            "loss": loss,
            "baseline": baseline * jnp.sum(batch.weight),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": jnp.sum(batch.good_weight * responses.logprobs[:, 0]),
            "rejected_logprob": jnp.sum(batch.bad_weight * responses.logprobs[:, 0]),
            "desirable": jnp.sum(batch.weight * batch.batch.desirable),
        }
        return loss, jax.lax.stop_gradient({f"{self.name}/{key}": value for key, value in metrics.items()})

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update, see ``mixture.conclude``."""
        return conclude(self.model, params, metrics)

    def _needed(self, batch: LabelledBatch) -> LabelledBatch:
        """Without the mismatched responses where no baseline asks for them."""
        read = 2 if self.rule.baseline == "mismatched" else 1
        if batch.tokens.shape[1] < read:
            raise ValueError(
                "the batch has no mismatched responses for baseline='mismatched'; expected K = 2, as labelled_rows("
                "mismatched=True) makes it"
            )
        tokens, lengths, ref_logprobs = (x[:, :read] for x in (batch.tokens, batch.lengths, batch.ref_logprobs))
        return LabelledBatch(tokens, lengths, batch.prompt_lengths, batch.desirable, ref_logprobs)
