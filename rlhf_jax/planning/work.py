"""What a program has to compute, by formula: the numbers that MFU is measured against, whatever a compiler makes of it.

A token that is read takes two FLOPs for every number of every matrix that it meets (Kaplan et al. 2020, arXiv
2001.08361, section 2.1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B), and attention ``4 H D`` for every key
that it sees. Gradients take twice as much again: 6 for each parameter and token. Nothing is counted for embeddings that
are looked up, for norms, and for what a backward pass computes a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from rlhf_jax.models import Attention, Transformer, boxed_abstract_params


@dataclass(frozen=True)
class Work:
    """FLOPs of all devices together: of products with parameters, and of attention."""

    products: float
    attention: float

    @property
    def flops(self) -> float:
        return self.products + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention)

    def times(self, factor: float) -> Work:
        """So many of it."""
        return Work(self.products * factor, self.attention * factor)

    def trained(self) -> Work:
        """Forward and backward."""
        return self.times(3.0)


def reading(model: Transformer, rows: int, length: int, unembedded: int = 0) -> Work:
    """Reading whole rows at once.

    Args:
        model: the trunk.
        rows: how many.
        length: tokens of each, all of which see those before them and themselves.
        unembedded: positions whose logits are computed.
    """
    matrices = 2.0 * rows * length * body_params(model) + 2.0 * unembedded * model.vocab_size * model.d_model
    seen = sum(_seen(block.mixer, length, model.d_model) for block in model.pattern) * model.repeats
    return Work(matrices, rows * seen)


def sampling(model: Transformer, prompts: int, width: int, copies: int, new: int) -> Work:
    """Reading prompts once and drawing ``copies`` responses of ``new`` tokens to each; the last token is not read."""
    rows = prompts * copies
    first = reading(model, prompts, width, unembedded=prompts)
    decoded = reading(model, rows, width + new - 1)
    read = reading(model, rows, width)
    logits = 2.0 * rows * (new - 1) * model.vocab_size * model.d_model
    return first + Work(decoded.products - read.products + logits, decoded.attention - read.attention)


def body_params(model: Transformer) -> float:
    """Numbers that multiply each token inside the layers; of experts, those of the ones that a token is sent to."""
    boxed = boxed_abstract_params(model)["stack"]
    total = 0.0
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for path, leaf in leaves:
        names, value = (leaf.names, leaf.value) if isinstance(leaf, nn.Partitioned) else ((), leaf)
        if "bias" in jax.tree_util.keystr(path) or len(value.shape) - ("layers" in names) < 2:
            continue  # biases and norms
        share = 1.0
        if "expert" in names:
            share = _top_k(model) / value.shape[names.index("expert")]
        total += share * math.prod(value.shape)
    return total


def _top_k(model: Transformer) -> float:
    chosen = [float(getattr(block.ffn, "top_k", 1)) for block in model.pattern if hasattr(block.ffn, "top_k")]
    return chosen[0] if chosen else 1.0


def _seen(mixer: Any, length: int, d_model: int) -> float:
    """FLOPs of one row's attention; a mixer of another kind counts as nothing beside its parameters."""
    if not isinstance(mixer, Attention):
        return 0.0
    window = length if mixer.window is None else min(mixer.window + mixer.sinks, length)
    keys = window * (window + 1) / 2 + (length - window) * window
    return 4.0 * mixer.heads * mixer.width(d_model) * keys
