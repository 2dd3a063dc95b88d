"""Dense attention: the definition that every other implementation is held against. O(T S) memory; exact in float64.

Whatever lies in padding, NaN and infinity too, reaches no result and no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.blocked_tiles import zero_where_padded
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms


def refusal(case: Case) -> str | None:
    """Nothing is refused."""
    return None


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    finite: bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and the log of each query's sum of exponentials, in fp32 or wider.

    Args:
        q: queries, and so on as in ``attention``.
        k: keys.
        v: values.
        mask: who sees whom.
        terms: what else the logits are made of.
        dropout: probability of dropping a weight.
        dropout_key: its randomness; none is applied without it.
        finite: padding is known to hold finite numbers, as in a cache that holds what was written and zeros; this
            saves decoding a copy of the keys and values at every step.
    """
    if not finite:
        q = zero_where_padded(q, mask.query_segments)
        k, v = (zero_where_padded(x, mask.key_segments) for x in (k, v))
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(rows, length, groups, heads // groups, width)
    products = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=wide)
    logits = terms.logits(
        products,
        mask.query_positions[:, None, None, :, None],
        mask.key_positions[:, None, None, None, :],
        None if terms.slopes is None else _by_head(terms.slopes, groups, wide),
    )
    # Added rather than selected: the sum with a finite number of this size is that number, and needs no residual.
    logits = logits + jnp.where(mask.dense(), 0.0, HIDDEN).astype(wide)[:, None, None]
    # A row without keys keeps a maximum far above its logits, so that all its weights are exactly 0.
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), HIDDEN / 2))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1)
    if terms.sink_logits is not None:
        # A sink far above the logits would overflow beside their maximum, so it takes part in a second one.
        sink = _by_head(terms.sink_logits, groups, wide)
        higher = jax.lax.stop_gradient(jnp.maximum(top, sink))
        weights, total = weights * jnp.exp(top - higher), total * jnp.exp(top - higher)[..., 0]
        total, top = total + jnp.exp(sink - higher)[..., 0], higher
    if dropout > 0.0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=wide)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    mixed = mixed / divisor.transpose(0, 3, 1, 2)[..., None]
    lse = jnp.where(empty, HIDDEN, top[..., 0] + jnp.log(divisor))
    out = mixed.reshape(rows, length, heads, v.shape[-1]).astype(q.dtype)
    if not finite:
        out = zero_where_padded(out, mask.query_segments)  # and so are cotangents
    return out, lse.transpose(0, 3, 1, 2).reshape(rows, length, heads)


def _by_head(values: Float[Array, " H"], groups: int, dtype) -> Float[Array, "1 K G 1 1"]:
    return values.astype(dtype).reshape(1, groups, -1, 1, 1)
