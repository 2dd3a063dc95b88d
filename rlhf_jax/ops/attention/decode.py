"""One new query a row over a cache of keys and values."""

from __future__ import annotations

from jaxtyping import Array, Float

from rlhf_jax.ops.attention import reference
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import Terms


def decode_attention(
    q: Float[Array, "B H D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    mask: Mask,
    terms: Terms,
    implementation: str = "auto",
) -> Float[Array, "B H Dv"]:
    """``attention`` of one query a row, over a cache in the order in which decoding reads it fastest."""
    out, _ = reference.attend(q[:, None], keys.swapaxes(1, 2), values.swapaxes(1, 2), mask, terms)
    return out[:, 0]
