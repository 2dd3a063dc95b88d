"""Gated attention on Hopper GPUs through Pallas Mosaic GPU: an implementation of ``gau_attention``, with its gradient.

Forward is one weighted sum, backward three passes without atomics: the same sum by key for the values, and one pass
each for queries and keys. Memory is linear in the length: nothing between queries and keys is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.gau_terms import GauCase, Score
from rlhf_jax.ops.kernels import hopper_gau_mix, hopper_gau_pull
from rlhf_jax.ops.kernels.gau_tiles import Linear, padded_tokens, walk

WIDTH, VALUE_TILE = hopper_gau_mix.WIDTH, hopper_gau_mix.VALUE_TILE
TILE = 128
"""Lengths are padded to multiples of this."""


@dataclass(frozen=True)
class Plan:
    """The static facts of one call."""

    score: Score | Linear
    scale: float
    interpret: bool = False


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
    """See ``gau_attention``; sums in fp32, weights and gradients of logits enter the products in bfloat16."""
    assert bias is None
    length = q.shape[1]
    q, k, v = (padded_tokens(x, TILE) for x in (q, k, v))
    sums = weighted_sum(Plan(score, scale, interpret), q, k, v, mask.padded(TILE, TILE))[:, :length]
    return (sums / normaliser[..., None]).astype(q.dtype)


def _weighted_sum(
    plan: Plan, q: Float[Array, "B T 128"], k: Float[Array, "B S 128"], v: Float[Array, "B S E"], mask: Mask
) -> Float[Array, "B T E"]:
    """Gated attention without its normaliser, ``(plan, q, k, v, mask)``; lengths are multiples of ``TILE``."""
    by_query = walk(mask, hopper_gau_mix.ROW_TILE, hopper_gau_mix.COLUMN_TILE, by_query=True)
    return hopper_gau_mix.mix(q, k, v, by_query, plan.score, plan.scale, interpret=plan.interpret)


weighted_sum = jax.custom_vjp(_weighted_sum, nondiff_argnums=(0,))


def _forward(plan: Plan, q, k, v, mask: Mask):
    return _weighted_sum(plan, q, k, v, mask), (q, k, v, mask)


def _backward(plan: Plan, residuals, cotangent):
    q, k, v, mask = residuals
    return *gradients(plan, q, k, v, mask, cotangent), None


weighted_sum.defvjp(_forward, _backward)


def gradients(
    plan: Plan,
    q: Float[Array, "B T 128"],
    k: Float[Array, "B S 128"],
    v: Float[Array, "B S E"],
    mask: Mask,
    cotangent: Float[Array, "B T E"],
    far: tuple[Float[Array, "B S 128"], Float[Array, "B G 128 E"]] | None = None,
) -> tuple[Float[Array, "B T 128"], Float[Array, "B S 128"], Float[Array, "B S E"]]:
    """The gradients of queries, keys and values; ``far`` is added to those of the values as in ``mix``."""
    mix_tiles = hopper_gau_mix.ROW_TILE, hopper_gau_mix.COLUMN_TILE
    pull_tiles = hopper_gau_pull.TILE, hopper_gau_pull.TILE
    terms = {"score": plan.score, "scale": plan.scale, "interpret": plan.interpret}
    by_query, by_key = (walk(mask, *pull_tiles, by_query=side) for side in (True, False))
    dq = hopper_gau_pull.pull(q, k, cotangent, v, by_query, **terms)
    dk = hopper_gau_pull.pull(k, q, v, cotangent, by_key, **terms)
    dv = hopper_gau_mix.mix(k, q, cotangent, walk(mask, *mix_tiles, by_query=False), far=far, **terms)
    return dq, dk, dv
