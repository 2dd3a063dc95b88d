"""Dense gated attention: the definition that every other one is held against. O(T S) memory; exact in float64."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.gau_terms import GauCase, Score, biased


def refusal(case: GauCase) -> str | None:
    """Nothing is refused."""
    return None


def attend(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S E"],
    mask: Mask,
    normaliser: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    *,
    score: Score,
    scale: float,
) -> Float[Array, "B T E"]:
    """See ``gau_attention``; sums in fp32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    products = jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=wide)
    distance = mask.query_positions[:, :, None] - mask.key_positions[:, None, :]
    scores = jnp.where(mask.dense(), score.value(biased(scale * products, bias, distance)), 0.0)
    out = jnp.einsum("bts,bse->bte", scores.astype(v.dtype), v, preferred_element_type=wide)
    return (out / normaliser[..., None].astype(wide)).astype(q.dtype)
