"""The gradient of ``tpu_attention``: one kernel for the queries, one for keys and values.

Both recompute the weights of the visible tiles from the saved log-sum-exp. The second sums over the query heads of a
key head inside the kernel, so each gradient is written once, always in the same order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.ops.kernels import tiles
from rlhf_jax.ops.kernels.tiles import Plan, Scene, product
from rlhf_jax.ops.kernels.tpu_attention import branches, prefetched, scene_of, visited


def _tile_gradient(plan: Plan, q, k, v, d_out, facts, slope, lse, delta, masked: bool):
    """Weights and the cotangent of the unscaled products of one transposed tile."""
    logits, plain = tiles.tile_logits(plan, product(k, q, (1, 1)), facts[0], facts[1], slope, masked)
    weights = jnp.exp(logits - lse)
    d_logits = weights * (product(v, d_out, (1, 1)) - delta)
    return weights, plan.terms.logits_gradient(plain, d_logits)


def _queries_kernel(
    order, partial, total, q, k, v, d_out, lse, delta, queries, keys, slopes, dq, summed, *, plan: Plan
):  # fmt: skip
    from jax.experimental import pallas as pl

    row, head, tile, step = (pl.program_id(axis) for axis in range(4))
    tile_count, steps = pl.num_programs(2), pl.num_programs(3)
    at = row * tile_count + tile

    @pl.when(step == 0)
    def _():
        summed[...] = jnp.zeros_like(summed)

    def visit(masked: bool):
        _, d_products = _tile_gradient(
            plan, q[0, 0], k[0, 0], v[0, 0], d_out[0, 0], scene_of(queries, keys),
            slopes[0, head] if plan.sloped else None,
            lse[0, 0], delta[0, 0], masked,
        )  # fmt: skip
        summed[...] += product(d_products.astype(k.dtype), k[0, 0], (0, 0))

    branches(step, partial[at], total[at], visit)

    @pl.when(step == steps - 1)
    def _():
        dq[0, 0] = summed[...].astype(dq.dtype)


def _keys_kernel(
    order, partial, total, q, k, v, d_out, lse, delta, queries, keys, slopes, dk, dv, summed_k, summed_v,
    *, plan: Plan, steps: int,
):  # fmt: skip
    from jax.experimental import pallas as pl

    row, group, tile, number = (pl.program_id(axis) for axis in range(4))
    tile_count, numbers = pl.num_programs(2), pl.num_programs(3)
    at, step = row * tile_count + tile, jax.lax.rem(number, steps)
    head = group * jax.lax.div(numbers, steps) + jax.lax.div(number, steps)

    @pl.when(number == 0)
    def _():
        summed_k[...] = jnp.zeros_like(summed_k)
        summed_v[...] = jnp.zeros_like(summed_v)

    def visit(masked: bool):
        weights, d_products = _tile_gradient(
            plan, q[0, 0], k[0, 0], v[0, 0], d_out[0, 0], scene_of(queries, keys),
            slopes[0, head] if plan.sloped else None,
            lse[0, 0], delta[0, 0], masked,
        )  # fmt: skip
        summed_v[...] += product(weights.astype(d_out.dtype), d_out[0, 0], (1, 0))
        summed_k[...] += product(d_products.astype(q.dtype), q[0, 0], (1, 0))

    branches(step, partial[at], total[at], visit)

    @pl.when(number == numbers - 1)
    def _():
        dk[0, 0] = summed_k[...].astype(dk.dtype)
        dv[0, 0] = summed_v[...].astype(dv.dtype)


def gradients(plan: Plan, q, k, v, scene: Scene, lse, delta, cotangent):
    """Gradients of q, k and v, all [B, heads, length, width]; ``lse`` and ``delta`` are [B, H, T]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, heads, length, width = q.shape
    groups, _, value_width = v.shape[1:]
    per_group = heads // groups
    query_tiles, key_tiles = length // plan.query_tile, k.shape[2] // plan.key_tile
    vectors = [x[:, :, None, :] for x in (lse, delta)]
    inputs = (
        q,
        k,
        v,
        cotangent.astype(q.dtype),
        *vectors,
        scene.queries,
        scene.keys.swapaxes(1, 2),
        scene.slopes[None],
    )

    def specs(query_at, key_at):
        """Blocks of all inputs, given the (row, head, tile) of queries and of keys at each point of the grid."""

        def query_vector(*at):
            row, head, tile = query_at(*at)
            return row, head, 0, tile

        return [
            pl.BlockSpec((1, 1, plan.query_tile, width), lambda *at: (*query_at(*at), 0)),
            pl.BlockSpec((1, 1, plan.key_tile, width), lambda *at: (*key_at(*at), 0)),
            pl.BlockSpec((1, 1, plan.key_tile, value_width), lambda *at: (*key_at(*at), 0)),
            pl.BlockSpec((1, 1, plan.query_tile, value_width), lambda *at: (*query_at(*at), 0)),
            pl.BlockSpec((1, 1, 1, plan.query_tile), query_vector),
            pl.BlockSpec((1, 1, 1, plan.query_tile), query_vector),
            pl.BlockSpec((1, 4, plan.query_tile), lambda *at: (at[0], 0, query_at(*at)[2])),
            pl.BlockSpec((1, plan.key_tile, 2), lambda *at: (at[0], key_at(*at)[2], 0)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ]

    semantics = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",))

    def own(row, head, tile, step, *lists):
        return row, head, tile

    def keys_of(row, head, tile, step, *lists):
        return row, jax.lax.div(head, per_group), visited(lists, row, tile, query_tiles, step, key_tiles)

    dq = pl.pallas_call(
        functools.partial(_queries_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, heads, query_tiles, key_tiles),
            in_specs=specs(own, keys_of),
            out_specs=pl.BlockSpec((1, 1, plan.query_tile, width), lambda *at: (*own(*at), 0)),
            scratch_shapes=[pltpu.VMEM((plan.query_tile, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=semantics,
        interpret=plan.interpret,
        name="attention_queries_gradient",
    )(*prefetched(scene.by_query(plan)), *inputs)

    def queries_of(row, group, tile, number, *lists):
        head = group * per_group + jax.lax.div(number, query_tiles)
        return row, head, visited(lists, row, tile, key_tiles, jax.lax.rem(number, query_tiles), query_tiles)

    dk, dv = pl.pallas_call(
        functools.partial(_keys_kernel, plan=plan, steps=query_tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, groups, key_tiles, per_group * query_tiles),
            in_specs=specs(queries_of, own),
            out_specs=[
                pl.BlockSpec((1, 1, plan.key_tile, width), lambda *at: (*own(*at), 0)),
                pl.BlockSpec((1, 1, plan.key_tile, value_width), lambda *at: (*own(*at), 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((plan.key_tile, width), jnp.float32),
                pltpu.VMEM((plan.key_tile, value_width), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=semantics,
        interpret=plan.interpret,
        name="attention_keys_gradient",
    )(*prefetched(scene.by_key(plan)), *inputs)
    return dq, dk, dv
