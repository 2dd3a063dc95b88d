"""Layers that move information between tokens.

A mixer is a linen module ``mixer(x, shared, cache) -> (y, cache)`` with methods besides: ``empty_cache`` makes the
state of one layer, ``check`` refuses a model width that it cannot serve.
"""

from rlhf_jax.models.mixers.attention import Attention

__all__ = ["Attention"]
