"""The gradient of the matrices of a grouped matmul on Hopper: ``x' dy`` over the rows of each group.

As many programs as multiprocessors walk all tiles of all matrices, 128 by 256, and sum each one over its group's rows
by themselves, so the result is the same each time: two warpgroups multiply, one loads ahead, across the ends of tiles
too. Rows of other groups that come with the first and the last rows of a group are overwritten by zeros on both sides,
as they may hold anything.
"""

# Written against a newer JAX than the oldest supported one, by whose stubs the types are checked.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.kernels.grouped_schedule import ALIGNED, bounds

PROGRAMS = 132
"""Multiprocessors of an H100 or H200; where there are fewer, the last programs start later."""
STEP = 64
"""Rows of one step."""
HALF = 64
"""Rows of the result of one warpgroup."""
SHARE = 16
"""Tiles below each other whose programs run side by side before the next columns come."""
SHARED = 226 << 10
"""Bytes of shared memory that buffers share; a stage takes 48 KiB for the largest tiles."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def grouped_outer(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    sizes: Int[Array, " G"],
    *,
    programs: int = PROGRAMS,
    interpret: bool = False,
) -> Float[Array, "G K N"]:
    """``x' dy`` over the rows of each group, summed in fp32; 0 for empty groups; rows behind the last one are left out.

    Args:
        x: rows sorted by group, bf16 or fp16.
        dy: of the same rows, in the same dtype.
        sizes: rows of each group.
        programs: blocks of the grid.
        interpret: run in Mosaic GPU's interpreter, on a CPU.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    (count, depth), width, groups = x.shape, dy.shape[1], sizes.shape[0]
    wide = 256 if width % 256 == 0 else 128
    rows = max(-(-count // ALIGNED) * ALIGNED, STEP)
    down, across = depth // (2 * HALF), width // wide
    every = groups * down * across
    stages = (SHARED - 4 * HALF * wide) // (2 * STEP * (2 * HALF + wide))
    begins, ends = (edges[:-1] for edges in bounds(sizes, count))

    def grouped_outer(
        x_g, dy_g, begin_g, end_g, out_g, x_s, dy_s, out_s, full, empty, masked,
    ):  # fmt: skip
        program, warpgroup = lax.axis_index("programs"), lax.axis_index("warpgroup")

        def tile(i):
            """Its group, where its rows begin and end, and its place in the matrix: ``SHARE`` neighbours by turns."""
            at = program + i * programs
            group = lax.div(at, jnp.int32(down * across))
            rest = at - group * (down * across)
            share = lax.div(rest, jnp.int32(SHARE * across))
            rest = rest - share * (SHARE * across)
            height = jnp.minimum(down - share * SHARE, SHARE)
            column = lax.div(rest, height)
            return group, begin_g[group], end_g[group], share * SHARE + rest - column * height, column

        def start_of(begin):
            return lax.div(begin, jnp.int32(ALIGNED)) * ALIGNED

        def steps_of(begin, end):
            return jnp.where(end > begin, lax.div(end - start_of(begin) + (STEP - 1), jnp.int32(STEP)), 0)

        def top_of(begin, steps, step):
            """The row at which a step begins: the first step, the last one, then those between."""
            nth = jnp.where(step == 0, 0, jnp.where(step == 1, steps - 1, step - 1))
            # Rows that a step before the last one has too are masked.
            return pl.multiple_of(jnp.minimum(start_of(begin) + nth * STEP, rows - STEP), ALIGNED)

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            own = pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)

            def mask(ref, shown):
                value = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                ref[...] = jnp.where(lax.broadcast_in_dim(shown, value.shape, (0,)), value, jnp.zeros_like(value))

            def compute_tile(i, before):
                group, begin, end, k, n = tile(i)
                steps = steps_of(begin, end)

                def multiply(sums):
                    def add(step):
                        slot = slot_of(before + step)
                        plgpu.wgmma(sums, x_s.at[slot, :, own].T, dy_s.at[slot])

                    def add_edge(step, _):
                        slot = slot_of(before + step)
                        plgpu.barrier_wait(full.at[slot])
                        top = top_of(begin, steps, step)
                        # Where the last step would leave the rows it is moved up, over rows of the step before.
                        first = jnp.where(step == 0, begin, jnp.maximum(begin, start_of(begin) + (steps - 1) * STEP))

                        @pl.when((top < first) | (top + STEP > end))
                        def _():
                            row = top + plgpu.layout_cast(
                                lax.broadcasted_iota(jnp.int32, (STEP,), 0), plgpu.Layout.WGMMA.reduce(1)
                            )
                            shown = (row >= first) & (row < end)
                            mask(x_s.at[slot, :, own], shown)
                            share = wide // 2
                            mask(dy_s.at[slot, :, pl.ds(pl.multiple_of(warpgroup * share, share), share)], shown)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(masked)
                            plgpu.barrier_wait(masked)

                        add(step)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    def add_inner(step, _):
                        plgpu.barrier_wait(full.at[slot_of(before + step)])
                        add(step)
                        # The next product is under way before the last one's operands are given back.
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 2)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(before + step - 1)])

                    lax.fori_loop(0, jnp.minimum(steps, 2), add_edge, None)
                    lax.fori_loop(2, steps, add_inner, None)
                    return sums[...]

                result = pl.run_scoped(multiply, plgpu.ACC((HALF, wide), jnp.float32)).astype(x.dtype)

                @pl.when(steps > 2)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(before + steps - 1)])

                # The tile before this one has left the buffer.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s[warpgroup] = result
                plgpu.commit_smem()
                there = pl.ds(k * (2 * HALF) + warpgroup * HALF, HALF), pl.ds(n * wide, wide)
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out_g.at[group, *there])
                return before + steps

            lax.fori_loop(0, mine_of(program), compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(i, before):
                _, begin, end, k, n = tile(i)
                steps = steps_of(begin, end)

                def load(step, _):
                    slot = slot_of(before + step)
                    pl.when(before + step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    here = pl.ds(top_of(begin, steps, step), STEP)
                    plgpu.copy_gmem_to_smem(x_g.at[here, pl.ds(k * (2 * HALF), 2 * HALF)], x_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(dy_g.at[here, pl.ds(n * wide, wide)], dy_s.at[slot], full.at[slot])

                lax.fori_loop(0, steps, load, None)
                return before + steps

            total = lax.fori_loop(0, mine_of(program), load_tile, jnp.int32(0))

            # No warpgroup leaves while another one computes.
            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _(step):
                plgpu.barrier_wait(empty.at[slot_of(step)])

    def mine_of(program):
        return lax.div(every - program + (programs - 1), jnp.int32(programs))

    def shared(*shape) -> Any:
        return plgpu.SMEM(shape, x.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    def whole(array):
        return jnp.pad(array, ((0, rows - count), (0, 0)))

    return plgpu.kernel(
        grouped_outer,
        out_type=jax.ShapeDtypeStruct((groups, depth, width), x.dtype),
        grid=(programs,),
        grid_names=("programs",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            shared(stages, STEP, 2 * HALF),
            shared(stages, STEP, wide),
            shared(2, HALF, wide),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(whole(x), whole(dy), begins, ends)
