"""FLASH, the gated attention unit of linear cost ("Transformer Quality in Linear Time"). It is not FlashAttention."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.mixers import gated as unit
from rlhf_jax.models.mixers.gated import Bias, Constant, Count, Rotary
from rlhf_jax.models.positions import Position
from rlhf_jax.ops.flash import FLASH_IMPLEMENTATIONS, flash_attention
from rlhf_jax.ops.flash_state import FlashState, extend
from rlhf_jax.ops.gau import GauCase, Relu2, Score, check_implementation, choose
from rlhf_jax.types import PyTree


class FLASH(nn.Module):
    """Gated attention inside chunks, and a linear sum over earlier chunks (Hua et al. 2022, arXiv 2202.10447).

    A document's chunks begin at the multiples of ``chunk`` of its positions. Queries and keys of both parts are four
    versions of one narrow projection, all turned by the model's rotation. The state for decoding has a constant size: a
    matrix of ``key_dim`` by ``expansion d_model`` numbers in fp32, and the tokens of the open chunk.

    Args:
        expansion: width of the values and of the gate, in widths of the model.
        key_dim: width of queries and keys.
        chunk: tokens of a chunk; 256 was best in the paper.
        score: ``Relu2`` or ``Laplace``, inside chunks.
        normaliser: ``Count`` divides each part by the number of keys that it sums over; ``Constant`` divides both by
            the same number (``Constant(chunk)`` is common), so that the linear part grows with the document.
        bias: by distance, ``Toeplitz`` or ``Rotary``, inside chunks; None for none.
        implementation: schedule of ``ops.flash``.
    """

    expansion: float = 2.0
    key_dim: int = 128
    chunk: int = 256
    score: Score = Relu2()
    normaliser: Count | Constant = Count()
    bias: Bias | None = None
    implementation: str = "auto"

    def __post_init__(self):
        unit.check_unit(self.expansion, self.key_dim, self.bias)
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
        if not isinstance(self.score, Score):
            raise ValueError(f"FLASH scores by Relu2() or Laplace(), got {self.score}")
        if not isinstance(self.normaliser, Count | Constant):
            raise ValueError(
                f"FLASH divides by Count() or Constant(tokens), got {self.normaliser}; a length that is only known at "
                "the end of the document would make prefill and decoding differ"
            )
        check_implementation(self.implementation, FLASH_IMPLEMENTATIONS)
        super().__post_init__()

    def check(self, d_model: int) -> None:
        """Refuse a model width that the expansion does not take to a whole number."""
        unit.value_width(self.expansion, d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse a way of knowing positions that does not fit."""
        unit.check_position(position, self.key_dim)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """A matrix and one chunk of tokens a row, however many slots there are (fewer tokens if ``slots`` is)."""
        width = unit.value_width(self.expansion, d_model)
        return FlashState.empty(rows, min(self.chunk, slots), self.key_dim, width, dtype)

    def plan(
        self, rows: int, length: int, d_model: int, style: Style, platform: str, device: str, packed: bool = False
    ) -> dict[str, str]:
        """The implementation that training and prefill get, decoding has none to choose; as in ``Attention.plan``."""
        length = -(-length // self.chunk) * self.chunk
        case = GauCase(
            platform, device, rows, length, length, self.key_dim, unit.value_width(self.expansion, d_model),
            jnp.dtype(style.dtype).name, self.score,
            bias=self.bias is not None, aligned=not packed, chunk=self.chunk, packed=packed,
        )  # fmt: skip
        prefill = dataclasses.replace(case, aligned=True, packed=False, state=True)
        uses = {"training": case, "prefill": prefill}
        return {use: choose(self.implementation, each, FLASH_IMPLEMENTATIONS) for use, each in uses.items()}

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T d"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T d"], PyTree | None]:
        style, context = shared.style, shared.queries
        u, v, copies = unit.project(self, x, self.expansion, self.key_dim, 4, style)
        q_local, k_local, q_global, k_global = unit.turned(copies, context.positions, style)
        here = context.positions % self.chunk + 1
        before = jnp.maximum(context.positions + 1 - here, 1)
        if isinstance(self.normaliser, Constant):
            here = before = jnp.full(here.shape, self.normaliser.tokens, jnp.float32)
        tokens = (q_local, k_local, unit.times(q_global, 1.0 / before), k_global, v)
        settings = {
            "chunk": self.chunk,
            "score": self.score,
            "scale": self.key_dim**-0.5,
            "normaliser": here.astype(jnp.float32),
            "bias": self._table(style),
            "implementation": self.implementation,
        }
        if cache is None:
            mixed = flash_attention(*tokens, context, **settings)
        else:
            mixed, cache = extend(cache, *tokens, context.segments != 0, **settings)
        return unit.gated(self, u, mixed, x.shape[-1], style), cache

    def _table(self, style: Style) -> Float[Array, " R"] | None:
        """The biases by distance, which are all below the chunk."""
        if isinstance(self.bias, Rotary):
            return unit.rotary_table(self, self.key_dim, self.chunk, style)
        return unit.table(self, self.bias, style)
