"""Flash attention for TPUs: one pass over the tiles of keys that a tile of queries can see.

The grid runs over rows, query heads, tiles of queries and steps; which tile of keys a step loads is read from a list in
scalar memory, so invisible tiles are neither loaded nor computed. Tiles are transposed, keys along sublanes and queries
along lanes: the running maximum and sum are then dense rows, and so is the log-sum-exp that is kept for the gradient.
Not measured on a TPU yet.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import tiles
from rlhf_jax.ops.kernels.tiles import Plan, Scene, Visits, product

LANES = 128
LARGEST_TILE = 512
SCALAR_ENTRIES = 1 << 16
"""Entries of the list of tiles that are let into scalar memory, a quarter of the smallest one in use."""


def refusal(case: Case) -> str | None:
    """Why the kernel cannot serve, or None."""
    if case.platform != "tpu":
        return f"it is written for TPUs, and JAX runs on {case.platform!r}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 or float32, not {case.dtype}"
    if max(case.width, case.value_width) > 256:
        return f"heads are at most 256 wide, got {case.width} and {case.value_width}"
    query_tile, key_tile = _tile(case.length), _tile(case.slots)
    entries = case.rows * -(-case.length // query_tile) * -(-case.slots // key_tile)
    if entries > SCALAR_ENTRIES:
        return f"its list of {entries} tiles is longer than {SCALAR_ENTRIES}; take fewer rows or shorter ones at a time"
    return None


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    tile: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and the log of each query's sum of exponentials, in fp32.

    Args:
        q: queries.
        k: keys; ``H`` is a multiple of ``K``.
        v: values.
        mask: who sees whom.
        terms: what the logits are besides products.
        tile: length of the tiles of queries and keys, a multiple of 128 on a device; None to choose.
        interpret: compute with ordinary operations, on any device.
    """
    length, heads = q.shape[1:3]
    query_tile, key_tile = (_tile(x) if tile is None else tile for x in (length, k.shape[1]))
    plan = Plan.of(mask, terms, query_tile, key_tile, head_axis=1, interpret=interpret)
    scene = tiles.scene(plan, mask, terms, heads)
    arrays = [
        tiles.padded(x.swapaxes(1, 2), 2, tile)
        for x, tile in ((q, query_tile), (k, key_tile), (v, key_tile))
    ]  # fmt: skip
    out, lse = _attend(plan, *arrays, tiles.sinks_of(terms, heads), scene)
    return out[:, :, :length].swapaxes(1, 2), lse[:, :, :length].swapaxes(1, 2)


def _tile(length: int) -> int:
    return min(LARGEST_TILE, -(-length // LANES) * LANES)


def visited(lists: tuple[Array, Array, Array], row, tile, tile_count: int, step, steps: int):
    """The tile that a step loads: past the end of the list the last one again, which costs no transfer.

    Args:
        lists: ``prefetched``.
        row: of the batch.
        tile: which has to visit others.
        tile_count: number of such tiles in a row.
        step: of the visit.
        steps: length of each list.
    """
    order, _, total = lists
    at = row * tile_count + tile
    return order[at * steps + jnp.minimum(step, jnp.maximum(total[at] - 1, 0))]


def prefetched(visits: Visits) -> tuple[Array, Array, Array]:
    """The lists of tiles, flat, because scalar memory pads every axis but the first."""
    return visits.order.reshape(-1), visits.partial.reshape(-1), visits.total.reshape(-1)


def scene_of(queries, keys):
    """Rows of query facts and columns of key facts, as they broadcast against a transposed tile."""
    return tuple(queries[0, at : at + 1, :] for at in range(4)), tuple(keys[0, :, at : at + 1] for at in range(2))


def branches(step, partial, total, visit):
    """Run ``visit(masked)`` in the form that this step needs, if any."""
    from jax.experimental import pallas as pl

    pl.when(step < partial)(functools.partial(visit, True))
    pl.when((step >= partial) & (step < total))(functools.partial(visit, False))


def _kernel(
    order, partial, total, q, k, v, queries, keys, slopes, sinks, out, lse, top, sums, mixed, *, plan: Plan
):  # fmt: skip
    from jax.experimental import pallas as pl

    row, head, tile, step = (pl.program_id(axis) for axis in range(4))
    tile_count, steps = pl.num_programs(2), pl.num_programs(3)
    at = row * tile_count + tile

    @pl.when(step == 0)
    def _():
        # Far above a hidden logit, so that a row without keys has weights of exactly 0.
        top[...] = jnp.full_like(top, HIDDEN / 2)
        sums[...] = jnp.zeros_like(sums)
        mixed[...] = jnp.zeros_like(mixed)

    def visit(masked: bool):
        products = product(k[0, 0], q[0, 0], (1, 1))
        slope = slopes[0, head] if plan.sloped else None
        logits, _ = tiles.tile_logits(plan, products, *scene_of(queries, keys), slope, masked)
        before = top[...]
        after = jnp.maximum(before, logits.max(axis=0, keepdims=True))
        weights = jnp.exp(logits - after)
        decay = jnp.exp(before - after)
        top[...] = after
        sums[...] = decay * sums[...] + weights.sum(axis=0, keepdims=True)
        mixed[...] = decay * mixed[...] + product(v[0, 0], weights.astype(v.dtype), (0, 0))

    branches(step, partial[at], total[at], visit)

    @pl.when(step == steps - 1)
    def _():
        before = top[...]
        after = jnp.maximum(before, sinks[0, head])
        decay = jnp.exp(before - after)
        whole = sums[...] * decay + jnp.exp(sinks[0, head] - after)
        empty = whole == 0.0
        divisor = jnp.where(empty, 1.0, whole)
        out[0, 0] = (mixed[...] * (decay / divisor)).T.astype(out.dtype)
        lse[0, 0] = jnp.where(empty, HIDDEN, after + jnp.log(divisor))


def _forward(plan: Plan, q, k, v, sinks, scene: Scene):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, heads, length, width = q.shape
    groups, _, value_width = v.shape[1:]
    per_group = heads // groups
    visits = scene.by_query(plan)
    tile_count, steps = visits.order.shape[1:]

    def of_query(row, head, tile, step, *lists):
        return row, head, tile, 0

    def of_key(row, head, tile, step, *lists):
        return row, jax.lax.div(head, per_group), visited(lists, row, tile, tile_count, step, steps), 0

    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, heads, tile_count, steps),
            in_specs=[
                pl.BlockSpec((1, 1, plan.query_tile, width), of_query),
                pl.BlockSpec((1, 1, plan.key_tile, width), of_key),
                pl.BlockSpec((1, 1, plan.key_tile, value_width), of_key),
                pl.BlockSpec((1, 4, plan.query_tile), lambda row, head, tile, *_: (row, 0, tile)),
                pl.BlockSpec((1, plan.key_tile, 2), lambda *at: (at[0], of_key(*at)[2], 0)),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(memory_space=pltpu.SMEM),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, plan.query_tile, value_width), of_query),
                pl.BlockSpec((1, 1, 1, plan.query_tile), lambda row, head, tile, *_: (row, head, 0, tile)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, plan.query_tile), jnp.float32),
                pltpu.VMEM((1, plan.query_tile), jnp.float32),
                pltpu.VMEM((value_width, plan.query_tile), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads, length, value_width), q.dtype),
            jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=plan.interpret,
        name="attention_forward",
    )(*prefetched(visits), q, k, v, scene.queries, scene.keys.swapaxes(1, 2), scene.slopes[None], sinks[None])
    return out, lse[:, :, 0]


def _backward(plan: Plan, q, k, v, scene: Scene, lse, delta, cotangent):
    from rlhf_jax.ops.kernels import tpu_attention_backward

    return tpu_attention_backward.gradients(plan, q, k, v, scene, lse, delta, cotangent)


_attend = tiles.differentiable(_forward, _backward)
