"""How a model knows where its tokens stand: values for ``Transformer(position=...)``."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from rlhf_jax.ops.positions import apply_rope, rope_angles


@dataclass(frozen=True)
class Learned:
    """A trained vector for each of the model's ``max_length`` positions, added to the embeddings (GPT-1, 2, 3)."""

    std: float = 0.01


@dataclass(frozen=True)
class Sinusoidal:
    """Fixed sines and cosines added to the embeddings.

    ``amplitude`` 1 is that of the original Transformer, whose embeddings have unit variance; embeddings drawn with
    standard deviation 0.02 want it much smaller.
    """

    base: float = 10_000.0
    amplitude: float = 0.02


@dataclass(frozen=True)
class RoPE:
    """Queries and keys turned by an angle proportional to their position."""

    base: float = 10_000.0
    interleaved: bool = False

    def rotate(self, x: Float[Array, "B T *heads D"], positions: Int[Array, "B T"]) -> Float[Array, "B T *heads D"]:
        """Turn queries or keys."""
        return apply_rope(x, rope_angles(positions, x.shape[-1], self.base), interleaved=self.interleaved)


Position = Learned | Sinusoidal | RoPE
