"""Softmax attention as a mixer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import RMSNorm, Shared, parameter, product
from rlhf_jax.models.positions import RoPE
from rlhf_jax.ops.attention import Mask, Terms, attention, check_implementation, decode_attention
from rlhf_jax.types import PyTree


class Attention(nn.Module):
    """Softmax attention over the past, with all, grouped or one key/value head.

    Args:
        heads: number of query heads.
        kv_heads: number of key/value heads, which divides ``heads``; None for as many as there are query heads.
        head_dim: width of a head; None for ``d_model // heads``.
        window: see only the last ``window`` tokens, the own one included; None for all.
        qkv_bias: biases on queries, keys and values.
        out_bias: bias on the output projection.
        qk_norm: RMS-normalise queries and keys per head, before the rotation.
        softcap: bound the logits by ``softcap * tanh(logits / softcap)``.
        dropout: of the attention weights.
        implementation: schedule of ``ops.attention``.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    implementation: str = "auto"

    def __post_init__(self):
        if self.heads < 1 or self.groups < 1:
            raise ValueError(f"attention needs at least one head, got heads={self.heads}, kv_heads={self.kv_heads}")
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.groups} key/value heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {self.window}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; None switches it off")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        check_implementation(self.implementation)
        super().__post_init__()

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def width(self, d_model: int) -> int:
        """Width of a head in a model of this width."""
        if self.head_dim is not None:
            return self.head_dim
        if d_model % self.heads:
            raise ValueError(f"d_model {d_model} is not a multiple of {self.heads} heads; set head_dim")
        return d_model // self.heads

    def check(self, d_model: int) -> None:
        """Refuse a model width that the heads do not divide."""
        self.width(d_model)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """Keys and values of one layer, [B, K, S, D]: the order in which decoding reads them."""
        shape = (rows, self.groups, slots, self.width(d_model))
        return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        style, positions = shared.style, shared.queries.positions
        q, k, v = self._project(x, shared)
        if self.qk_norm:
            q, k = RMSNorm(name="query_norm")(q, style), RMSNorm(name="key_norm")(k, style)
        if isinstance(style.position, RoPE):
            q, k = style.position.rotate(q, positions), style.position.rotate(k, positions)
        mask, scale = Mask.ranges(shared.queries, shared.keys, window=self.window), q.shape[-1] ** -0.5
        drop = self.dropout > 0.0 and not shared.deterministic
        if cache is not None:
            assert shared.slot is not None
            cache = {"keys": _write(cache["keys"], k, shared.slot), "values": _write(cache["values"], v, shared.slot)}
            if x.shape[1] == 1 and not drop:
                terms = Terms(scale=scale, softcap=self.softcap)
                mixed = decode_attention(q[:, 0], cache["keys"], cache["values"], mask, terms, self.implementation)
                return self._merge(mixed[:, None], x.shape[-1], shared), cache
            k, v = jnp.swapaxes(cache["keys"], 1, 2), jnp.swapaxes(cache["values"], 1, 2)
        mixed = attention(
            q, k, v, mask,
            scale=scale,
            softcap=self.softcap,
            dropout=self.dropout,
            dropout_key=self.make_rng("dropout") if drop else None,
            implementation=self.implementation,
        )  # fmt: skip
        return self._merge(mixed, x.shape[-1], shared), cache

    def _project(self, x, shared: Shared):
        """Queries [B, T, H, D], keys and values [B, T, K, D] by one product with a kernel grouped by key/value head."""
        style, per_group, width = shared.style, self.heads // self.groups, self.width(x.shape[-1])
        shape = (self.groups, per_group + 2, width)
        axes = ("kv_heads", None, "head_dim")
        kernel = parameter(self, "qkv", (x.shape[-1], *shape), ("embed", *axes), style.init_std, style)
        out = product(x, kernel)
        if self.qkv_bias:
            out = out + parameter(self, "qkv_bias", shape, axes, 0.0, style).reshape(-1)
        parts = jnp.split(out.reshape(*x.shape[:2], *shape), (per_group, per_group + 1), axis=3)
        counts = (self.heads, self.groups, self.groups)
        return tuple(part.reshape(*x.shape[:2], n, width) for part, n in zip(parts, counts, strict=True))

    def _merge(self, mixed, d_model: int, shared: Shared):
        """Project the heads' outputs back into the residual stream."""
        style, (heads, width) = shared.style, mixed.shape[2:]
        axes = ("heads", "head_dim", "embed")
        kernel = parameter(self, "out", (heads, width, d_model), axes, style.residual_std, style)
        y = product(mixed.reshape(*mixed.shape[:2], -1), kernel.reshape(-1, d_model))
        return y + parameter(self, "out_bias", (d_model,), ("embed",), 0.0, style) if self.out_bias else y


def _write(stored: Float[Array, "B K S D"], new: Float[Array, "B T K D"], slot) -> Float[Array, "B K S D"]:
    """Enter the new tokens at ``slot`` and after, the same slots for all rows."""
    return jax.lax.dynamic_update_slice_in_dim(stored, jnp.swapaxes(new, 1, 2).astype(stored.dtype), slot, axis=2)
