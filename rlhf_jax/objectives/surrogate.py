"""What methods with and without a critic share: the clipped surrogate, and experience read as a rollout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops import losses
from rlhf_jax.types import Metrics, Rollout


def policy_terms(
    choices: Any,
    experience: Any,
    ratio: Float[Array, "B N"],
    logprobs: Float[Array, "B N"],
    entropy: Float[Array, "B N"],
    *,
    kl: Float[Array, "B N"] | None = None,
    factor: Float[Array, "B N"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate, KL penalty and entropy bonus, summed under the weights, and their metrics.

    Args:
        choices: with ``clip``, ``clip_high``, ``dual_clip`` and ``entropy_coef``.
        experience: with ``advantages``, ``logprobs``, ``kl_coef``, ``weights`` and ``token_weights``.
        ratio: of new and old policy; 1 where there is no token, as ``logprobs`` are the old ones there.
        logprobs: of the policy now.
        entropy: of its distribution; 0 where there is no token.
        kl: penalty of each token; None where it does not belong to the loss.
        factor: on the surrogate of each token.
    """
    weights = experience.weights
    surrogate = losses.clipped_policy_loss(
        ratio, experience.advantages, choices.clip, choices.clip_high, choices.dual_clip
    )
    if factor is not None:
        surrogate = surrogate * factor
    loss = policy_loss = jnp.sum(weights * surrogate)
    per_token = {
        "ppo/clip_fraction": losses.policy_is_clipped(ratio, experience.advantages, choices.clip, choices.clip_high),
        "ppo/approx_kl": experience.logprobs - logprobs,
        "ppo/ratio_mean": ratio,
        "ppo/entropy": entropy,
    }
    metrics = {name: jnp.sum(experience.token_weights * x) for name, x in per_token.items()}
    metrics["ppo/policy_loss"] = policy_loss
    metrics["ppo/ratio_max_deviation"] = jnp.max(jnp.abs(ratio - 1))
    if kl is not None:
        metrics["ppo/kl_loss"] = jnp.sum(weights * kl * experience.kl_coef[:, None])
        loss = loss + metrics["ppo/kl_loss"]
    if choices.entropy_coef != 0:
        loss = loss - choices.entropy_coef * jnp.sum(weights * entropy)
    return loss, jax.lax.stop_gradient(metrics)


def as_rollout(experience: Any) -> Rollout:
    """The rows of an experience as a rollout, for the scorer."""
    return Rollout(
        tokens=experience.tokens,
        prompt_lengths=experience.prompt_lengths,
        response_mask=experience.response_mask,
        logprobs=experience.logprobs,
        finished=experience.finished,
        index=experience.index,
        policy_step=jnp.max(experience.policy_step),
        routing=experience.routing,
        temperature=experience.temperature,
    )
