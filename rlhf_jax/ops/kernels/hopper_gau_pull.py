"""The gradient of one side of the scores of a gated attention unit on Hopper: of the queries, or of the keys.

``d rows = dS columns`` with ``dS = scale score'(scale rows columns') * (row_values column_values')`` where the mask
shows. For the queries the values of the rows are the cotangents of the sums and those of the columns the values; for
the keys it is the other way round. Either way each program owns the rows whose gradient it sums, so nothing is added
across programs and the result is the same each time. The wide product is computed once for each side.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlhf_jax.ops.gau_terms import Score
from rlhf_jax.ops.kernels.gau_tiles import Linear, Walk, shown
from rlhf_jax.ops.kernels.hopper_gau_mix import WIDTH, mosaic

TILE = 128
"""Rows and columns of a tile."""
SLICE = 64
"""Values of one step of the wide product."""
STAGES = 4
_HALF = TILE // 2


def pull(
    rows: Float[Array, "B R 128"],
    columns: Float[Array, "B C 128"],
    row_values: Float[Array, "B R E"],
    column_values: Float[Array, "B C E"],
    walk: Walk,
    score: Score | Linear,
    scale: float,
    interpret: bool,
) -> Float[Array, "B R 128"]:
    """The gradient of the rows; arguments as in ``mix``, the walk over tiles of ``TILE`` rows and columns."""
    pl, plgpu = mosaic()
    batch, length, width = row_values.shape
    dtype = rows.dtype
    row_tiles, slices = length // TILE, width // SLICE
    row_lines, column_lines = walk.rows.shape[1], walk.columns.shape[1]
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def gau_pull(
        rows_g, columns_g, row_values_g, column_values_g, row_facts_g, column_facts_g, order_g, partial_g, total_g,
        out_g, rows_s, columns_s, row_values_s, column_values_s, row_facts_s, column_facts_s,
        loaded, tile_full, tile_empty, full, empty, *staged_s,
    ):  # fmt: skip
        b, r = lax.axis_index("b"), row_tiles - 1 - lax.axis_index("r")
        warpgroup = lax.axis_index("warpgroup")
        partial, total = partial_g[b, r], total_g[b, r]

        def slot_of(step):
            return lax.rem(step, jnp.int32(STAGES))

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(r * TILE + warpgroup * _HALF, _HALF)
            plgpu.copy_gmem_to_smem(rows_g.at[b, own], rows_s.at[warpgroup], loaded.at[warpgroup])
            plgpu.copy_gmem_to_smem(row_facts_g.at[b, :, own], row_facts_s.at[warpgroup], loaded.at[warpgroup])
            plgpu.barrier_wait(loaded.at[warpgroup])
            row_facts = [plgpu.load(row_facts_s.at[warpgroup, i], layout=by_row) for i in range(row_lines)]

            def wide_product(product, tile):
                def add_slice(i, carry):
                    step = tile * slices + i
                    plgpu.barrier_wait(full.at[slot_of(step)])
                    there = column_values_s.at[slot_of(step)].transpose((1, 0))
                    plgpu.wgmma(product, row_values_s.at[slot_of(step), warpgroup], there)
                    # The next product is under way before the last one's operands are given back.
                    plgpu.wgmma_wait(1)

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[slot_of(step - 1)])

                    return carry

                lax.fori_loop(0, slices, add_slice, None)
                result = product[...]
                plgpu.barrier_arrive(empty.at[slot_of(tile * slices + slices - 1)])
                return result

            def add_tile(tile, carry, gradient, masked):
                cotangents = pl.run_scoped(
                    functools.partial(wide_product, tile=tile), plgpu.ACC((_HALF, TILE), jnp.float32)
                )
                plgpu.barrier_wait(tile_full)

                def products(product):
                    plgpu.wgmma(product, rows_s.at[warpgroup], columns_s.transpose((1, 0)))
                    return product[...]

                product = pl.run_scoped(products, plgpu.ACC((_HALF, TILE), jnp.float32))
                slopes = score.gradient(product * scale) * cotangents * scale
                if masked:
                    facts = [plgpu.load(column_facts_s.at[i], layout=by_column) for i in range(column_lines)]
                    facts = [lax.broadcast_in_dim(fact, slopes.shape, [1]) for fact in facts]
                    own_facts = [lax.broadcast_in_dim(fact, slopes.shape, [0]) for fact in row_facts]
                    slopes = jnp.where(shown(walk, own_facts, facts), slopes, 0.0)
                slopes = slopes.astype(dtype)
                if interpret:
                    staged = staged_s[0].at[warpgroup]
                    staged[...] = slopes
                    plgpu.commit_smem()
                    slopes = staged
                plgpu.wgmma(gradient, slopes, columns_s)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(tile_empty)
                return carry

            def accumulate(gradient):
                lax.fori_loop(0, partial, functools.partial(add_tile, gradient=gradient, masked=True), None)
                lax.fori_loop(partial, total, functools.partial(add_tile, gradient=gradient, masked=False), None)
                rows_s[warpgroup] = gradient[...].astype(dtype)

            pl.run_scoped(accumulate, plgpu.ACC((_HALF, WIDTH), jnp.float32))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(rows_s.at[warpgroup], out_g.at[b, own])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, total)
            def _(tile):
                there = pl.ds(order_g[b, r, tile] * TILE, TILE)

                @pl.loop(0, slices)
                def _(i):
                    step = tile * slices + i
                    slot, piece = slot_of(step), pl.ds(i * SLICE, SLICE)

                    @pl.when(step >= STAGES)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    for half in range(2):
                        own = row_values_g.at[b, pl.ds(r * TILE + half * _HALF, _HALF), piece]
                        plgpu.copy_gmem_to_smem(own, row_values_s.at[slot, half], full.at[slot])
                    plgpu.copy_gmem_to_smem(
                        column_values_g.at[b, there, piece], column_values_s.at[slot], full.at[slot]
                    )

                # Last, because the tile before it is in use until most of this one's values have been taken.
                @pl.when(tile > 0)
                def _():
                    plgpu.barrier_wait(tile_empty)

                plgpu.copy_gmem_to_smem(columns_g.at[b, there], columns_s, tile_full)
                plgpu.copy_gmem_to_smem(column_facts_g.at[b, :, there], column_facts_s, tile_full)

            # No warpgroup leaves while another one computes.
            @pl.when(total > 0)
            def _():
                plgpu.barrier_wait(tile_empty)

            @pl.loop(jnp.maximum(total * slices - STAGES, 0), total * slices)
            def _(step):
                plgpu.barrier_wait(empty.at[slot_of(step)])

    def shared(*shape):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return plgpu.kernel(
        gau_pull,
        out_type=jax.ShapeDtypeStruct((batch, length, WIDTH), dtype),
        grid=(batch, row_tiles),
        grid_names=("b", "r"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            shared(2, _HALF, WIDTH),
            shared(TILE, WIDTH),
            shared(STAGES, 2, _HALF, SLICE),
            shared(STAGES, TILE, SLICE),
            plgpu.SMEM((2, row_lines, _HALF), jnp.int32),
            plgpu.SMEM((column_lines, TILE), jnp.int32),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=3),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            *[shared(2, _HALF, TILE)] * interpret,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(rows, columns, row_values, column_values, *walk.arrays)
