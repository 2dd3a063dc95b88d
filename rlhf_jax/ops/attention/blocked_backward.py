"""The gradient of ``blocked``: five products a tile, in the order of the key tiles, so that every run adds alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops.attention.blocked_tiles import Tiles, Tiling, Visits, zero_where_padded
from rlhf_jax.ops.attention.terms import HIDDEN


def backward(tiling: Tiling, residuals, cotangents):
    """Cotangents of (q, k, v, mask, terms) from those of (out, lse).

    With ``p`` the weights and ``delta = sum(dout * out) - dlse``: ``dv = p^T dout``, ``dlogits = p (dout v^T - delta)``
    (arXiv 2205.14135, Appendix B.2; the log-sum-exp has the gradient ``p``). A sink's weight has no value, so its logit
    gets ``-p_sink delta``. Gradients are summed in fp32 or wider.
    """
    q, k, v, mask, terms, out, lse = residuals
    dout, dlse = cotangents
    groups = k.shape[2]
    wide = lse.dtype
    real = mask.query_segments
    dout = zero_where_padded(dout, real)
    delta = jnp.einsum("bthd,bthd->bth", dout.astype(wide), out.astype(wide)) - dlse

    tiles = Tiles.of(mask, tiling)
    visits = Visits.of(tiles.blocks.swapaxes(1, 2))
    queries = tiling.queries_apart(zero_where_padded(q, real), groups)
    douts = tiling.queries_apart(dout, groups)
    deltas = tiling.numbers_apart(jnp.where((real != 0)[..., None], delta, 0.0), groups)
    # Far above the hidden logits of a query without keys, so that its weights are exactly 0.
    lses = tiling.numbers_apart(jnp.where(lse == HIDDEN, 0.0, lse), groups)
    keys = tiling.keys_apart(zero_where_padded(k, mask.key_segments))
    values = tiling.keys_apart(zero_where_padded(v, mask.key_segments))

    def one_tile(dqueries, j):
        def visit(n, state):
            dqueries, dkey, dvalue = state
            i = visits.order[j, n]
            products = jnp.einsum("rkqd,rksd->rkqs", queries[i], keys[j], preferred_element_type=wide)
            plain, logits = tiles.logits(products, i, j, terms)
            weights = jnp.exp(logits - lses[i][..., None])
            dweights = jnp.einsum("rkqd,rksd->rkqs", douts[i], values[j], preferred_element_type=wide)
            dlogits = weights * (dweights.reshape(weights.shape) - deltas[i][..., None])
            dproducts = terms.logits_gradient(plain, dlogits).reshape(products.shape).astype(q.dtype)
            weights = weights.reshape(products.shape).astype(v.dtype)
            # The gradients of keys and values stand on their sides: a CPU multiplies so three times faster.
            dvalue = dvalue + jnp.einsum("rkqd,rkqs->rkds", douts[i], weights, preferred_element_type=wide)
            dkey = dkey + jnp.einsum("rkqd,rkqs->rkds", queries[i], dproducts, preferred_element_type=wide)
            dquery = jnp.einsum("rkqs,rksd->rkqd", dproducts, keys[j], preferred_element_type=wide)
            return dqueries.at[i].add(dquery), dkey, dvalue

        state = dqueries, *(jnp.zeros((*x.shape[1:3], x.shape[4], x.shape[3]), wide) for x in (keys, values))
        dqueries, dkey, dvalue = jax.lax.fori_loop(0, visits.seen[j], visit, state)
        return dqueries, (dkey.astype(k.dtype), dvalue.astype(v.dtype))

    dqueries = jnp.zeros(queries.shape, wide)
    dqueries, (dkeys, dvalues) = jax.lax.scan(one_tile, dqueries, jnp.arange(keys.shape[0]))
    dterms = jax.tree.map(jnp.zeros_like, terms)
    if terms.sink_logits is not None:
        sink = terms.sink_logits.astype(wide)
        dsink = -(jnp.exp(sink - lse) * delta).sum(axis=(0, 1))
        dterms = dterms.replace(sink_logits=dsink.astype(terms.sink_logits.dtype))
    return (
        tiling.queries_joined(dqueries, q),
        tiling.keys_joined(dkeys, k),
        tiling.keys_joined(dvalues, v),
        None,
        dterms,
    )
