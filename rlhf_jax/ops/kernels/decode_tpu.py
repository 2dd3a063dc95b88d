"""Decoding on TPUs: one pass over the tiles of the cache that a row can see, for all query heads of a key head at once.

A TPU has one or two cores, so the cache is not split: the next tile is loaded while one is computed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import decode, tiles, tpu_attention
from rlhf_jax.ops.kernels.decode import Split, Step
from rlhf_jax.ops.kernels.tiles import KEY_SEGMENT, product

TILE = 512
SUBLANES = 16


def refusal(case: Case) -> str | None:
    """Why the kernel cannot serve, or None."""
    if case.platform != "tpu":
        return f"it is written for TPUs, and JAX runs on {case.platform!r}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 or float32, not {case.dtype}"
    entries = case.rows * -(-case.slots // TILE)
    if entries > tpu_attention.SCALAR_ENTRIES:
        return f"its list of {entries} tiles is longer than {tpu_attention.SCALAR_ENTRIES}; decode fewer rows at a time"
    return decode.refused_shape(case, 256)


def attend(
    q: Float[Array, "B H D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    mask: Mask,
    terms: Terms,
    *,
    tile: int = TILE,
    interpret: bool = False,
) -> Float[Array, "B H Dv"]:
    """The output of one query a row.

    Args:
        q: queries.
        keys: of the cache; ``H`` is a multiple of ``K``.
        values: of the cache.
        mask: which slots each row sees.
        terms: what the logits are besides products.
        tile: slots of a tile, a multiple of 128 on a device.
        interpret: compute with ordinary operations, on any device.
    """
    split, step = decode.prepare(
        q, keys, values, mask, terms, tile=tile, rows=SUBLANES, programs=1, interpret=interpret
    )  # fmt: skip
    parts, logs = _parts(split, step)
    return decode.merged(parts, logs, terms, q.shape[1], q.dtype)


def _kernel(
    order, partial, total, facts, q, keys, values, positions, segments, slopes, out, lse, top, sums, mixed,
    *, split: Split, slots: int,
):  # fmt: skip
    from jax.experimental import pallas as pl

    row, step, steps = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    query = [facts[row * 4 + at] for at in range(4)]
    place = order[row * steps + step] * split.tile

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, HIDDEN / 2)
        sums[...] = jnp.zeros_like(sums)
        mixed[...] = jnp.zeros_like(mixed)

    def visit(masked: bool):
        key, value = keys[0, 0], values[0, 0]
        facts_of_keys = [positions[0], segments[0]]
        if masked and slots % split.tile:
            # What lies behind the end of the cache is undefined, and a weight of 0 does not undo NaN.
            inside = place + jax.lax.broadcasted_iota(jnp.int32, (1, split.tile), 1) < slots
            facts_of_keys[KEY_SEGMENT] = jnp.where(inside, facts_of_keys[KEY_SEGMENT], -1)
            inside = place + jax.lax.broadcasted_iota(jnp.int32, (split.tile, 1), 0) < slots
            value = jnp.where(inside, value.astype(jnp.float32), 0.0).astype(value.dtype)
        slope = slopes[0] if split.plan.sloped else None
        logits, _ = tiles.tile_logits(split.plan, product(q[0, 0], key, (1, 1)), query, facts_of_keys, slope, masked)
        before = top[...]
        after = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        weights = jnp.exp(logits - after)
        decay = jnp.exp(before - after)
        top[...] = after
        sums[...] = decay * sums[...] + weights.sum(axis=1, keepdims=True)
        mixed[...] = decay * mixed[...] + product(weights.astype(value.dtype), value, (1, 0))

    tpu_attention.branches(step, partial[row], total[row], visit)

    @pl.when(step == steps - 1)
    def _():
        divisor = jnp.where(sums[...] == 0.0, 1.0, sums[...])
        out[0, 0, 0] = mixed[...] / divisor
        lse[0, 0, 0] = jnp.where(sums[...] == 0.0, HIDDEN, top[...] + jnp.log(divisor))


def _parts(split: Split, step: Step):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, groups, slots, width = step.keys.shape
    value_width, steps = step.values.shape[3], step.order.shape[1]

    def tile_of(row, group, at, order, partial, total, facts):
        return order[row * steps + jnp.minimum(at, jnp.maximum(total[row] - 1, 0))]

    def cache(row, group, at, *lists):
        return row, group, tile_of(row, group, at, *lists), 0

    def part(row, group, at, *lists):
        return row, group, 0, 0, 0

    parts, logs = pl.pallas_call(
        functools.partial(_kernel, split=split, slots=slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(rows, groups, steps),
            in_specs=[
                pl.BlockSpec((1, 1, split.rows, width), lambda row, group, *_: (row, group, 0, 0)),
                pl.BlockSpec((1, 1, split.tile, width), cache),
                pl.BlockSpec((1, 1, split.tile, value_width), cache),
                pl.BlockSpec((1, 1, split.tile), lambda *at: (at[0], 0, tile_of(*at))),
                pl.BlockSpec((1, 1, split.tile), lambda *at: (at[0], 0, tile_of(*at))),
                pl.BlockSpec((1, split.rows, 1), lambda row, group, *_: (group, 0, 0)),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, 1, split.rows, value_width), part),
                pl.BlockSpec((1, 1, 1, split.rows, 1), part),
            ],
            scratch_shapes=[
                pltpu.VMEM((split.rows, 1), jnp.float32),
                pltpu.VMEM((split.rows, 1), jnp.float32),
                pltpu.VMEM((split.rows, value_width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, groups, 1, split.rows, value_width), jnp.float32),
            jax.ShapeDtypeStruct((rows, groups, 1, split.rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=split.plan.interpret,
        name="attention_decode",
    )(
        step.order.reshape(-1), step.partial, step.total, step.facts.reshape(-1),
        step.q, step.keys, step.values, step.positions[:, None], step.segments[:, None], step.slopes[:, :, None],
    )  # fmt: skip
    return parts, logs[..., 0]
