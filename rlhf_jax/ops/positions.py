"""Position encodings as pure functions of integer positions: rotary with its extrapolation rules, and sinusoidal.

An extrapolation rule changes the frequencies, never the rotation. Frequencies are [half], one for each pair of a head's
dimensions, or [B, T, half] where they depend on the token.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_frequencies(width: int, base: float) -> Float[Array, " half"]:
    """``base^(-2i / width)`` for each pair ``i`` (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def rope_angles(positions: Int[Array, "B T"], width: int, base: float) -> Float[Array, "B T half"]:
    """The angle ``position * base^(-2i / width)`` of each pair ``i`` of a head's dimensions."""
    return positions[..., None].astype(jnp.float32) * rope_frequencies(width, base)


def apply_rope(
    x: Float[Array, "B T *heads D"],
    angles: Float[Array, "B T half"],
    *,
    interleaved: bool = False,
    amplitude: float = 1.0,
) -> Float[Array, "B T *heads D"]:
    """Rotate each pair of dimensions by its angle (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Args:
        x: queries or keys with any number of axes between the tokens and the head width.
        angles: of ``rope_angles``.
        interleaved: pairs are neighbours ``(2i, 2i+1)`` as in GPT-J; otherwise ``(i, i + D/2)`` as in GPT-NeoX and
            Llama. The two differ by a fixed permutation of the dimensions.
        amplitude: factor on sines and cosines.
    """
    between = (1,) * (x.ndim - 3)
    angles = angles.reshape(*angles.shape[:2], *between, angles.shape[-1])
    cos, sin = amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return out.astype(x.dtype)


def ntk_frequencies(
    width: int, base: float, factor: float | Float[Array, "B T"]
) -> Float[Array, " half"] | Float[Array, "B T half"]:
    """Frequencies of the base ``base * factor^(width / (width - 2))`` (NTK-aware scaling; bloc97 2023).

    The fastest pair keeps its frequency and the slowest is slowed down by ``factor``. A factor for each token gives
    frequencies for each token.
    """
    slower = -jnp.arange(0, width, 2, dtype=jnp.float32) / (width - 2)
    return rope_frequencies(width, base) * jnp.asarray(factor, jnp.float32)[..., None] ** slower


def dynamic_ntk_factor(lengths: Int[Array, "B T"], factor: float, original_length: int) -> Float[Array, "B T"]:
    """``factor * length / original_length - (factor - 1)`` beyond the original length, 1 up to it (emozilla 2023)."""
    relative = lengths.astype(jnp.float32) / original_length
    return jnp.where(lengths > original_length, factor * relative - (factor - 1.0), 1.0)


def yarn_frequencies(
    width: int, base: float, factor: float, original_length: int, fast: float = 32.0, slow: float = 1.0
) -> Float[Array, " half"]:
    """NTK-by-parts of YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2).

    Pairs that turn more than ``fast`` times within the original length keep their frequency, those that turn less than
    ``slow`` times are slowed down by ``factor``, and a linear ramp over the pairs' numbers lies between.
    """

    def pair(turns: float) -> float:
        """The (fractional) number of the pair that turns so often."""
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    steps = jnp.arange(width // 2, dtype=jnp.float32) - low
    ramp = jnp.clip(steps / (high - low if high > low else 0.001), 0.0, 1.0)
    plain = rope_frequencies(width, base)
    return plain * (1.0 - ramp) + plain / factor * ramp


def yarn_amplitude(factor: float) -> float:
    """``0.1 ln(factor) + 1``: multiplies sines and cosines, so logits grow by its square (YaRN, equation 22)."""
    return 0.1 * math.log(factor) + 1.0


def llama3_frequencies(
    width: int, base: float, factor: float, original_length: int, low: float = 1.0, high: float = 4.0
) -> Float[Array, " half"]:
    """Llama 3.1's rule: slow pairs are slowed down by ``factor``, fast ones kept (https://arxiv.org/abs/2407.21783).

    Slow is a wavelength above ``original_length / low``, fast one below ``original_length / high``; the frequencies
    between are mixed linearly in the number of turns within the original length.
    """
    plain = rope_frequencies(width, base)
    turns = original_length * plain / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * kept + plain / factor * (1.0 - kept)


def sinusoidal(positions: Int[Array, "B T"], width: int, base: float = 10_000.0) -> Float[Array, "B T E"]:
    """``sin`` in the even and ``cos`` in the odd dimensions (Vaswani et al. 2017, section 3.5)."""
    angles = rope_angles(positions, width, base)
    pairs = jnp.stack((jnp.sin(angles), jnp.cos(angles)), axis=-1)
    return pairs.reshape(*positions.shape, -1)[..., :width]
