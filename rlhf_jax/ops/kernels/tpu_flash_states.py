"""The running state of the chunked gated unit FLASH on TPUs: ``S <- keep_g S + keys_g' values_g`` over the chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.kernels.tiles import product
from rlhf_jax.ops.kernels.tpu_gau_products import value_tile_of


def states(
    keys: Float[Array, "B T D"],
    values: Float[Array, "B T E"],
    keep: Float[Array, "B G"],
    first: Float[Array, "B D E"],
    reverse: bool,
    interpret: bool,
) -> tuple[Float[Array, "B G D E"], Float[Array, "B D E"]]:
    """The state that each chunk meets and the last one, as ``gau_schedule.Kernels`` describes them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, width = values.shape
    key_width, chunks = keys.shape[2], keep.shape[1]
    chunk, value_tile = length // chunks, value_tile_of(width)

    def chunk_of(i):
        return chunks - 1 - i if reverse else i

    def kernel(keep_r, keys_r, values_r, first_r, met_r, last_r, state):
        b, i = pl.program_id(0), pl.program_id(2)

        @pl.when(i == 0)
        def _():
            state[...] = first_r[0]

        met_r[0, 0] = state[...].astype(values.dtype)
        kept = jnp.where(keep_r[b * chunks + chunk_of(i)] != 0, state[...], 0.0)
        state[...] = kept + product(keys_r[0], values_r[0], (0, 0))

        @pl.when(i == chunks - 1)
        def _():
            last_r[0] = state[...]

    matrix = pl.BlockSpec((1, key_width, value_tile), lambda b, e, i, keep: (b, 0, e))
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((batch, chunks, key_width, width), values.dtype),
            jax.ShapeDtypeStruct((batch, key_width, width), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, width // value_tile, chunks),
            in_specs=[
                pl.BlockSpec((1, chunk, key_width), lambda b, e, i, keep: (b, chunk_of(i), 0)),
                pl.BlockSpec((1, chunk, value_tile), lambda b, e, i, keep: (b, chunk_of(i), e)),
                matrix,
            ],
            out_specs=(
                pl.BlockSpec((1, 1, key_width, value_tile), lambda b, e, i, keep: (b, chunk_of(i), 0, e)),
                matrix,
            ),
            scratch_shapes=[pltpu.VMEM((key_width, value_tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="flash_states",
    )((keep != 0).astype(jnp.int32).reshape(-1), keys, values, first)
