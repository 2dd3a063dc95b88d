"""FLASH, the chunked gated unit, on TPUs: an implementation of ``flash_attention``.

As on other devices the state that each chunk meets is made first, then all chunks are computed, by the kernels of the
quadratic unit inside a chunk.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from rlhf_jax.ops.gau_terms import GauCase, Score
from rlhf_jax.ops.kernels import gau_schedule, tpu_gau
from rlhf_jax.types import Context


def refusal(case: GauCase) -> str | None:
    """Why these kernels cannot serve a case, or None."""
    if case.chunk is None:
        return "this is the chunked form; the quadratic one has kernels of its own"
    if case.chunk % tpu_gau.LANES:
        return f"the chunk must be a multiple of {tpu_gau.LANES}, got {case.chunk}"
    return tpu_gau.shape_refusal(case, tile_of(case.chunk))


def chunks(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    lengths: Int[Array, " B"],
    normaliser: Float[Array, "B T"],
    bias: None,
    state: Float[Array, "B D E"],
    *,
    chunk: int,
    score: Score,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T E"], Float[Array, "B D E"]]:
    """See ``flash_attention_chunks``; sums and the state in fp32, what enters a product in the dtype of the values."""
    assert bias is None
    plan = gau_schedule.Plan(tpu_gau.kernels(tile_of(chunk)), score, scale, interpret)
    return gau_schedule.chunks(plan, chunk, q_local, k_local, q_global, k_global, v, lengths, normaliser, state)


def packed(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    context: Context,
    normaliser: Float[Array, "B T"],
    bias: None,
    *,
    chunk: int,
    score: Score,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T E"]:
    """See ``flash_attention``: documents may begin anywhere in a row."""
    assert bias is None
    plan = gau_schedule.Plan(tpu_gau.kernels(tile_of(chunk)), score, scale, interpret)
    return gau_schedule.packed(plan, chunk, q_local, k_local, q_global, k_global, v, context, normaliser)


def tile_of(chunk: int) -> int:
    """The length of the tiles, which divides a chunk."""
    return next((tile for tile in (512, 256, 128) if chunk % tile == 0), chunk)
