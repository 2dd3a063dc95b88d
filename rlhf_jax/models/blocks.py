"""What a decoder repeats: a block of mixer and feed-forward, and a pattern of blocks."""

from __future__ import annotations

import dataclasses

from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from rlhf_jax.models.layers import Shared, dropped
from rlhf_jax.ops.meshes import constrain_tokens
from rlhf_jax.types import PyTree

Aux = dict[str, Shaped[Array, "layers ..."]]
"""What layers report about themselves, on a leading axis of the layers that report it."""


class Block(nn.Module):
    """A mixer and a feed-forward, each a step of the residual stream. ``ffn=None`` leaves the second out."""

    mixer: nn.Module
    ffn: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], shared: Shared, norm: nn.Module, cache: PyTree | None):
        style, aux = shared.style, {}
        mixer_norm = norm.clone(name="mixer_norm", parent=self)
        y, cache = self.mixer(mixer_norm(x, style) if style.prenorm else x, shared, cache)
        x = x + dropped(self, y, shared)
        x = x if style.prenorm else mixer_norm(x, style)
        if self.ffn is not None:
            ffn_norm = norm.clone(name="ffn_norm", parent=self)
            y, aux = self.ffn(ffn_norm(x, style) if style.prenorm else x, shared)
            x = x + dropped(self, y, shared)
            x = x if style.prenorm else ffn_norm(x, style)
        return x, cache, aux


class Pattern(nn.Module):
    """One round of the pattern of blocks: the body that is repeated."""

    blocks: tuple[Block, ...]
    norm: nn.Module

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        shared: Shared,
        caches: tuple[PyTree, ...] | None,
        routing: Int[Array, "routed B T k"] | None,
    ):
        found, written, routed = [], [], 0
        for index, block in enumerate(self.blocks):
            own = shared
            if routing is not None and routes(block):
                own, routed = dataclasses.replace(shared, routing=routing[routed]), routed + 1
            x, cache, aux = block(x, own, self.norm, None if caches is None else caches[index])
            x = constrain_tokens(x)
            written.append(cache)
            found.append(aux)
        return x, (None if caches is None else tuple(written), tuple(found))


def routes(block: Block) -> bool:
    """Whether the feed-forward is a mixture of experts."""
    return hasattr(block.ffn, "top_k")
