"""Dense mixed local and global attention: the definition. O(T²) memory; exact in float64."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.gau_terms import GauCase, Score, biased
from rlhf_jax.types import Context


def refusal(case: GauCase) -> str | None:
    """Nothing is refused."""
    return None


def attend(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    context: Context,
    normaliser: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    *,
    chunk: int,
    score: Score,
    scale: float,
) -> Float[Array, "B T E"]:
    """See ``flash_attention``; sums in fp32 or wider."""
    wide = jnp.promote_types(q_local.dtype, jnp.float32)
    positions, segments = context.positions, context.segments
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, :, None]
    distance = positions[:, :, None] - positions[:, None, :]
    before = positions[:, None, :] // chunk < (positions // chunk)[:, :, None]
    here = (positions[:, None, :] // chunk == (positions // chunk)[:, :, None]) & (distance >= 0)
    products = jnp.einsum("btd,bsd->bts", q_local, k_local, preferred_element_type=wide)
    scores = jnp.where(same & here, score.value(biased(scale * products, bias, distance)), 0.0)
    linear = jnp.einsum("btd,bsd->bts", q_global, k_global, preferred_element_type=wide)
    weights = scores / normaliser[..., None].astype(wide) + jnp.where(same & before, linear, 0.0)
    return jnp.einsum("bts,bse->bte", weights.astype(v.dtype), v, preferred_element_type=wide).astype(v.dtype)


def chunks(
    q_local, k_local, q_global, k_global, v, lengths, normaliser, bias, state, *, chunk: int, score: Score, scale: float
) -> tuple[Float[Array, "B T E"], Float[Array, "B D E"]]:
    """See ``flash_attention_chunks``."""
    slots = jnp.arange(v.shape[1])
    context = Context.of_lengths(lengths, v.shape[1])
    out = attend(
        q_local, k_local, q_global, k_global, v, context, normaliser, bias, chunk=chunk, score=score, scale=scale
    )
    real = (slots < lengths[:, None])[..., None]
    out = out + (jnp.where(real, q_global, 0.0).astype(state.dtype) @ state).astype(v.dtype)
    complete = (slots < (lengths // chunk * chunk)[:, None])[..., None]
    added = jnp.einsum("btd,bte->bde", jnp.where(complete, k_global, 0.0), v, preferred_element_type=state.dtype)
    return out, state + added
