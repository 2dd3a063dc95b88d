"""Losses of language models from preferences: DPO and its kin, per pair, per response, or per list.

A ``margin`` is what the better response has over the worse one: of ``log p - log q``, the log-probability under the
policy less that under the reference, or of ``log p`` alone where a loss needs no reference. Whether these are sums over
a response's tokens or means is the caller's choice. Nothing here reduces over the batch, see ``losses``.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.ops.losses import ranking_pairs


def sigmoid_loss(
    margin: Float[Array, "..."], beta: float = 0.1, label_smoothing: float = 0.0, target: float = 0.0
) -> Float[Array, "..."]:
    """The negative log-likelihood of a preference that may have been noted the wrong way round.

    ``-(1 - e) log sigmoid(beta h - g) - e log sigmoid(-(beta h - g))``. Rafailov et al. 2023 (DPO), equation 7,
    https://arxiv.org/abs/2305.18290; label smoothing: Mitchell 2023 (cDPO), https://ericmitchell.ai/cdpo.pdf; with
    means of ``log p`` and the target margin g it is Meng et al. 2024 (SimPO), equation 6,
    https://arxiv.org/abs/2405.14734; with sums of ``log p`` the preference term of Xu et al. 2024 (CPO),
    https://arxiv.org/abs/2401.08417.

    Args:
        margin: h.
        beta: scale from log-probabilities to rewards.
        label_smoothing: e, the probability that a label is wrong; below 1/2.
        target: g, the reward by which the better one is to win.
    """
    logit = beta * margin - target
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


def robust_loss(margin: Float[Array, "..."], beta: float = 0.1, label_smoothing: float = 0.1) -> Float[Array, "..."]:
    """The DPO loss of the true preferences, estimated without bias from labels that are wrong with probability e.

    ``(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)``. Chowdhury et al. 2024,
    https://arxiv.org/abs/2403.00409. It may be negative.
    """
    right, wrong = -jax.nn.log_sigmoid(beta * margin), -jax.nn.log_sigmoid(-beta * margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_loss(margin: Float[Array, "..."], beta: float = 0.1) -> Float[Array, "..."]:
    """``max(0, 1 - beta h)``. Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425, with a reference as in
    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657."""
    return jax.nn.relu(1 - beta * margin)


def ipo_loss(margin: Float[Array, "..."], beta: float = 0.1) -> Float[Array, "..."]:
    """``(h - 1 / (2 beta))^2``: a margin to reach and not to exceed. Azar et al. 2023 (IPO), equation 17,
    https://arxiv.org/abs/2310.12036, whose tau is beta. Public systems differ in h: sums or means over tokens."""
    return jnp.square(margin - 1 / (2 * beta))


def log_odds(mean_logprob: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log(p / (1 - p))`` of ``p = exp(mean_logprob)``, the geometric mean of a response's token probabilities.

    Hong et al. 2024 (ORPO), equation 4, https://arxiv.org/abs/2403.07691. Their odds ratio loss is ``sigmoid_loss`` of
    the difference, with beta 1. Probabilities are held below 1 - 1e-7, where the odds are still finite.
    """
    held = jnp.minimum(mean_logprob, -1e-7)
    return held - jnp.log(-jnp.expm1(held))


def kto_loss(
    log_ratio: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    baseline: Float[Array, ""] | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "..."]:
    """The loss of one response that is known to be good or bad, without another to compare it with.

    ``w_D (1 - sigmoid(beta (r - z)))`` or ``w_U (1 - sigmoid(beta (z - r)))``. Ethayarajh et al. 2024 (KTO),
    https://arxiv.org/abs/2402.01306.

    Args:
        log_ratio: r, the response's ``log p - log q``, summed over its tokens.
        desirable: whether it is good.
        baseline: z, see ``kto_baseline``; a constant.
        beta: how soon gains and losses saturate.
        desirable_weight: of good responses.
        undesirable_weight: of bad ones.
    """
    chex.assert_equal_shape([log_ratio, desirable])
    gain = beta * (log_ratio - jax.lax.stop_gradient(baseline))
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))


def kto_baseline(log_ratio: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, ""]:
    """``max(0, sum w r)``: the KL to the reference as KTO estimates it, in nats per response.

    Args:
        log_ratio: of responses that belong to *other* prompts (as in the paper), or of the batch's own.
        weights: that add up to one.
    """
    chex.assert_equal_shape([log_ratio, weights])
    return jnp.maximum(jnp.sum(weights * log_ratio), 0.0)


def plackett_luce_loss(scores: Float[Array, "B K"], ranks: Int[Array, "B K"]) -> Float[Array, "B"]:
    """The negative log-likelihood of a whole ranking: the best is chosen of all, the next of what is left.

    ``sum_i log sum_{j = i or j behind i} exp(s_j) - s_i``. With ``beta (log p - log q)`` as scores it is the K-way loss
    of Rafailov et al. 2023, appendix A.3, https://arxiv.org/abs/2305.18290. Ties do not compete with each other, so
    that with K = 2 it is the pairwise loss, and 0 for a tie. Absent responses (rank -1) take no part.
    """
    chex.assert_equal_shape([scores, ranks])
    pairs = ranking_pairs(ranks)
    # The score of an absent response need not be a number, also not for the gradient.
    takes_part = jnp.any(pairs, axis=1) | jnp.any(pairs, axis=2)
    held = jnp.where(takes_part, scores, 0.0)
    rivals = pairs | jnp.eye(ranks.shape[1], dtype=bool)
    chosen_of = jax.nn.logsumexp(jnp.where(rivals, held[:, None, :], -jnp.inf), axis=2)
    return jnp.sum(jnp.where(jnp.any(pairs, axis=2), chosen_of - held, 0.0), axis=1)
