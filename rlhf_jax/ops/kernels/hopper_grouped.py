"""Grouped matmuls on H100 and H200 through Mosaic GPU: rows sorted by group times the group's matrix.

As many programs as multiprocessors walk a list of tiles, 128 rows (64 where groups are small) by 256 columns: two
warpgroups multiply, one loads ahead, across the ends of tiles too. Tiles begin at the first row of their group, so
none is computed twice and empty groups cost nothing; the last tile of a group stores its own rows alone. Programs that
run at the same time share rows and matrices in the second cache.
"""

# Written against a newer JAX than the oldest supported one, by whose stubs the types are checked.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.kernels.grouped_schedule import ALIGNED, GroupedCase, tiles
from rlhf_jax.ops.kernels.hopper_grouped_outer import grouped_outer as grouped_outer

PROGRAMS = 132
"""Multiprocessors of an H100 or H200; where there are fewer, the last programs start later."""
STEP = 64
"""Products of one step."""
SHARE = 16
"""Tiles of rows whose programs run side by side before the next columns come."""
HALF, PIECE = 64, 64
"""Rows of one warpgroup, columns of one store of single rows."""
SHARED = 226 << 10
"""Bytes of shared memory that buffers share; a stage takes 48 KiB for the largest tiles."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def refusal(case: GroupedCase) -> str | None:
    """Why these kernels cannot serve a case, or None."""
    if case.platform != "gpu" or not re.search(r"\bG?H(100|200|800|20)\b", case.device):
        return f"its kernels are for NVIDIA Hopper (H100, H200), and this device is {case.device!r}"
    if jax.__version_info__ < (0, 11, 2):
        return f"its kernels need JAX 0.11.2 or newer, and this is {jax.__version__}; newer ones need Python 3.12"
    if case.dtype not in ("bfloat16", "float16"):
        return f"its tensor cores take bfloat16 or float16, not {case.dtype}"
    if case.k % 128 or case.n % 128:
        return f"the sides of its matrices must be multiples of 128, got {case.k} and {case.n}"
    if case.rows < 1:
        return "it needs rows"
    return None


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: 64 where a group has fewer than that on average, so that less of a tile is nobody's."""
    return 128 if rows > HALF * groups else 64


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    transpose_w: bool = False,
    *,
    programs: int = PROGRAMS,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, summed in fp32; rows behind the last group give 0.

    Args:
        x: rows sorted by group, bf16 or fp16.
        w: with ``transpose_w`` ``[G, N, K]``, whose transposes are multiplied; in the dtype of ``x``.
        sizes: rows of each group.
        transpose_w: see ``w``.
        programs: blocks of the grid.
        interpret: run in Mosaic GPU's interpreter, on a CPU.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    count, depth = x.shape
    groups, width = w.shape[0], w.shape[1 if transpose_w else 2]
    high = tile_rows(count, groups)
    wide = 256 if width % 256 == 0 else 128
    # Two warpgroups lie one below the other, or side by side where there are rows for one alone.
    tall = high == 2 * HALF
    own_wide = wide if tall else wide // 2
    columns, all_steps, rows = width // wide, depth // STEP, max(-(-count // ALIGNED) * ALIGNED, high)
    stages = (SHARED - 4 * HALF * (own_wide + PIECE)) // (2 * STEP * (high + wide))
    listed = tiles(sizes, count, high)

    def grouped_matmul(
        x_g, w_g, group_g, start_g, begin_g, end_g, count_g, out_g, x_s, w_s, whole_s, edge_s, full, empty,
    ):  # fmt: skip
        program, warpgroup = lax.axis_index("programs"), lax.axis_index("warpgroup")
        row_tiles = count_g[0]
        mine = lax.div(row_tiles * columns - program + (programs - 1), jnp.int32(programs))

        def tile(i):
            """Its place in the list and its tile of columns: those of ``SHARE`` neighbours by turns."""
            at = program + i * programs
            share = lax.div(at, jnp.int32(SHARE * columns))
            rest = at - share * (SHARE * columns)
            height = jnp.minimum(row_tiles - share * SHARE, SHARE)
            column = lax.div(rest, height)
            return share * SHARE + rest - column * height, column

        def steps_of(entry):
            return jnp.where(group_g[entry] < groups, all_steps, 0)

        def top_of(entry):
            # Never past the end of the rows.
            return pl.multiple_of(jnp.minimum(start_g[entry], rows - high), ALIGNED)

        def store_rows(buffer, top, first, length, there):
            """A number of rows is a sum of powers of two; each of these has its own copy."""
            for power in (32, 16, 8, 4, 2, 1):
                has = length & power

                @pl.when(has != 0)
                def _(first=first, power=power):
                    source = buffer.at[pl.ds(first, power)]
                    plgpu.copy_smem_to_gmem(source, out_g.at[pl.ds(top + first, power), there])

                first = first + has

        @pl.when(warpgroup < 2)
        def _compute():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            row = pl.multiple_of(warpgroup * HALF, HALF) if tall else 0
            column = 0 if tall else pl.multiple_of(warpgroup * own_wide, own_wide)

            def compute_tile(i, before):
                entry, n = tile(i)
                steps = steps_of(entry)

                def multiply(sums):
                    def add(step, _):
                        slot = lax.rem(before + step, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        left = x_s.at[slot, pl.ds(row, HALF)]
                        own = pl.ds(column, own_wide)
                        right = w_s.at[slot, own].T if transpose_w else w_s.at[slot, :, own]
                        plgpu.wgmma(sums, left, right)
                        # The next product is under way before the last one's operands are given back.
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(before + step - 1, jnp.int32(stages))])

                    lax.fori_loop(0, steps, add, None)
                    return sums[...]

                result = pl.run_scoped(multiply, plgpu.ACC((HALF, own_wide), jnp.float32)).astype(x.dtype)

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(before + steps - 1, jnp.int32(stages))])

                top = top_of(entry) + row
                first = jnp.clip(begin_g[entry] - top, 0, HALF)
                stop = jnp.clip(end_g[entry] - top, 0, HALF)

                left = n * wide + column
                pieces = [slice(at, at + PIECE) for at in range(0, own_wide, PIECE)]

                @pl.when(stop - first == HALF)
                def _whole():
                    # The tile before this one has left the buffer.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    whole_s[warpgroup] = result
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(whole_s.at[warpgroup], out_g.at[pl.ds(top, HALF), pl.ds(left, own_wide)])

                @pl.when((stop > first) & (stop - first < HALF))
                def _edge():
                    for piece in pieces:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        edge_s[warpgroup] = result[:, piece]
                        plgpu.commit_smem()
                        store_rows(edge_s.at[warpgroup], top, first, stop - first, pl.ds(left + piece.start, PIECE))

                return before + steps

            lax.fori_loop(0, mine, compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load_tile(i, before):
                entry, n = tile(i)
                steps, group = steps_of(entry), jnp.minimum(group_g[entry], groups - 1)
                here, there = pl.ds(top_of(entry), high), pl.ds(n * wide, wide)

                def load(step, _):
                    slot = lax.rem(before + step, jnp.int32(stages))
                    pl.when(before + step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    deep = pl.ds(step * STEP, STEP)
                    plgpu.copy_gmem_to_smem(x_g.at[here, deep], x_s.at[slot], full.at[slot])
                    source = w_g.at[group, there, deep] if transpose_w else w_g.at[group, deep, there]
                    plgpu.copy_gmem_to_smem(source, w_s.at[slot], full.at[slot])

                lax.fori_loop(0, steps, load, None)
                return before + steps

            total = lax.fori_loop(0, mine, load_tile, jnp.int32(0))

            # No warpgroup leaves while another one computes.
            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])

    def shared(*shape) -> Any:
        return plgpu.SMEM(shape, x.dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    out = plgpu.kernel(
        grouped_matmul,
        out_type=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(programs,),
        grid_names=("programs",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            shared(stages, high, STEP),
            shared(stages, wide, STEP) if transpose_w else shared(stages, STEP, wide),
            shared(2, HALF, own_wide),
            # Copies of single rows need their rows one after the other.
            plgpu.SMEM((2, HALF, PIECE), x.dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(
        jnp.pad(x, ((0, rows - count), (0, 0))), w,
        listed.group, listed.start, listed.begin, listed.end, listed.count[None],
    )  # fmt: skip
    return out[:count]
