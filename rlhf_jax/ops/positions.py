"""Position encodings as pure functions of arbitrary integer positions: rotary and sinusoidal.

Extrapolation rules (interpolation, NTK, YaRN) are left out: they change the frequencies, not the rotation.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(positions: Int[Array, "B T"], width: int, base: float) -> Float[Array, "B T half"]:
    """The angle ``position * base^(-2i / width)`` of each pair ``i`` of a head's dimensions."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[..., None].astype(jnp.float32) * frequencies


def apply_rope(
    x: Float[Array, "B T *heads D"], angles: Float[Array, "B T half"], *, interleaved: bool = False
) -> Float[Array, "B T *heads D"]:
    """Rotate each pair of dimensions by its angle (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Args:
        x: queries or keys with any number of axes between the tokens and the head width.
        angles: of ``rope_angles``.
        interleaved: pairs are neighbours ``(2i, 2i+1)`` as in GPT-J; otherwise ``(i, i + D/2)`` as in GPT-NeoX and
            Llama. The two differ by a fixed permutation of the dimensions.
    """
    between = (1,) * (x.ndim - 3)
    angles = angles.reshape(*angles.shape[:2], *between, angles.shape[-1])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return out.astype(x.dtype)


def sinusoidal(positions: Int[Array, "B T"], width: int, base: float = 10_000.0) -> Float[Array, "B T E"]:
    """``sin`` in the even and ``cos`` in the odd dimensions (Vaswani et al. 2017, section 3.5)."""
    angles = rope_angles(positions, width, base)
    pairs = jnp.stack((jnp.sin(angles), jnp.cos(angles)), axis=-1)
    return pairs.reshape(*positions.shape, -1)[..., :width]
