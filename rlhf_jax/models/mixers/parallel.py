"""Several mixers side by side in one layer: heads that are divided among patterns."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.positions import Position
from rlhf_jax.types import PyTree


class Parallel(nn.Module):
    """Several mixers on the same input, their outputs added: the heads of one layer divided among patterns.

    A head's output and its part of the output projection are added to those of the other heads in any case, so
    ``Parallel((Attention(4, head_dim=32, window=64), Strided(4, 64, head_dim=32)))`` is one layer of 8 heads, half of
    them local. Give each part its ``head_dim``: the default divides the width of the model by the heads of that part.
    """

    mixers: tuple[nn.Module, ...]

    def __post_init__(self):
        if not self.mixers:
            raise ValueError("Parallel has no mixers; give it at least one")
        super().__post_init__()

    def check(self, d_model: int) -> None:
        """Refuse what one of the mixers refuses."""
        for mixer in self.mixers:
            mixer.check(d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse what one of the mixers refuses."""
        for mixer in self.mixers:
            mixer.check_position(position, d_model)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """The states of the mixers."""
        return tuple(mixer.empty_cache(rows, slots, d_model, dtype) for mixer in self.mixers)

    def plan(
        self, rows: int, length: int, d_model: int, style: Style, platform: str, device: str, packed: bool = False
    ) -> dict[str, str]:
        """What each use of each mixer gets, in their order; arguments and errors as in ``Attention.plan``."""
        found: dict[str, list[str]] = {}
        for mixer in self.mixers:
            if hasattr(mixer, "plan"):
                uses = mixer.plan(rows, length, d_model, style, platform, device, packed=packed)
                for use, name in uses.items():
                    found.setdefault(use, []).append(f"{type(mixer).__name__} {name}")
        return {use: "; ".join(names) for use, names in found.items()}

    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        states = (None,) * len(self.mixers) if cache is None else cache
        total, written = jnp.zeros_like(x), []
        for mixer, state in zip(self.mixers, states, strict=True):
            y, state = mixer(x, shared, state)
            total = total + y
            written.append(state)
        return total, (None if cache is None else tuple(written))
