"""How a model knows where its tokens stand: values for ``Transformer(position=...)``.

Learned and sinusoidal vectors are added to the embeddings; RoPE turns queries and keys (any mixer: ``rotate``); ALiBi
is a term of the attention logits; None leaves it to the causal mask. RoPE takes one of the rules of extrapolation as
its ``scaling``, so a model can be run, or trained on, beyond the length that it was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops import positions as ops


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
class ALiBi:
    """No vectors and no rotation: each head's logits fall linearly with the distance (Press et al. 2021, 2108.12409).

    The slopes are those of ``ops.attention.alibi_slopes`` and are not trained. Only softmax attention serves it.
    """


@dataclass(frozen=True)
class Linear:
    """Position interpolation: positions are divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def __post_init__(self):
        _check_factor(self)

    def frequencies(self, width: int, base: float) -> Float[Array, " half"]:
        """Of each pair of a head's dimensions."""
        return ops.rope_frequencies(width, base) / self.factor


@dataclass(frozen=True)
class NTK:
    """NTK-aware scaling: the base grows so that the slowest pair alone is slowed down by ``factor``."""

    factor: float

    def __post_init__(self):
        _check_factor(self)

    def frequencies(self, width: int, base: float) -> Float[Array, " half"]:
        """Of each pair of a head's dimensions."""
        return ops.ntk_frequencies(width, base, self.factor)


@dataclass(frozen=True)
class DynamicNTK:
    """NTK-aware scaling whose strength follows the text: none up to ``original_length``, more the longer it gets.

    The scale of a query at position ``t`` is that of a text of ``t + 1`` tokens, and all keys that it sees are turned
    with it. Taking the scale of the whole row instead, as is common, would let later tokens change the past, and keys
    that were cached with an earlier scale would no longer fit; so prefill and decoding would not give what a full pass
    gives. The price: keys are cached unturned and turned at each reading, and training on rows longer than
    ``original_length`` turns them once for each query. Only softmax attention serves it.
    """

    original_length: int
    factor: float = 1.0

    def __post_init__(self):
        _check_factor(self)

    def frequencies(self, width: int, base: float, lengths: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        """Of each pair of a head's dimensions, in a text of so many tokens."""
        factor = ops.dynamic_ntk_factor(lengths, self.factor, self.original_length)
        return ops.ntk_frequencies(width, base, factor)


@dataclass(frozen=True)
class YaRN:
    """NTK-by-parts with an attention temperature (Peng et al. 2023, arXiv 2309.00071).

    Args:
        factor: how much longer the texts become.
        original_length: the length that the model was trained for.
        fast: pairs with at least so many turns within the original length keep their frequency.
        slow: pairs with at most so many turns are slowed down by ``factor``.
        amplitude: factor on turned queries and keys; None for the published ``0.1 ln(factor) + 1``.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float | None = None

    def __post_init__(self):
        _check_factor(self)
        if not 0.0 < self.slow < self.fast:
            raise ValueError(f"YaRN needs 0 < slow < fast, got slow={self.slow}, fast={self.fast}")
        if self.amplitude is not None and self.amplitude <= 0.0:
            raise ValueError(f"amplitude must be positive, got {self.amplitude}; None takes the published one")

    def frequencies(self, width: int, base: float) -> Float[Array, " half"]:
        """Of each pair of a head's dimensions."""
        return ops.yarn_frequencies(width, base, self.factor, self.original_length, self.fast, self.slow)


@dataclass(frozen=True)
class Llama3:
    """The rule of Llama 3.1 and later (arXiv 2407.21783): slow pairs are slowed down by ``factor``, fast ones kept.

    Args:
        factor: how much longer the texts become.
        original_length: the length that the model was trained for.
        low: pairs with at most so many turns within the original length are slowed down.
        high: pairs with at least so many turns keep their frequency.
    """

    factor: float = 8.0
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        _check_factor(self)
        if not 0.0 < self.low < self.high:
            raise ValueError(f"Llama3 needs 0 < low < high, got low={self.low}, high={self.high}")

    def frequencies(self, width: int, base: float) -> Float[Array, " half"]:
        """Of each pair of a head's dimensions."""
        return ops.llama3_frequencies(width, base, self.factor, self.original_length, self.low, self.high)


Scaling = Linear | NTK | DynamicNTK | YaRN | Llama3
"""Rules of extrapolation for RoPE."""


@dataclass(frozen=True)
class RoPE:
    """Queries and keys turned by an angle proportional to their position.

    Args:
        base: pairs turn by ``base^(-2i / D)`` a token.
        interleaved: pairs are neighbours (GPT-J); otherwise ``(i, i + D/2)`` (GPT-NeoX, Llama).
        scaling: a rule of extrapolation.
    """

    base: float = 10_000.0
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self):
        if self.base <= 1.0:
            raise ValueError(f"the base of RoPE must be above 1, got {self.base}")

    @property
    def by_query(self) -> bool:
        """Whether the angle of a key depends on the query that sees it, so that keys cannot be kept turned."""
        return isinstance(self.scaling, DynamicNTK)

    def unscaled(self, length: int) -> bool:
        """Whether ``by_query`` makes no difference to rows of this length."""
        return isinstance(self.scaling, DynamicNTK) and length <= self.scaling.original_length

    def check(self, width: int) -> None:
        """Refuse a head width that cannot be turned in pairs."""
        if width % 2:
            raise ValueError(f"RoPE turns pairs of dimensions; heads of {width} cannot be paired; set an even head_dim")
        if width < 4 and isinstance(self.scaling, NTK | DynamicNTK):
            raise ValueError(f"NTK-aware scaling needs heads of at least 4 dimensions, got {width}")

    def rotate(
        self,
        x: Float[Array, "B T *heads D"],
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B #T"] | None = None,
    ) -> Float[Array, "B T *heads D"]:
        """Turn queries or keys.

        Args:
            x: with any number of axes between the tokens and the width.
            positions: of the tokens.
            lengths: of the text that the scale is for: the query's position + 1. Needed where ``by_query``, and
                without effect elsewhere.
        """
        width, scaling = x.shape[-1], self.scaling
        self.check(width)
        if scaling is None:
            frequencies = ops.rope_frequencies(width, self.base)
        elif isinstance(scaling, DynamicNTK):
            if lengths is None:
                raise ValueError(
                    "dynamic NTK turns each key anew for each query, which only softmax attention does; take "
                    "RoPE(scaling=NTK(...)) or YaRN"
                )
            frequencies = scaling.frequencies(width, self.base, lengths)
        else:
            frequencies = scaling.frequencies(width, self.base)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return ops.apply_rope(x, angles, interleaved=self.interleaved, amplitude=self._amplitude)

    @property
    def _amplitude(self) -> float:
        if not isinstance(self.scaling, YaRN):
            return 1.0
        given = self.scaling.amplitude
        return ops.yarn_amplitude(self.scaling.factor) if given is None else given


Position = Learned | Sinusoidal | RoPE | ALiBi


def _check_factor(scaling: Scaling) -> None:
    name = type(scaling).__name__
    if not scaling.factor >= 1.0:
        raise ValueError(f"{name} lengthens texts by a factor of at least 1, got {scaling.factor}")
    length = getattr(scaling, "original_length", 1)
    if length < 1:
        raise ValueError(f"original_length of {name} must be at least 1 token, got {length}")
