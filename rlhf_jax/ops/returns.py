"""From token rewards to advantages: masked statistics, whitening, generalised advantage estimation.

Masked entries never matter: they may hold anything, NaN included, and come back as 0.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Variance = Literal["biased", "unbiased"]
Over = Literal["mask", "all"]


def masked_mean(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of ``x`` where ``mask`` holds; 0 if it holds nowhere."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(x: Float[Array, "..."], mask: Bool[Array, "..."], variance: Variance = "unbiased") -> Float[Array, ""]:
    """Variance of ``x`` where ``mask`` holds, divided by the count (biased) or the count less one (unbiased)."""
    if variance not in ("biased", "unbiased"):
        raise ValueError(f"unknown variance {variance!r}; expected 'biased' or 'unbiased'")
    squares = jnp.sum(jnp.where(mask, jnp.square(x - masked_mean(x, mask)), 0))
    count = jnp.sum(mask) - (1 if variance == "unbiased" else 0)
    return squares / jnp.maximum(count, 1)


def whiten(
    x: Float[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    shift_mean: bool = True,
    variance: Variance = "unbiased",
    over: Over = "mask",
    epsilon: float = 1e-8,
) -> Float[Array, "..."]:
    """``x`` scaled to variance 1 and, with ``shift_mean``, moved to mean 0; 0 outside ``mask``.

    ``(x - mean) / sqrt(var + epsilon)``, plus ``mean`` again without ``shift_mean``.

    Args:
        x: what to scale; the statistics are taken over all of its axes.
        mask: which entries exist.
        shift_mean: whether the mean is removed (rewards usually keep theirs).
        variance: ``biased`` divides by n (OpenAI, OpenRLHF), ``unbiased`` by n - 1 (TRL, verl).
        over: ``mask`` takes the statistics over existing entries; ``all`` counts padding as zeros (trlX), so that
            they depend on the amount of padding.
        epsilon: added to the variance.
    """
    if over not in ("mask", "all"):
        raise ValueError(f"unknown over {over!r}; expected 'mask' or 'all'")
    x = jnp.where(mask, x, 0)
    counted = mask if over == "mask" else jnp.ones_like(mask)
    mean = masked_mean(x, counted)
    whitened = (x - mean) * jax.lax.rsqrt(masked_var(x, counted, variance) + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


def gae(
    rewards: Float[Array, "B N"],
    values: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
    gamma: float | Float[Array, "B"] = 1.0,
    lam: float | Float[Array, "B"] = 0.95,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Advantages and returns by generalised advantage estimation.

    ``delta_t = r_t + gamma V_{t+1} - V_t``; ``A_t = delta_t + gamma lam A_{t+1}``; ``return_t = A_t + V_t``, where
    ``t + 1`` is the next entry *inside the mask*: over a gap (tool output, another speaker) the next value and
    advantage are carried, so that a row with a gap equals the row without it. Nothing follows the last entry.
    Schulman et al. 2016, equations 11-16, https://arxiv.org/abs/1506.02438.

    Args:
        rewards: reward on arriving behind each token.
        values: value of the state before each token.
        mask: tokens of the policy; rewards elsewhere are ignored.
        gamma: discount per token; a vector holds one for each row.
        lam: weight of longer returns; a vector holds one for each row (length-adaptive lambda).

    Returns:
        (advantages, returns), both 0 outside ``mask``.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = jnp.where(mask, rewards, 0), jnp.where(mask, values, 0)

    def step(carry, entry):
        next_value, next_advantage = carry
        reward, value, here = entry
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(here, value, next_value), jnp.where(here, advantage, next_advantage)
        return carry, jnp.where(here, advantage, 0)

    nothing = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (nothing, nothing), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values
