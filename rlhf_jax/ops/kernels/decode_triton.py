"""Split decoding through Pallas:Triton: one program per row, key head and share of the visible tiles of the cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import decode, tiles, triton_attention
from rlhf_jax.ops.kernels.decode import Split, Step
from rlhf_jax.ops.kernels.tiles import KEY_SEGMENT, product


def refusal(case: Case) -> str | None:
    """Why the kernel cannot serve, or None."""
    if case.platform != "gpu":
        return f"it is written for GPUs, and JAX runs on {case.platform!r}"
    if case.dtype not in ("bfloat16", "float16", "float32"):
        return f"it takes bfloat16, float16 or float32, not {case.dtype}"
    for width in (case.width, case.value_width):
        if width != triton_attention.power_of_two(width):
            return f"it reads caches whose heads are a power of two from 16 wide, got {width}"
    entries = case.rows * case.kv_heads * case.slots * max(case.width, case.value_width)
    if entries > triton_attention.FARTHEST:
        return f"its offsets of 32 bits reach caches of at most {triton_attention.FARTHEST} entries, got {entries}"
    return decode.refused_shape(case, 256) or triton_attention.missing()


def attend(
    q: Float[Array, "B H D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    mask: Mask,
    terms: Terms,
    *,
    tile: int | None = None,
    programs: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B H Dv"]:
    """The output of one query a row.

    Args:
        q: queries.
        keys: of the cache; ``H`` is a multiple of ``K``.
        values: of the cache.
        mask: which slots each row sees.
        terms: what the logits are besides products.
        tile: slots of a tile, a power of two from 16; None to choose.
        programs: how many share the cache of one key head; None to choose.
        interpret: compute with ordinary operations, on any device.
    """
    if not interpret:
        triton_attention.ignore_the_deprecation()
    if tile is None:
        tile = 64 if keys.shape[3] * keys.dtype.itemsize <= 256 else 32
    if programs is None:
        programs = decode.programs_for(keys.shape[0], keys.shape[1])
    rows = triton_attention.power_of_two(q.shape[1] // keys.shape[1])
    split, step = decode.prepare(
        q, keys, values, mask, terms, tile=tile, rows=rows, programs=programs, interpret=interpret
    )
    parts, logs = _parts(split, step)
    return decode.merged(parts, logs, terms, q.shape[1], q.dtype)


def _kernel(
    q, keys, values, positions, segments, facts, order, partial, total, slopes, out, lse, *, split: Split, slots: int
):  # fmt: skip
    from jax.experimental import pallas as pl

    program, programs = pl.program_id(0), pl.num_programs(0)
    first = total[...] * program // programs
    last = total[...] * (program + 1) // programs
    own = q[...]
    query = facts[0], facts[1], facts[2], facts[3]
    slope = slopes[...][:, None] if split.plan.sloped else None

    def visit(masked: bool, at, carry):
        top, whole, mixed = carry
        wanted = order[at] * split.tile
        # The last tile of a cache that is no multiple of tiles overlaps the one before.
        start = jnp.minimum(wanted, slots - split.tile)
        window = pl.ds(start, split.tile)
        facts_of_keys = [positions[window][None, :], segments[window][None, :]]
        if masked:
            again = start + jax.lax.iota(jnp.int32, split.tile) < wanted
            facts_of_keys[KEY_SEGMENT] = jnp.where(again[None, :], -1, facts_of_keys[KEY_SEGMENT])
        products = product(own, keys[window, :], (1, 1))
        logits, _ = tiles.tile_logits(split.plan, products, query, facts_of_keys, slope, masked)
        after = jnp.maximum(top, logits.max(axis=1))
        weights = jnp.exp(logits - after[:, None])
        decay = jnp.exp(top - after)
        mixed = decay[:, None] * mixed + product(weights.astype(values.dtype), values[window, :], (1, 0))
        return after, decay * whole + weights.sum(axis=1), mixed

    top = jnp.full(split.rows, HIDDEN / 2, jnp.float32)
    carry = top, jnp.zeros(split.rows, jnp.float32), jnp.zeros(out.shape, jnp.float32)
    edge = jnp.clip(partial[...], first, last)
    carry = jax.lax.fori_loop(first, edge, functools.partial(visit, True), carry)
    top, whole, mixed = jax.lax.fori_loop(edge, last, functools.partial(visit, False), carry)
    divisor = jnp.where(whole == 0.0, 1.0, whole)
    out[...] = mixed / divisor[:, None]
    lse[...] = jnp.where(whole == 0.0, HIDDEN, top + jnp.log(divisor))


def _parts(split: Split, step: Step):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, groups, slots, width = step.keys.shape
    value_width, count = step.values.shape[3], step.order.shape[1]

    def cache(program, group, row):
        return row, group, 0, 0

    def of_row(program, group, row):
        return row, 0

    def part(program, group, row):
        return row, group, program, 0, 0

    return pl.pallas_call(
        functools.partial(_kernel, split=split, slots=slots),
        grid=(split.programs, groups, rows),
        in_specs=[
            pl.BlockSpec((None, None, split.rows, width), cache),
            pl.BlockSpec((None, None, slots, width), cache),
            pl.BlockSpec((None, None, slots, value_width), cache),
            pl.BlockSpec((None, slots), of_row),
            pl.BlockSpec((None, slots), of_row),
            pl.BlockSpec((None, 4), of_row),
            pl.BlockSpec((None, count), of_row),
            pl.BlockSpec((None,), lambda program, group, row: (row,)),
            pl.BlockSpec((None,), lambda program, group, row: (row,)),
            pl.BlockSpec((None, split.rows), lambda program, group, row: (group, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, split.rows, value_width), part),
            pl.BlockSpec((None, None, None, split.rows), lambda *at: part(*at)[:4]),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, groups, split.programs, split.rows, value_width), jnp.float32),
            jax.ShapeDtypeStruct((rows, groups, split.programs, split.rows), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=split.plan.interpret,
        name="attention_decode",
    )(
        step.q, step.keys, step.values, step.positions, step.segments, step.facts,
        step.order, step.partial, step.total, step.slopes,
    )  # fmt: skip
