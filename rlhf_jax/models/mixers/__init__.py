"""Layers that move information between tokens.

A mixer is a linen module ``mixer(x, shared, cache) -> (y, cache)`` with methods besides: ``empty_cache`` makes the
state of one layer, ``check`` refuses a model width that it cannot serve.
"""

from rlhf_jax.models.mixers.attention import Attention
from rlhf_jax.models.mixers.flash import FLASH
from rlhf_jax.models.mixers.gated import Constant, Count, Length, Rotary, SoftmaxPlus, Toeplitz
from rlhf_jax.models.mixers.gau import GAU
from rlhf_jax.models.mixers.parallel import Parallel
from rlhf_jax.models.mixers.sparse import Fixed, Strided

__all__ = [
    "Attention",
    "Constant",
    "Count",
    "FLASH",
    "Fixed",
    "GAU",
    "Length",
    "Parallel",
    "Rotary",
    "SoftmaxPlus",
    "Strided",
    "Toeplitz",
]
