"""Which tokens may be sampled: temperature, top-k, top-p and min-p on logits.

Order, as in most samplers: temperature, then top-k, then top-p on what top-k left (renormalised), then min-p. A filter
only ever removes tokens, by setting their logits to ``-inf``; the most probable token always stays.

Ties never depend on the order of the vocabulary: a token is judged by the weight of the tokens that are *strictly* more
probable, so equally probable tokens stay or go together (top-k may then keep more than ``k``).

No filter sorts the vocabulary. The cut-off is found by bisection over the ordered bit patterns of float32, which is
exact, costs 32 reductions, and was 15 times as fast as a sort of 32 x 50,257 logits on CPU.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def filter_logits(
    logits: Float[Array, "*rows V"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    keep: Int[Array, "*rows"] | None = None,
) -> Float[Array, "*rows V"]:
    """Divide by the temperature and set logits outside the kept support to ``-inf``.

    A filter at its neutral value costs nothing. Gradients flow through the kept logits; the support is a constant.

    Args:
        logits: unnormalised log-probabilities, float32.
        temperature: > 0.
        top_k: keep a token if fewer than ``top_k`` tokens are strictly more probable; 0 keeps all.
        top_p: keep a token if the tokens that are strictly more probable add up to less than ``top_p``: the smallest
            set of most probable tokens that reaches ``top_p``, ties included; 1 keeps all.
        min_p: keep a token if its probability is at least ``min_p`` times the largest; 0 keeps all.
        keep: one token per row that stays whatever the filters say. A scorer passes the sampled token: after an update
            of the policy it may fall out of the support, where its log-probability would be ``-inf``.
    """
    if temperature != 1.0:
        logits = logits / temperature
    fixed = jax.lax.stop_gradient(logits)
    support = None
    if top_k > 0 and top_k < logits.shape[-1]:
        support = _lighter_above(fixed, jnp.ones_like(fixed), jnp.full(logits.shape[:-1], float(top_k)))
    if top_p < 1.0:
        left = fixed if support is None else jnp.where(support, fixed, -jnp.inf)
        weights = jnp.exp(left - jnp.max(left, axis=-1, keepdims=True))
        support = _both(support, _lighter_above(left, weights, top_p * jnp.sum(weights, axis=-1)))
    if min_p > 0.0:
        support = _both(support, fixed >= jnp.max(fixed, axis=-1, keepdims=True) + math.log(min_p))
    if support is None:
        return logits
    if keep is not None:
        support |= jnp.arange(logits.shape[-1]) == keep[..., None]
    return jnp.where(support, logits, -jnp.inf)


def _both(a: Bool[Array, "*rows V"] | None, b: Bool[Array, "*rows V"]) -> Bool[Array, "*rows V"]:
    return b if a is None else a & b


def _lighter_above(
    logits: Float[Array, "*rows V"], weights: Float[Array, "*rows V"], budget: Float[Array, "*rows"]
) -> Bool[Array, "*rows V"]:
    """Where the weights of the strictly larger logits add up to less than the row's (positive) budget.

    That sum falls as the logit grows, so the tokens that qualify are those from a cut-off upwards. ``high`` always
    qualifies, ``low`` does not (or is ``-inf``: then everything stays), and 32 halvings make them neighbours.
    """
    low = jnp.full(logits.shape[:-1], _rank(jnp.float32(-jnp.inf)))
    high = _rank(jnp.max(logits, axis=-1).astype(jnp.float32))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # floor of the mean without overflow
        above = jnp.sum(jnp.where(logits > _unrank(middle)[..., None], weights, 0.0), axis=-1)
        return jnp.where(above < budget, low, middle), jnp.where(above < budget, middle, high)

    _, cutoff = jax.lax.fori_loop(0, 32, halve, (low, high))
    return logits >= _unrank(cutoff)[..., None]


def _rank(x: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    """Integers in the order of the float32 values (negative floats have their magnitude bits flipped)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unrank(rank: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jax.lax.bitcast_convert_type(jnp.where(rank < 0, rank ^ 0x7FFFFFFF, rank), jnp.float32)
