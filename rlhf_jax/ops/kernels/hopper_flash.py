"""FLASH, the chunked gated unit, on Hopper GPUs: an implementation of ``flash_attention``.

The state that each chunk meets is made first, in bfloat16, ``E D / C`` numbers a token; then all chunks are computed
at once, by the kernels of the quadratic unit inside a chunk, which add the product with the state. The gradient walks
the same states, and their cotangents from the last chunk to the first.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from rlhf_jax.ops.gau_terms import GauCase, Score
from rlhf_jax.ops.kernels import gau_schedule, hopper_gau
from rlhf_jax.types import Context


def refusal(case: GauCase) -> str | None:
    """Why these kernels cannot serve a case, or None."""
    if case.chunk is None:
        return "this is the chunked form; the quadratic one has kernels of its own"
    if case.chunk % hopper_gau.TILE:
        return f"the chunk must be a multiple of {hopper_gau.TILE}, got {case.chunk}"
    return hopper_gau.shape_refusal(case)


def chunks(
    q_local: Float[Array, "B T 128"],
    k_local: Float[Array, "B T 128"],
    q_global: Float[Array, "B T 128"],
    k_global: Float[Array, "B T 128"],
    v: Float[Array, "B T E"],
    lengths: Int[Array, " B"],
    normaliser: Float[Array, "B T"],
    bias: None,
    state: Float[Array, "B 128 E"],
    *,
    chunk: int,
    score: Score,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T E"], Float[Array, "B 128 E"]]:
    """See ``flash_attention_chunks``; sums and the state in fp32, what enters a product in bfloat16."""
    assert bias is None
    plan = gau_schedule.Plan(hopper_gau.KERNELS, score, scale, interpret)
    return gau_schedule.chunks(plan, chunk, q_local, k_local, q_global, k_global, v, lengths, normaliser, state)


def packed(
    q_local: Float[Array, "B T 128"],
    k_local: Float[Array, "B T 128"],
    q_global: Float[Array, "B T 128"],
    k_global: Float[Array, "B T 128"],
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
    plan = gau_schedule.Plan(hopper_gau.KERNELS, score, scale, interpret)
    return gau_schedule.packed(plan, chunk, q_local, k_local, q_global, k_global, v, context, normaliser)
