"""Gated attention on TPUs through Pallas: an implementation of ``gau_attention``."""

from __future__ import annotations

from jaxtyping import Array, Float

from rlhf_jax.ops import gau_reference
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.gau_terms import GauCase, Score
from rlhf_jax.ops.kernels import gau_schedule
from rlhf_jax.ops.kernels.tpu_flash_states import states
from rlhf_jax.ops.kernels.tpu_gau_products import mix, pull

LANES = 128
LARGEST_TILE = 512
SCALAR_ENTRIES = 1 << 16
"""Entries of the list of tiles that are let into scalar memory, a quarter of the smallest one in use."""


def kernels(tile: int) -> gau_schedule.Kernels:
    """The kernels with square tiles."""
    return gau_schedule.Kernels(mix, pull, states, (tile, tile), (tile, tile))


def refusal(case: GauCase) -> str | None:
    """Why these kernels cannot serve a case, or None."""
    if case.chunk is not None:
        return "this is the quadratic form; the chunked one has kernels of its own"
    return shape_refusal(case, tile_of(case.length, case.slots))


def shape_refusal(case: GauCase, tile: int) -> str | None:
    """What every kernel built on these refuses."""
    if case.platform != "tpu":
        return f"it is written for TPUs, and JAX runs on {case.platform!r}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 or float32, not {case.dtype}"
    if case.width > 256:
        return f"keys are at most 256 wide, got {case.width}"
    if case.value_width % LANES:
        return f"the width of the values must be a multiple of {LANES}, got {case.value_width}"
    if case.bias:
        return "it has no relative bias"
    entries = case.rows * -(-case.length // tile) * -(-case.slots // tile)
    if entries > SCALAR_ENTRIES:
        return f"its list of {entries} tiles is longer than {SCALAR_ENTRIES}; take fewer rows or shorter ones at a time"
    return None


def attend(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S E"],
    mask: Mask,
    normaliser: Float[Array, "B T"],
    bias: None,
    *,
    score: Score,
    scale: float,
    tile: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T E"]:
    """See ``gau_attention``; sums in fp32. ``tile`` is the length of the tiles, None to choose.

    A single query, as in decoding, takes the dense form: it is bound by the memory that it reads either way.
    """
    assert bias is None
    if q.shape[1] == 1:
        return gau_reference.attend(q, k, v, mask, normaliser, bias, score=score, scale=scale)
    tile = tile_of(q.shape[1], k.shape[1]) if tile is None else tile
    plan = gau_schedule.Plan(kernels(tile), score, scale, interpret)
    return gau_schedule.attend(plan, q, k, v, mask, normaliser)


def tile_of(*lengths: int) -> int:
    """The length of the tiles of rows of these lengths."""
    return min(LARGEST_TILE, -(-max(lengths) // LANES) * LANES)
