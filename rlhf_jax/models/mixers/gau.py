"""The gated attention unit: one wide head that is mixer and feed-forward in one, of quadratic cost."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.mixers import gated as unit
from rlhf_jax.models.mixers.caches import Kept, ring
from rlhf_jax.models.mixers.gated import Bias, Constant, Count, Length, Normaliser, Rotary, SoftmaxPlus, Toeplitz
from rlhf_jax.models.positions import Position
from rlhf_jax.ops import attention as softmax
from rlhf_jax.ops.attention import Case, Mask, Terms, decode_attention
from rlhf_jax.ops.attention.decode import choose_decoder
from rlhf_jax.ops.gau import GAU_IMPLEMENTATIONS, GauCase, Relu2, Score, check_implementation, choose, gau_attention
from rlhf_jax.types import Context, PyTree


class GAU(nn.Module):
    """Gated attention (Hua et al. 2022, arXiv 2202.10447), for a block without a feed-forward.

    The logits are ``q k' / sqrt(key_dim)`` plus the bias; scores are divided as ``normaliser`` says. The state for
    decoding is one key and one value a token: ``key_dim + expansion d_model`` numbers.

    Args:
        expansion: width of the values and of the gate, in widths of the model.
        key_dim: width of queries and keys.
        score: ``Relu2``, ``Laplace`` or ``SoftmaxPlus``.
        normaliser: ``Count``, ``Constant`` or, where nothing decodes, ``Length``; ``SoftmaxPlus`` has none beside it.
        bias: by distance, ``Toeplitz`` or ``Rotary``; None for none.
        window: see only the last ``window`` tokens, the own one included; None for all.
        implementation: schedule of ``ops.gau``, or of ``ops.attention`` for ``SoftmaxPlus``.
    """

    expansion: float = 2.0
    key_dim: int = 128
    score: Score | SoftmaxPlus = Relu2()
    normaliser: Normaliser = Count()
    bias: Bias | None = None
    window: int | None = None
    implementation: str = "auto"

    def __post_init__(self):
        unit.check_unit(self.expansion, self.key_dim, self.bias)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {self.window}")
        if isinstance(self.score, SoftmaxPlus):
            softmax.check_implementation(self.implementation)
            if isinstance(self.bias, Toeplitz):
                raise ValueError("SoftmaxPlus has no table of biases in softmax attention; take bias=Rotary() or None")
            if not isinstance(self.normaliser, Count):
                raise ValueError(f"SoftmaxPlus normalises itself; leave out normaliser={self.normaliser}")
        else:
            check_implementation(self.implementation, GAU_IMPLEMENTATIONS)
        super().__post_init__()

    def check(self, d_model: int) -> None:
        """Refuse a model width that the expansion does not take to a whole number."""
        unit.value_width(self.expansion, d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse a way of knowing positions that does not fit."""
        unit.check_position(position, self.key_dim)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """Keys [B, S, key_dim] and values [B, S, E]; with a window, of the last ``window`` positions.

        Raises:
            ValueError: the normaliser needs to know how long the documents become.
        """
        if isinstance(self.normaliser, Length):
            raise ValueError(
                "the normaliser Length() divides by a length that is not known while decoding, so the model cannot "
                "sample what it would score; train with normaliser=Count() or Constant(tokens)"
            )
        widths = {"keys": self.key_dim, "values": unit.value_width(self.expansion, d_model)}
        if self.window is not None:
            kept = min(self.window, slots)
            return Kept.empty(rows, kept, dtype, **{name: (width,) for name, width in widths.items()})
        return {name: jnp.zeros((rows, slots, width), dtype) for name, width in widths.items()}

    def plan(
        self, rows: int, length: int, d_model: int, style: Style, platform: str, device: str, packed: bool = False
    ) -> dict[str, str]:
        """The implementation that each use of this layer gets; arguments and errors as in ``Attention.plan``."""
        width = 2 * self.key_dim if isinstance(self.bias, Rotary) else self.key_dim
        values, dtype = unit.value_width(self.expansion, d_model), jnp.dtype(style.dtype).name
        kept = length if self.window is None else min(self.window, length)
        chunk = length if self.window is None else kept + length
        # Queries, keys, and whether the keys are the queries' own.
        uses = {"training": (length, length, not packed), "prefill": (length, chunk, False), "decode": (1, kept, False)}
        found = {}
        for use, (queries, slots, aligned) in uses.items():
            if isinstance(self.score, SoftmaxPlus):
                case = Case(
                    platform, device, rows, queries, slots, 1, 1, width, values, dtype,
                    window=self.window, aligned=aligned,
                )  # fmt: skip
                pick = choose_decoder if use == "decode" else softmax.choose
                found[use] = pick(self.implementation, case)
            else:
                case = GauCase(
                    platform, device, rows, queries, slots, width, values, dtype, self.score,
                    bias=isinstance(self.bias, Toeplitz), aligned=aligned,
                )  # fmt: skip
                found[use] = choose(self.implementation, case, GAU_IMPLEMENTATIONS)
        return found

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T d"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T d"], PyTree | None]:
        style = shared.style
        queries = keys = shared.queries  # one value, by which masks know that keys are the queries' own tokens
        u, v, copies = unit.project(self, x, self.expansion, self.key_dim, 2, style)
        q, k = unit.turned(copies, queries.positions, style)
        if cache is not None:
            k, v, keys, cache = self._remember(k, v, shared, cache)
        mixed = self._mix(q, k, v, queries, keys, shared)
        return unit.gated(self, u, mixed, x.shape[-1], style), cache

    def _remember(self, k: Float[Array, "B T D"], v: Float[Array, "B T E"], shared: Shared, cache: PyTree):
        """Enter new keys and values; the keys and values to attend to, and where they stand."""
        if isinstance(cache, Kept):
            assert self.window is not None
            slots = ring(shared.queries.positions, self.window)
            later = cache.write(shared.queries, slots, keys=k, values=v)
            if k.shape[1] == 1:
                seen, keys = later.contents, later.context
            else:
                seen, keys = cache.beside(shared.queries, keys=k, values=v)
            return seen["keys"], seen["values"], keys, later
        assert shared.slot is not None
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], new.astype(cache[name].dtype), shared.slot, axis=1)
            for name, new in (("keys", k), ("values", v))
        }
        return cache["keys"], cache["values"], shared.keys, cache

    def _mix(
        self,
        q: Float[Array, "B T D"],
        k: Float[Array, "B S D"],
        v: Float[Array, "B S E"],
        queries: Context,
        keys: Context,
        shared: Shared,
    ) -> Float[Array, "B T E"]:
        """The sum over the visible values."""
        scale, style = self.key_dim**-0.5, shared.style
        visible = queries.positions + 1
        visible = visible if self.window is None else jnp.minimum(visible, self.window)
        mask = Mask.ranges(queries, keys, window=self.window)
        if isinstance(self.score, SoftmaxPlus):
            q = unit.times(q, jnp.log(visible) / math.log(self.score.base))
            q, k = unit.with_rotary_bias(self, self.bias, q, k, queries, keys, scale, style)
            if q.shape[1] == 1:
                terms = Terms(scale=scale)
                return decode_attention(q, k[:, None], v[:, None], mask, terms, self.implementation)
            heads = (q[:, :, None], k[:, :, None], v[:, :, None])
            return softmax.attention(*heads, mask, scale=scale, implementation=self.implementation)[:, :, 0]
        divisor = visible if isinstance(self.normaliser, Count) else 1.0
        if isinstance(self.normaliser, Constant):
            divisor = self.normaliser.tokens
        if isinstance(self.normaliser, Length):
            q = unit.times(q, math.sqrt(self.key_dim) / unit.document_lengths(queries))
        q, k = unit.with_rotary_bias(self, self.bias, q, k, queries, keys, scale, style)
        return gau_attention(
            q, k, v, mask,
            score=self.score,
            scale=scale,
            normaliser=divisor,
            bias=unit.table(self, self.bias, style),
            implementation=self.implementation,
        )  # fmt: skip
