"""KL divergence from samples: per-token estimators, and the controllers of its coefficient.

Left out: the exact divergence over the vocabulary (it needs the logits), and where a penalty is applied (objectives).
Source of the estimators: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

Estimator = Literal["k1", "k2", "k3", "abs"]


def k1(logprobs: Float[Array, "..."], ref_logprobs: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log p - log q`` of a sample from ``p``: unbiased for KL(p, q), high variance, often negative."""
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "..."], ref_logprobs: Float[Array, "..."]) -> Float[Array, "..."]:
    """``(log p - log q)^2 / 2``: biased as a value; its gradient on samples from ``p`` is that of the KL."""
    return jnp.square(k1(logprobs, ref_logprobs)) / 2


def k3(logprobs: Float[Array, "..."], ref_logprobs: Float[Array, "..."]) -> Float[Array, "..."]:
    """``q/p - 1 - log(q/p)``: unbiased, never negative, low variance near ``p = q``; its gradient is biased."""
    log_ratio = -k1(logprobs, ref_logprobs)
    # expm1 keeps the digits that exp(x) - 1 loses where the two policies are close.
    return jnp.expm1(log_ratio) - log_ratio


def absolute(logprobs: Float[Array, "..."], ref_logprobs: Float[Array, "..."]) -> Float[Array, "..."]:
    """``|log p - log q|``: the penalty of NeMo-Aligner; no estimator of the KL (it has lost the sign)."""
    return jnp.abs(k1(logprobs, ref_logprobs))


def estimate(
    logprobs: Float[Array, "..."],
    ref_logprobs: Float[Array, "..."],
    estimator: Estimator = "k1",
    *,
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
) -> Float[Array, "..."]:
    """The named estimator, per token.

    Args:
        logprobs: log-probabilities in nats of the tokens under the policy that they were sampled from.
        ref_logprobs: the same tokens under the reference.
        estimator: one of ``k1``, ``k2``, ``k3``, ``abs``.
        log_ratio_clamp: bound on ``|log p - log q|`` before the estimator (verl and NeMo RL: 20).
        clamp: bound on the result (OpenRLHF, verl and NeMo RL: 10).
    """
    log_ratio = k1(logprobs, ref_logprobs)
    if log_ratio_clamp is not None:
        log_ratio = jnp.clip(log_ratio, -log_ratio_clamp, log_ratio_clamp)
    zero = jnp.zeros_like(log_ratio)
    match estimator:
        case "k1":
            kl = log_ratio
        case "k2":
            kl = k2(log_ratio, zero)
        case "k3":
            kl = k3(log_ratio, zero)
        case "abs":
            kl = absolute(log_ratio, zero)
        case _:
            raise ValueError(f"unknown KL estimator {estimator!r}; expected 'k1', 'k2', 'k3' or 'abs'")
    return kl if clamp is None else jnp.clip(kl, -clamp, clamp)


@dataclass(frozen=True)
class FixedKL:
    """A KL coefficient that never changes."""

    coef: float = 0.02

    def __post_init__(self):
        if self.coef < 0:
            raise ValueError(f"coef is {self.coef}; expected a KL coefficient of 0 or more")

    def init(self) -> Float[Array, ""]:
        """The coefficient at the start: the controller's whole state, a scalar to checkpoint."""
        return jnp.asarray(self.coef, jnp.float32)

    def update(self, coef: Float[Array, ""], kl: Float[Array, ""], episodes: int) -> Float[Array, ""]:
        """The same coefficient again."""
        del kl, episodes
        return coef


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient steered so that the KL per response settles at ``target`` nats.

    ``error = clip(kl / target - 1, -0.2, 0.2)``; ``coef *= 1 + error * episodes / horizon``.
    Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593.

    Args:
        coef: coefficient at the start.
        target: KL in nats, summed over a response and averaged over responses.
        horizon: episodes over which the largest error changes the coefficient by about 20 %.
    """

    coef: float = 0.15
    target: float = 6.0
    horizon: float = 10_000

    def __post_init__(self):
        for name in ("coef", "target", "horizon"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a number above 0 (FixedKL switches KL off)"
                )

    def init(self) -> Float[Array, ""]:
        """The coefficient at the start: the controller's whole state, a scalar to checkpoint."""
        return jnp.asarray(self.coef, jnp.float32)

    def update(self, coef: Float[Array, ""], kl: Float[Array, ""], episodes: int) -> Float[Array, ""]:
        """The coefficient after ``episodes`` more responses whose mean summed KL was ``kl``."""
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        return coef * (1 + error * episodes / self.horizon)


KLController = FixedKL | AdaptiveKL
