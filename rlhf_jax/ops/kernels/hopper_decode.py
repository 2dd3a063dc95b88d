"""Split decoding on Hopper: one block of the grid per row, key head and share of the visible tiles of the cache.

One warpgroup computes, with the query heads of the key head as rows of its products; another loads tiles of keys and
values some steps ahead by TMA, which is what keeps the memory busy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import decode, hopper_attention
from rlhf_jax.ops.kernels.decode import Split, Step
from rlhf_jax.ops.kernels.hopper_pieces import (
    KEY_POSITION,
    KEY_SEGMENT,
    LOG2E,
    NOWHERE,
    ROWS,
    Plan,
    add_products,
    filled,
    spread,
    tiled,
    zeros,
)
from rlhf_jax.ops.kernels.tiles import padded

TILE = 64
"""Slots of one step: what one product with values in shared memory takes."""
DEPTH = 3
"""Steps whose keys and values are in shared memory at once."""


def refusal(case: Case) -> str | None:
    """Why the kernel cannot serve, or None."""
    for width in (case.width, case.value_width):
        if width not in (64, 128):
            return f"it reads caches whose heads are 64 or 128 wide, got {width}"
    if case.slots > TILE and case.slots % 8:
        return f"it loads 8 slots at once, and {case.slots} slots of the cache are not a multiple of that"
    if case.heads > ROWS * case.kv_heads:
        return f"at most {ROWS} query heads share a key head, got {case.heads // case.kv_heads}"
    return decode.refused_shape(case, 128) or hopper_attention.refusal(case)


def attend(
    q: Float[Array, "B H D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    mask: Mask,
    terms: Terms,
    *,
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
        programs: how many share the cache of one key head; None to choose.
        interpret: run in Mosaic GPU's interpreter, on a CPU.
    """
    rows, groups, _, width = keys.shape
    if programs is None:
        # So many fit into the registers of a processor at once.
        programs = decode.programs_for(rows, groups, each=2 if width == 64 else 1)
    split, step = decode.prepare(q, keys, values, mask, terms, tile=TILE, rows=ROWS, programs=programs)
    plan = Plan(width, terms.scale, terms.softcap, terms.slopes is not None, False, mask.rule, interpret)
    parts, logs = _parts(plan, split, step, used=q.shape[1] // groups)
    return decode.merged(parts, logs, terms, q.shape[1], q.dtype)


def _parts(plan: Plan, split: Split, step: Step, used: int):
    """The output and log-sum-exp of every share, of the first ``used`` rows or a few more."""
    import jax.experimental.pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    # Its types differ between the versions of JAX.
    plgpu: Any = mosaic_gpu
    rows, groups, _, width = step.keys.shape
    written = -(-used // 8) * 8
    shape = (ROWS, TILE)
    # TMA wants rows of a multiple of 16 bytes. Behind the end of an array it reads zeros, which are slots of segment 0;
    # the interpreter does not.
    about_keys = padded(jnp.stack((step.positions, step.segments), axis=1), 2, TILE if plan.interpret else 4)
    cache = [padded(x, 2, TILE if plan.interpret else 1) for x in (step.keys, step.values)]

    def hopper_decode(
        q_ref, k_ref, v_ref, keys_ref, facts_ref, order_ref, partial_ref, total_ref, slopes_ref,
        out_ref, lse_ref,
        q_smem, k_smem, v_smem, keys_smem, slopes_smem, out_smem, lse_smem,
        q_ready, k_ready, v_ready, keys_ready, k_free, v_free, done,
    ):  # fmt: skip
        program, group, row = lax.axis_index("programs"), lax.axis_index("groups"), lax.axis_index("rows")
        warpgroup = lax.axis_index("warpgroup")
        total = total_ref[row]
        first = lax.div(total * program, jnp.int32(split.programs))
        last = lax.div(total * (program + 1), jnp.int32(split.programs))
        edge = jnp.minimum(jnp.maximum(partial_ref[row], first), last)
        described = last if plan.sloped else edge

        @pl.when(warpgroup == 0)
        def _compute():
            plgpu.copy_gmem_to_smem(q_ref.at[row, group], q_smem, q_ready)
            plgpu.copy_gmem_to_smem(slopes_ref.at[group], slopes_smem, q_ready)
            plgpu.barrier_wait(q_ready)
            query, start, end, segment = (facts_ref[row, at] for at in range(4))
            if plan.sloped:
                slope = spread(plgpu.load(slopes_smem, layout=plgpu.Layout.WGMMA.reduce(1)), shape, 0)

            def visit(i, carry, masked: bool):
                mixed, top, whole = carry
                slot = lax.rem(i - first, jnp.int32(DEPTH))
                plgpu.barrier_wait(k_ready.at[slot])

                def multiply(accumulator):
                    plgpu.wgmma(accumulator, q_smem, k_smem.at[slot].transpose((1, 0)))
                    return accumulator[...]

                products = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32)))
                plgpu.barrier_arrive(k_free.at[slot])
                distance = None
                if masked or plan.sloped:
                    plgpu.barrier_wait(keys_ready.at[slot])
                    about = [plgpu.load(keys_smem.at[slot, at], layout=plgpu.Layout.WGMMA.reduce(0)) for at in range(2)]
                    if plan.sloped:
                        distance = spread((query - about[KEY_POSITION]).astype(jnp.float32), shape, 1)
                logits, _ = plan.logits(products, distance, slope if plan.sloped else None)
                if masked:
                    seen = plan.rule.visible(query, start, end, about[KEY_POSITION]) & (about[KEY_SEGMENT] == segment)
                    # Added rather than selected: a sum with a number of this size is that number.
                    logits = logits + spread(jnp.where(seen, 0.0, HIDDEN), shape, 1)
                higher = jnp.maximum(top, logits.max(axis=1))
                weights = jnp.exp2(logits - spread(higher, shape, 0))
                shrink = jnp.exp2(top - higher)
                whole = whole * shrink + weights.sum(axis=1)
                mixed = mixed * spread(shrink, mixed.shape, 0)
                plgpu.barrier_wait(v_ready.at[slot])
                (mixed,) = add_products(plan, (mixed, weights.astype(v_smem.dtype), v_smem.at[slot]))
                plgpu.barrier_arrive(v_free.at[slot])
                return mixed, higher, whole

            carry = zeros((ROWS, out_ref.shape[-1])), filled((ROWS,), NOWHERE), zeros((ROWS,))
            carry = lax.fori_loop(first, edge, partial(visit, masked=True), carry)
            mixed, top, whole = lax.fori_loop(edge, last, partial(visit, masked=False), carry)
            empty = whole == 0.0
            divisor = jnp.where(empty, 1.0, whole)
            out_smem[...] = mixed * spread(1.0 / divisor, mixed.shape, 0)
            lse_smem[...] = jnp.where(empty, HIDDEN, top * (1.0 / LOG2E) + jnp.log(divisor))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, written)], out_ref.at[row, group, program])
            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, written)], lse_ref.at[row, group, program])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _load():
            @pl.loop(first, last)
            def _step(i):
                slot = lax.rem(i - first, jnp.int32(DEPTH))
                there = pl.ds(order_ref[row, i] * TILE, TILE)
                again = i - first >= DEPTH
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[row, group, there], k_smem.at[slot], k_ready.at[slot])
                # The description of the keys is read before the values, so it is free when they are.
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))

                @pl.when(i < described)
                def _describe():
                    plgpu.copy_gmem_to_smem(keys_ref.at[row, :, there], keys_smem.at[slot], keys_ready.at[slot])

                plgpu.copy_gmem_to_smem(v_ref.at[row, group, there], v_smem.at[slot], v_ready.at[slot])

        # Neither warpgroup may end while the other still uses the tensor cores.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    value_width = step.values.shape[3]
    ring = plgpu.Barrier(num_barriers=DEPTH)
    return plgpu.kernel(
        hopper_decode,
        out_type=(
            jax.ShapeDtypeStruct((rows, groups, split.programs, written, value_width), jnp.float32),
            jax.ShapeDtypeStruct((rows, groups, split.programs, written), jnp.float32),
        ),
        scratch_types=(
            tiled((ROWS, width), step.q.dtype),
            tiled((DEPTH, TILE, width), step.keys.dtype),
            tiled((DEPTH, TILE, value_width), step.values.dtype),
            plgpu.SMEM((DEPTH, 2, TILE), jnp.int32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS, value_width), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            ring, ring, ring, ring, ring,
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=(split.programs, groups, rows),
        grid_names=("programs", "groups", "rows"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plan.parameters(),
        interpret=plan.mode(),
    )(step.q, *cache, about_keys, step.facts, step.order, step.partial, step.total, step.slopes)  # fmt: skip
