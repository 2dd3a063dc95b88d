"""The gradient of ``triton_attention``: one kernel for the queries, one for keys and values.

Both recompute the weights of the visible tiles from the saved log-sum-exp. The second loops over the query heads of its
key head, so each gradient is written once, always in the same order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.ops.kernels import tiles
from rlhf_jax.ops.kernels.tiles import Plan, Scene, product
from rlhf_jax.ops.kernels.triton_attention import facts, list_specs, visit_all, warps


def _queries_kernel(q, k, v, d_out, lse, delta, queries, keys, order, partial, total, slopes, dq, *, plan: Plan):
    from jax.experimental import pallas as pl

    own, own_cotangent, own_lse, own_delta = q[...], d_out[...], lse[...][:, None], delta[...][:, None]
    slope = slopes[...] if plan.sloped else None

    def visit(masked: bool, tile, summed):
        start = tile * plan.key_tile
        slots = pl.ds(start, plan.key_tile)
        key = k[slots, :]
        logits, plain = tiles.tile_logits(
            plan, product(own, key, (1, 1)), *facts(queries, keys, start, True, plan.key_tile), slope, masked
        )
        d_logits = jnp.exp(logits - own_lse) * (product(own_cotangent, v[slots, :], (1, 1)) - own_delta)
        return summed + product(plan.terms.logits_gradient(plain, d_logits).astype(key.dtype), key, (1, 0))

    dq[...] = visit_all(order, partial, total, visit, jnp.zeros(dq.shape, jnp.float32)).astype(dq.dtype)


def _keys_kernel(q, k, v, d_out, lse, delta, queries, keys, order, partial, total, slopes, dk, dv, *, plan: Plan):
    from jax.experimental import pallas as pl

    key, value = k[...], v[...]

    def of_head(head, carry):
        slope = slopes[head] if plan.sloped else None

        def visit(masked: bool, tile, carry):
            summed_k, summed_v = carry
            start = tile * plan.query_tile
            tokens = pl.ds(start, plan.query_tile)
            query, cotangent = q[tokens, head, :], d_out[tokens, head, :]
            logits, plain = tiles.tile_logits(
                plan, product(key, query, (1, 1)), *facts(queries, keys, start, False, plan.query_tile), slope, masked
            )
            weights = jnp.exp(logits - lse[tokens, head][None, :])
            summed_v += product(weights.astype(cotangent.dtype), cotangent, (1, 0))
            d_logits = weights * (product(value, cotangent, (1, 1)) - delta[tokens, head][None, :])
            summed_k += product(plan.terms.logits_gradient(plain, d_logits).astype(query.dtype), query, (1, 0))
            return summed_k, summed_v

        return visit_all(order, partial, total, visit, carry)

    empty = jnp.zeros(dk.shape, jnp.float32), jnp.zeros(dv.shape, jnp.float32)
    summed_k, summed_v = jax.lax.fori_loop(0, q.shape[1], of_head, empty)
    dk[...] = summed_k.astype(dk.dtype)
    dv[...] = summed_v.astype(dv.dtype)


def gradients(plan: Plan, q, k, v, scene: Scene, lse, delta, cotangent):
    """Gradients of q, k and v, all [B, length, heads, width]; ``lse`` and ``delta`` are [B, T, H]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, length, heads, width = q.shape
    _, slots, groups, value_width = v.shape
    per_group = heads // groups
    inputs = (q, k, v, cotangent.astype(q.dtype), lse, delta, scene.queries, scene.keys)

    def of_query(tile, head, row):
        return row, tile, head, 0

    def all_keys(tile, head, row):
        return row, 0, head // per_group, 0

    by_query = scene.by_query(plan)
    dq = pl.pallas_call(
        functools.partial(_queries_kernel, plan=plan),
        grid=(length // plan.query_tile, heads, rows),
        in_specs=[
            pl.BlockSpec((None, plan.query_tile, None, width), of_query),
            pl.BlockSpec((None, slots, None, width), all_keys),
            pl.BlockSpec((None, slots, None, value_width), all_keys),
            pl.BlockSpec((None, plan.query_tile, None, value_width), of_query),
            pl.BlockSpec((None, plan.query_tile, None), lambda tile, head, row: (row, tile, head)),
            pl.BlockSpec((None, plan.query_tile, None), lambda tile, head, row: (row, tile, head)),
            pl.BlockSpec((None, 4, plan.query_tile), lambda tile, head, row: (row, 0, tile)),
            pl.BlockSpec((None, 2, slots), lambda tile, head, row: (row, 0, 0)),
            *list_specs(by_query),
            pl.BlockSpec((None,), lambda tile, head, row: (head,)),
        ],
        out_specs=pl.BlockSpec((None, plan.query_tile, None, width), of_query),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps(plan.query_tile), num_stages=2),
        interpret=plan.interpret,
        name="attention_queries_gradient",
    )(*inputs, by_query.order, by_query.partial, by_query.total, scene.slopes)

    def of_key(tile, group, row):
        return row, tile, group, 0

    def all_queries(tile, group, row):
        return row, 0, group, 0

    def all_queries_vector(tile, group, row):
        return row, 0, group

    by_key = scene.by_key(plan)
    dk, dv = pl.pallas_call(
        functools.partial(_keys_kernel, plan=plan),
        grid=(slots // plan.key_tile, groups, rows),
        in_specs=[
            pl.BlockSpec((None, length, per_group, width), all_queries),
            pl.BlockSpec((None, plan.key_tile, None, width), of_key),
            pl.BlockSpec((None, plan.key_tile, None, value_width), of_key),
            pl.BlockSpec((None, length, per_group, value_width), all_queries),
            pl.BlockSpec((None, length, per_group), all_queries_vector),
            pl.BlockSpec((None, length, per_group), all_queries_vector),
            pl.BlockSpec((None, 4, length), lambda tile, group, row: (row, 0, 0)),
            pl.BlockSpec((None, 2, plan.key_tile), lambda tile, group, row: (row, 0, tile)),
            *list_specs(by_key),
            pl.BlockSpec((per_group,), lambda tile, group, row: (group,)),
        ],
        out_specs=[
            pl.BlockSpec((None, plan.key_tile, None, width), of_key),
            pl.BlockSpec((None, plan.key_tile, None, value_width), of_key),
        ],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=triton.CompilerParams(num_warps=warps(plan.key_tile), num_stages=2),
        interpret=plan.interpret,
        name="attention_keys_gradient",
    )(*inputs, by_key.order, by_key.partial, by_key.total, scene.slopes)
    return dq, dk, dv
