"""Attention tile by tile with an online softmax, in plain XLA: O(T) memory, every mask, every device.

A loop over tiles of queries, and in it one over the tiles of keys that these queries see (arXiv 2307.08691). Tiles
outside the mask are never visited, and those altogether inside it never compute it. The backward pass
(``blocked_backward``) makes the weights again from the log-sum-exp.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.blocked_backward import backward
from rlhf_jax.ops.attention.blocked_tiles import Tiles, Tiling, Visits, zero_where_padded
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms


def refusal(case: Case) -> str | None:
    """Nothing is refused."""
    return None


def suits(case: Case) -> bool:
    """Whether this is the better choice: on CPU from 256 by 256 on, elsewhere where the dense logits exceed 1 GiB.

    On two CPU cores a single tile costs what the dense form does and a second one is already faster. On a GPU products
    of one tile after the other are slow, which only memory justifies. A few queries at a time have no use for tiles.
    """
    dense = case.length * case.slots
    if case.length < 64:
        return False
    return dense >= 256 * 256 if case.platform == "cpu" else case.rows * case.heads * dense > 2**28


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and the log of each query's sum of exponentials, in fp32 or wider.

    Args:
        q: queries, and so on as in ``attention``.
        k: keys.
        v: values.
        mask: who sees whom.
        terms: what else the logits are made of.
        tiling: the tiles; None for those that suit.
    """
    return _attend(Tiling.of(q, k, mask) if tiling is None else tiling, q, k, v, mask, terms)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, q, k, v, mask: Mask, terms: Terms):
    return _forward(tiling, q, k, v, mask, terms)


def _attend_forward(tiling: Tiling, q, k, v, mask: Mask, terms: Terms):
    out, lse = _forward(tiling, q, k, v, mask, terms)
    return (out, lse), (q, k, v, mask, terms, out, lse)


_attend.defvjp(_attend_forward, backward)


def _forward(tiling: Tiling, q, k, v, mask: Mask, terms: Terms):
    groups = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    tiles = Tiles.of(mask, tiling)
    visits = Visits.of(tiles.blocks)
    queries = tiling.queries_apart(zero_where_padded(q, mask.query_segments), groups)
    keys = tiling.keys_apart(zero_where_padded(k, mask.key_segments))
    values = tiling.keys_apart(zero_where_padded(v, mask.key_segments))
    per_group = queries.shape[3] // tiling.queries
    numbers = (tiling.rows, groups, per_group, tiling.queries)

    def one_tile(i):
        def visit(n, state):
            top, total, mixed = state
            j = visits.order[i, n]
            products = jnp.einsum("rkqd,rksd->rkqs", queries[i], keys[j], preferred_element_type=wide)
            _, logits = tiles.logits(products, i, j, terms)
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights = jnp.exp(logits - higher[..., None])
            kept = jnp.exp(top - higher)
            total = total * kept + weights.sum(axis=-1)
            weights = weights.reshape(products.shape).astype(v.dtype)
            new = jnp.einsum("rkqs,rksd->rkqd", weights, values[j], preferred_element_type=wide)
            return higher, total, mixed * kept.reshape(*mixed.shape[:3], 1) + new

        # Far above a hidden logit, so that a query without keys has weights of exactly 0.
        top = jnp.full(numbers, HIDDEN / 2, wide)
        state = top, jnp.zeros(numbers, wide), jnp.zeros((*queries.shape[1:4], v.shape[-1]), wide)
        top, total, mixed = jax.lax.fori_loop(0, visits.seen[i], visit, state)
        if terms.sink_logits is not None:
            sink = terms.sink_logits.astype(wide).reshape(1, groups, per_group, 1)
            higher = jnp.maximum(top, sink)
            kept = jnp.exp(top - higher)
            top, total, mixed = higher, total * kept + jnp.exp(sink - higher), mixed * kept.reshape(*mixed.shape[:3], 1)
        empty = total == 0.0
        divisor = jnp.where(empty, 1.0, total)
        lse = jnp.where(empty, HIDDEN, top + jnp.log(divisor))
        return (mixed / divisor.reshape(*mixed.shape[:3], 1)).astype(q.dtype), lse

    out, lse = jax.lax.map(one_tile, jnp.arange(queries.shape[0]))
    return tiling.queries_joined(out, q), tiling.numbers_joined(lse, q)
