"""The running state of the chunked gated unit FLASH on Hopper: ``S <- keep_g S + keys_g' values_g`` over the chunks.

Each program owns 128 of the wide values and walks all chunks of a row, the state in the registers of two warpgroups
of 64 keys' columns, in fp32. So few rows of few values leave multiprocessors idle: ``B E / 128`` programs run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlhf_jax.ops.kernels.hopper_gau_mix import WIDTH, mosaic

VALUE_TILE = 128
PIECE = 64
"""Tokens of one step."""
STAGES = 3
_HALF = WIDTH // 2


def states(
    keys: Float[Array, "B T 128"],
    values: Float[Array, "B T E"],
    keep: Float[Array, "B G"],
    first: Float[Array, "B 128 E"],
    reverse: bool,
    interpret: bool,
) -> tuple[Float[Array, "B G 128 E"], Float[Array, "B 128 E"]]:
    """The state that each chunk meets, in the dtype of the values, and the last one, in fp32.

    Args:
        keys: of ``G`` chunks; summed against the values of the same tokens.
        values: a multiple of ``VALUE_TILE`` wide.
        keep: 1 where the state goes on past a chunk's start, 0 where it begins anew.
        first: the state that the first chunk meets, fp32.
        reverse: walk from the last chunk to the first.
        interpret: the interpreter can run this kernel as it is.
    """
    pl, plgpu = mosaic()
    batch, length, width = values.shape
    chunks, dtype = keep.shape[1], values.dtype
    pieces = length // chunks // PIECE

    def flash_states(
        keys_g, values_g, keep_g, first_g, states_g, last_g, keys_s, values_s, out_s, state_s, loaded, full, empty
    ):
        b, e = lax.axis_index("b"), lax.axis_index("e")
        warpgroup = lax.axis_index("warpgroup")
        own_values = pl.ds(e * VALUE_TILE, VALUE_TILE)

        def slot_of(step):
            return lax.rem(step, jnp.int32(STAGES))

        def chunk_of(i):
            return chunks - 1 - i if reverse else i

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(warpgroup * _HALF, _HALF)
            plgpu.copy_gmem_to_smem(first_g.at[b, own, own_values], state_s.at[warpgroup], loaded.at[warpgroup])
            plgpu.barrier_wait(loaded.at[warpgroup])

            def add_chunk(i, state):
                # The copy of the chunk before has left the buffer.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s[warpgroup] = state.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], states_g.at[b, chunk_of(i), own, own_values])

                def product(added):
                    def add_piece(p, carry):
                        slot = slot_of(i * pieces + p)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(added, keys_s.at[slot, warpgroup].transpose((1, 0)), values_s.at[slot])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                        return carry

                    lax.fori_loop(0, pieces, add_piece, None)
                    return added[...]

                added = pl.run_scoped(product, plgpu.ACC((_HALF, VALUE_TILE), jnp.float32))
                return state * keep_g[b, chunk_of(i)] + added

            first_state = plgpu.load(state_s.at[warpgroup], layout=plgpu.Layout.WGMMA)
            state_s[warpgroup] = lax.fori_loop(0, chunks, add_chunk, first_state)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s.at[warpgroup], last_g.at[b, own, own_values])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, chunks * pieces)
            def _(step):
                slot = slot_of(step)

                @pl.when(step >= STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                piece = chunk_of(lax.div(step, jnp.int32(pieces))) * pieces + lax.rem(step, jnp.int32(pieces))
                there = pl.ds(piece * PIECE, PIECE)
                for half in range(2):
                    source = keys_g.at[b, there, pl.ds(half * _HALF, _HALF)]
                    plgpu.copy_gmem_to_smem(source, keys_s.at[slot, half], full.at[slot])
                plgpu.copy_gmem_to_smem(values_g.at[b, there, own_values], values_s.at[slot], full.at[slot])

            # No warpgroup leaves while another one computes.
            for step in range(max(chunks * pieces - STAGES, 0), chunks * pieces):
                plgpu.barrier_wait(empty.at[step % STAGES])

    def shared(*shape, dtype):
        transforms = (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return plgpu.kernel(
        flash_states,
        out_type=(
            jax.ShapeDtypeStruct((batch, chunks, WIDTH, width), dtype),
            jax.ShapeDtypeStruct((batch, WIDTH, width), jnp.float32),
        ),
        grid=(batch, width // VALUE_TILE),
        grid_names=("b", "e"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            shared(STAGES, 2, PIECE, _HALF, dtype=dtype),
            shared(STAGES, PIECE, VALUE_TILE, dtype=dtype),
            shared(2, _HALF, VALUE_TILE, dtype=dtype),
            shared(2, _HALF, VALUE_TILE, dtype=jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=3),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(keys, values, keep.astype(jnp.float32), first)
