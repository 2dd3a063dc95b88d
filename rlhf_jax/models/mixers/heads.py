"""What the patterns of the Sparse Transformer share: their heads, checked, projected, merged, and planned for."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import RMSNorm, Shared, Style, parameter, product
from rlhf_jax.models.positions import ALiBi, Position, RoPE
from rlhf_jax.ops.attention import Case, Terms, alibi_slopes, check_implementation


class Headed(Protocol):
    """The fields of a mixer that ``Heads`` works on."""

    heads: int
    kv_heads: int | None
    head_dim: int | None
    qk_norm: bool
    implementation: str


class Heads:
    """Methods of a mixer with these fields; a plain class, so that each mixer orders its own."""

    def check_heads(self: Headed) -> None:
        """Refuse heads that do not fit together, and a schedule that does not exist."""
        groups = groups_of(self)
        if self.heads < 1 or groups < 1:
            raise ValueError(f"attention needs at least one head, got heads={self.heads}, kv_heads={self.kv_heads}")
        if self.heads % groups:
            raise ValueError(f"{self.heads} query heads are not a multiple of {groups} key/value heads")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}; None for d_model // heads")
        check_implementation(self.implementation)

    def check(self: Headed, d_model: int) -> None:
        """Refuse a model width that the heads do not divide."""
        width_of(self, d_model)

    def check_position(self: Headed, position: Position | None, d_model: int) -> None:
        """Refuse a way of knowing positions that does not fit the heads."""
        if not isinstance(position, RoPE):
            return
        position.check(width_of(self, d_model))
        if position.by_query:
            raise ValueError(
                f"dynamic NTK turns each key anew for each query, which {type(self).__name__} does not; take "
                "RoPE(scaling=NTK(...)) or YaRN"
            )


def groups_of(mixer: Headed) -> int:
    """Number of key/value heads."""
    return mixer.heads if mixer.kv_heads is None else mixer.kv_heads


def width_of(mixer: Headed, d_model: int) -> int:
    """Width of a head in a model of this width."""
    if mixer.head_dim is not None:
        return mixer.head_dim
    if d_model % mixer.heads:
        raise ValueError(f"d_model {d_model} is not a multiple of {mixer.heads} heads; set head_dim")
    return d_model // mixer.heads


def terms_of(mixer: Headed, width: int, shared: Shared) -> Terms:
    """What the logits consist of."""
    slopes = alibi_slopes(mixer.heads) if isinstance(shared.style.position, ALiBi) else None
    return Terms(scale=width**-0.5, slopes=slopes)


def case_of(mixer: Headed, d_model: int, style: Style, platform: str, device: str) -> Case:
    """One attention of the mixer over some of its keys, whose rows and lengths are still 0; see ``part``."""
    width = width_of(mixer, d_model)
    return Case(
        platform, device, 0, 0, 0, mixer.heads, groups_of(mixer), width, width, jnp.dtype(style.dtype).name,
        slopes=isinstance(style.position, ALiBi), lse=True,
    )  # fmt: skip


def part(case: Case, rows: int, length: int, slots: int, **facts) -> Case:
    """This case with so many rows of queries over keys."""
    return dataclasses.replace(case, rows=rows, length=length, slots=slots, **facts)


def named(parts: dict[str, str]) -> str:
    """The implementations of the parts of a layer: one name where all have the same, else each with its part."""
    names = list(dict.fromkeys(parts.values()))
    return names[0] if len(names) == 1 else ", ".join(f"{name} for {what}" for what, name in parts.items())


def project(mixer, x: Float[Array, "B T E"], shared: Shared) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, D], keys and values [B, T, K, D], rotated to their positions."""
    style, positions, groups = shared.style, shared.queries.positions, groups_of(mixer)
    per_group, width = mixer.heads // groups, width_of(mixer, x.shape[-1])
    shape, axes = (groups, per_group + 2, width), ("kv_heads", None, "head_dim")
    kernel = parameter(mixer, "qkv", (x.shape[-1], *shape), ("embed", *axes), style.init_std, style)
    parts = jnp.split(product(x, kernel), (per_group, per_group + 1), axis=3)
    counts = (mixer.heads, groups, groups)
    q, k, v = (part.reshape(*x.shape[:2], n, width) for part, n in zip(parts, counts, strict=True))
    if mixer.qk_norm:
        q = RMSNorm(name="query_norm", parent=mixer)(q, style)
        k = RMSNorm(name="key_norm", parent=mixer)(k, style)
    if isinstance(style.position, RoPE):
        q, k = style.position.rotate(q, positions), style.position.rotate(k, positions)
    return q, k, v


def merged(mixer: nn.Module, mixed: Float[Array, "B T H D"], d_model: int, shared: Shared) -> Float[Array, "B T E"]:
    """Project the heads' outputs back into the residual stream."""
    style, (heads, width) = shared.style, mixed.shape[2:]
    axes = ("heads", "head_dim", "embed")
    kernel = parameter(mixer, "out", (heads, width, d_model), axes, style.residual_std, style)
    return product(mixed.reshape(*mixed.shape[:2], -1), kernel.reshape(-1, d_model))
