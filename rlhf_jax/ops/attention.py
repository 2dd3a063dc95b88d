"""Softmax attention, and the mask that says who sees whom.

A mask is a value: one half-open range of key *positions* per query, inside the query's own segment. Causality, sliding
windows, bidirectional prefixes, packing, ragged rows and the gaps of a cache are all such ranges, so every
implementation takes the same O(T + S) description; ``dense()`` is its plain form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Context

_HIDDEN = -1e30
"""Logit of a hidden key: finite, so that differences of two of them are not NaN."""


@struct.dataclass
class Mask:
    """Query ``t`` of row ``b`` sees the keys of its segment whose position lies in ``[start, end)``.

    Queries and keys of segment 0 (padding, unused cache slots) see nothing and are seen by nobody.
    """

    start: Int[Array, "B T"]
    end: Int[Array, "B T"]
    query_segments: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    key_segments: Int[Array, "B S"]

    @classmethod
    def causal(
        cls,
        queries: Context,
        keys: Context,
        *,
        window: int | None = None,
        prefix: Int[Array, " ..."] | int = 0,
    ) -> Mask:
        """Each token sees itself and the past of its segment.

        Args:
            queries: where the queries stand.
            keys: where the keys stand (the same value without a cache).
            window: see only the last ``window`` positions, the own one included.
            prefix: the first ``prefix`` positions of a segment also see each other forwards (broadcasts to [B, T]).
        """
        positions = queries.positions
        start = jnp.zeros_like(positions) if window is None else jnp.maximum(positions - window + 1, 0)
        end = jnp.where(positions < prefix, jnp.maximum(positions + 1, prefix), positions + 1)
        return cls(start, end, queries.segments, keys.positions, keys.segments)

    def dense(self) -> Bool[Array, "B T S"]:
        """Whether each query sees each key."""
        keys = self.key_positions[:, None, :]
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        inside = (keys >= self.start[:, :, None]) & (keys < self.end[:, :, None])
        return same & inside & (self.query_segments[:, :, None] != 0)


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "reference",
) -> Float[Array, "B T H D"]:
    """``softmax(scale * q kᵀ) v`` over the keys that the mask shows; query head ``h`` reads key head ``h // (H/K)``.

    The softmax is computed in fp32. A query that sees nothing gets 0 and passes finite gradients.

    Args:
        q: queries.
        k: keys; ``H`` is a multiple of ``K``.
        v: values.
        mask: who sees whom.
        scale: factor on the logits, usually ``D ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the mask.
        dropout: probability of dropping a weight; needs ``dropout_key``.
        dropout_key: randomness of the dropout; none is applied without it.
        implementation: the schedule of the computation; never its meaning.
    """
    check_implementation(implementation)
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    grouped = (q * scale).reshape(rows, length, groups, heads // groups, width)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    # Added rather than selected: the sum with a finite number of this size is that number, and needs no residual.
    logits = logits + jnp.where(mask.dense(), 0.0, _HIDDEN)[:, None, None]
    # A row without keys keeps a maximum far above its logits, so that all its weights are exactly 0.
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), _HIDDEN / 2))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1)
    if dropout > 0.0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    mixed = mixed / jnp.where(total == 0.0, 1.0, total).transpose(0, 3, 1, 2)[..., None]
    return mixed.reshape(q.shape).astype(q.dtype)


def check_implementation(name: str) -> None:
    """Refuse a schedule that does not exist."""
    if name != "reference":
        raise ValueError(f"unknown attention implementation {name!r}; expected 'reference'")
