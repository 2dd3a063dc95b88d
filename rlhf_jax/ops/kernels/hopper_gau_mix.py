"""The weighted sum of a gated attention unit on Hopper: ``out = A values``, ``A = score(scale rows columns')``.

The forward pass is this sum over keys, the gradient of the values the same sum over queries. Each program owns 128
rows and 256 of the wide values (128 where they are no multiple of 256): two warpgroups of 64 rows compute, one loads.
The scores are computed again for each tile of values, so ``(128 E / 256 + E) / (128 + E)`` times the least work. Wider
tiles of values for fewer rows would compute less and move more: 64 rows by 512 values take in 64 bytes a clock at full
rate, the most that a multiprocessor gets from the second cache, against 32 here.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlhf_jax.ops.gau_terms import Score
from rlhf_jax.ops.kernels.gau_tiles import Linear, Walk, shown, value

WIDTH = 128
"""Width of queries and keys."""
ROW_TILE, COLUMN_TILE = 128, 64
VALUE_TILE = 128
"""Values of one accumulator; a program has one or two."""
STAGES = 3
_HALF = ROW_TILE // 2


def mix(
    rows: Float[Array, "B R 128"],
    columns: Float[Array, "B C 128"],
    values: Float[Array, "B C E"],
    walk: Walk,
    score: Score | Linear,
    scale: float,
    far: tuple[Float[Array, "B R 128"], Float[Array, "B G 128 E"]] | None,
    interpret: bool,
) -> Float[Array, "B R E"]:
    """``score(scale rows columns') values`` over what the walk shows, summed in fp32.

    Args:
        rows: queries, or keys when the walk goes by key.
        columns: the other side.
        values: of the columns.
        walk: tiles of ``ROW_TILE`` rows and ``COLUMN_TILE`` columns.
        score: elementwise, applied before the mask.
        scale: factor on the products.
        far: rows and matrices whose products are added: row ``t`` times matrix ``t // (R / G)``.
        interpret: the kernel runs in the interpreter, which takes the weights from shared memory alone.
    """
    pl, plgpu = mosaic()
    batch, length, _ = rows.shape
    width, dtype = values.shape[2], values.dtype
    halves = 2 if width % (2 * VALUE_TILE) == 0 else 1
    row_tiles = length // ROW_TILE
    # Two pieces of a matrix pass through the ring of values before the first tile does.
    pieces = 0 if far is None else WIDTH // COLUMN_TILE
    tiles_of_matrix = 0 if far is None else row_tiles // far[1].shape[1]
    row_lines, column_lines = walk.rows.shape[1], walk.columns.shape[1]
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def gau_mix(rows_g, columns_g, values_g, row_facts_g, column_facts_g, order_g, partial_g, total_g, *rest):
        far_g, rest = rest[: 2 * bool(pieces)], rest[2 * bool(pieces) :]
        out_g, rows_s, columns_s, values_s, row_facts_s, column_facts_s, loaded, full, empty, *more_s = rest
        # The longest rows of a causal mask first, and programs that share their values side by side.
        b, e, r = lax.axis_index("b"), lax.axis_index("e"), row_tiles - 1 - lax.axis_index("r")
        warpgroup = lax.axis_index("warpgroup")
        partial, total = partial_g[b, r], total_g[b, r]

        def value_slice(half):
            return pl.ds((e * halves + half) * VALUE_TILE, VALUE_TILE)

        def slot_of(step):
            return lax.rem(step, jnp.int32(STAGES))

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(r * ROW_TILE + warpgroup * _HALF, _HALF)
            plgpu.copy_gmem_to_smem(rows_g.at[b, own], rows_s.at[warpgroup], loaded.at[warpgroup])
            plgpu.copy_gmem_to_smem(row_facts_g.at[b, :, own], row_facts_s.at[warpgroup], loaded.at[warpgroup])
            plgpu.barrier_wait(loaded.at[warpgroup])
            row_facts = [plgpu.load(row_facts_s.at[warpgroup, i], layout=by_row) for i in range(row_lines)]

            def add_far(step, sums):
                plgpu.barrier_wait(full.at[step])
                for half, total in enumerate(sums):
                    plgpu.wgmma(total, more_s[0].at[step, warpgroup], values_s.at[step, half])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[step])

            def add_tile(step, carry, sums, masked):
                slot = slot_of(step + pieces)
                plgpu.barrier_wait(full.at[slot])

                def products(product):
                    plgpu.wgmma(product, rows_s.at[warpgroup], columns_s.at[slot].transpose((1, 0)))
                    return product[...]

                product = pl.run_scoped(products, plgpu.ACC((_HALF, COLUMN_TILE), jnp.float32))
                weights = value(score, product * scale)
                if masked:
                    facts = [plgpu.load(column_facts_s.at[slot, i], layout=by_column) for i in range(column_lines)]
                    facts = [lax.broadcast_in_dim(fact, weights.shape, [1]) for fact in facts]
                    own_facts = [lax.broadcast_in_dim(fact, weights.shape, [0]) for fact in row_facts]
                    weights = jnp.where(shown(walk, own_facts, facts), weights, 0.0)
                weights = weights.astype(dtype)
                if interpret:
                    staged = more_s[-1].at[warpgroup]
                    staged[...] = weights
                    plgpu.commit_smem()
                    weights = staged
                for half, total in enumerate(sums):
                    plgpu.wgmma(total, weights, values_s.at[slot, half])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[slot])
                return carry

            def accumulate(*sums):
                for step in range(pieces):
                    add_far(step, sums)
                lax.fori_loop(0, partial, functools.partial(add_tile, sums=sums, masked=True), None)
                lax.fori_loop(partial, total, functools.partial(add_tile, sums=sums, masked=False), None)
                for half, accumulated in enumerate(sums):
                    rows_s[warpgroup] = accumulated[...].astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(rows_s.at[warpgroup], out_g.at[b, own, value_slice(half)])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            pl.run_scoped(accumulate, *[plgpu.ACC((_HALF, VALUE_TILE), jnp.float32)] * halves)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def load():
            plgpu.set_max_registers(40, action="decrease")
            for step in range(pieces):
                piece = pl.ds(step * COLUMN_TILE, COLUMN_TILE)
                for half in range(2):
                    there = pl.ds(r * ROW_TILE + half * _HALF, _HALF)
                    plgpu.copy_gmem_to_smem(far_g[0].at[b, there, piece], more_s[0].at[step, half], full.at[step])
                matrix = far_g[1].at[b, lax.div(r, jnp.int32(tiles_of_matrix))]
                for half in range(halves):
                    source = matrix.at[piece, value_slice(half)]
                    plgpu.copy_gmem_to_smem(source, values_s.at[step, half], full.at[step])

            @pl.loop(0, total)
            def _(step):
                slot = slot_of(step + pieces)

                @pl.when(step + pieces >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                there = pl.ds(order_g[b, r, step] * COLUMN_TILE, COLUMN_TILE)
                plgpu.copy_gmem_to_smem(columns_g.at[b, there], columns_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(column_facts_g.at[b, :, there], column_facts_s.at[slot], full.at[slot])
                for half in range(halves):
                    source = values_g.at[b, there, value_slice(half)]
                    plgpu.copy_gmem_to_smem(source, values_s.at[slot, half], full.at[slot])

            # No warpgroup leaves while another one computes.
            @pl.loop(jnp.maximum(total + pieces - STAGES, 0), total + pieces)
            def _(step):
                plgpu.barrier_wait(empty.at[slot_of(step)])

    def shared(*shape):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return plgpu.kernel(
        gau_mix,
        out_type=jax.ShapeDtypeStruct((batch, length, width), dtype),
        grid=(batch, width // (VALUE_TILE * halves), row_tiles),
        grid_names=("b", "e", "r"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            shared(2, _HALF, WIDTH),
            shared(STAGES, COLUMN_TILE, WIDTH),
            shared(STAGES, halves, COLUMN_TILE, VALUE_TILE),
            plgpu.SMEM((2, row_lines, _HALF), jnp.int32),
            plgpu.SMEM((STAGES, column_lines, COLUMN_TILE), jnp.int32),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=2 + halves),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            *[shared(pieces, 2, _HALF, COLUMN_TILE)] * bool(pieces),
            *[shared(2, _HALF, COLUMN_TILE)] * interpret,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(rows, columns, values, *walk.arrays, *(far or ()))


def mosaic() -> tuple[Any, Any]:
    """Pallas and its Mosaic GPU part, whose interface is another one in each version of JAX."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl, plgpu
