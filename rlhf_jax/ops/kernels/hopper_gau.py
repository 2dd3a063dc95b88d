"""Gated attention on Hopper GPUs through Pallas Mosaic GPU: an implementation of ``gau_attention``."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from rlhf_jax.ops import gau_reference
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.gau_terms import GauCase, Score
from rlhf_jax.ops.kernels import gau_schedule
from rlhf_jax.ops.kernels.hopper_flash_states import states
from rlhf_jax.ops.kernels.hopper_gau_mix import COLUMN_TILE, ROW_TILE, VALUE_TILE, WIDTH, mix
from rlhf_jax.ops.kernels.hopper_gau_pull import TILE, pull

KERNELS = gau_schedule.Kernels(mix, pull, states, (ROW_TILE, COLUMN_TILE), (TILE, TILE))


def refusal(case: GauCase) -> str | None:
    """Why these kernels cannot serve a case, or None."""
    if case.chunk is not None:
        return "this is the quadratic form; the chunked one has kernels of its own"
    return shape_refusal(case)


def shape_refusal(case: GauCase) -> str | None:
    """What every kernel built on this one refuses."""
    if case.platform != "gpu":
        return f"it needs a Hopper GPU, this is a {case.platform}"
    if not any(name in case.device for name in ("H100", "H200", "H800", "H20", "GH200")):
        return f"it needs a Hopper GPU, this is a {case.device}"
    if jax.__version_info__ < (0, 11, 2):
        return f"it needs JAX 0.11.2 or newer, this is {jax.__version__}"
    if case.dtype != "bfloat16":
        return f"it takes bfloat16, not {case.dtype}"
    if case.width != WIDTH:
        return f"keys must be {WIDTH} wide, not {case.width}"
    if case.value_width % VALUE_TILE:
        return f"the width of the values must be a multiple of {VALUE_TILE}, got {case.value_width}"
    if case.bias:
        return "it has no relative bias"
    return None


def attend(
    q: Float[Array, "B T 128"],
    k: Float[Array, "B S 128"],
    v: Float[Array, "B S E"],
    mask: Mask,
    normaliser: Float[Array, "B T"],
    bias: None,
    *,
    score: Score,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T E"]:
    """See ``gau_attention``; sums in fp32, weights and the gradients of logits enter products in bfloat16.

    A single query, as in decoding, takes the dense form: it is bound by the memory that it reads either way.
    """
    assert bias is None
    if q.shape[1] == 1:
        return gau_reference.attend(q, k, v, mask, normaliser, bias, score=score, scale=scale)
    return gau_schedule.attend(gau_schedule.Plan(KERNELS, score, scale, interpret), q, k, v, mask, normaliser)
