"""Softmax attention as a mixer: heads, windows, sinks, caps, and the smallest state that decodes each exactly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import RMSNorm, Shared, Style, parameter, product
from rlhf_jax.models.mixers.caches import Kept, ring
from rlhf_jax.models.positions import ALiBi, Position, RoPE
from rlhf_jax.ops.attention import (
    Case,
    Mask,
    Rule,
    Terms,
    alibi_slopes,
    attention,
    check_across,
    check_implementation,
    choose,
    decode_attention,
)
from rlhf_jax.ops.attention.decode import choose_decoder
from rlhf_jax.types import Context, PyTree


class Attention(nn.Module):
    """Softmax attention over the past, with all, grouped or one key/value head.

    The state for decoding is the keys and values of all slots; with a ``window``, of the last ``window`` positions and
    of the sinks, however long the row gets.

    Args:
        heads: number of query heads.
        kv_heads: number of key/value heads, which divides ``heads``; None for as many as there are query heads.
        head_dim: width of a head; None for ``d_model // heads``.
        window: see only the last ``window`` tokens, the own one included; None for all.
        sinks: the first ``sinks`` tokens of a document are seen besides the window (Xiao et al. 2023, StreamingLLM,
            arXiv 2309.17453; 4 there). They keep their true positions, also where these lie far back.
        sink_logits: each query head has a trained logit, 0 at first, that takes part in the softmax without a value, so
            that the head can attend to nothing.
        qkv_bias: biases on queries, keys and values.
        out_bias: bias on the output projection.
        qk_norm: RMS-normalise queries and keys per head, before the rotation.
        softcap: bound the logits by ``softcap * tanh(logits / softcap)``.
        dropout: of the attention weights.
        implementation: schedule of ``ops.attention``.
        across: how keys reach queries on other devices, where a layout splits the tokens of a row: "gather", "ring", or
            "auto" to decide by the memory.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    sinks: int = 0
    sink_logits: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    implementation: str = "auto"
    across: str = "auto"

    def __post_init__(self):
        if self.heads < 1 or self.groups < 1:
            raise ValueError(f"attention needs at least one head, got heads={self.heads}, kv_heads={self.kv_heads}")
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.groups} key/value heads")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}; None for d_model // heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {self.window}")
        if self.sinks < 0:
            raise ValueError(f"the number of sinks must not be negative, got {self.sinks}")
        if self.sinks and self.window is None:
            raise ValueError(f"{self.sinks} sinks need a window: without one, the first tokens are seen anyway")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; None switches it off")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        check_implementation(self.implementation)
        check_across(self.across)
        super().__post_init__()

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def width(self, d_model: int) -> int:
        """Width of a head in a model of this width."""
        if self.head_dim is not None:
            return self.head_dim
        if d_model % self.heads:
            raise ValueError(f"d_model {d_model} is not a multiple of {self.heads} heads; set head_dim")
        return d_model // self.heads

    def check(self, d_model: int) -> None:
        """Refuse a model width that the heads do not divide."""
        self.width(d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse a way of knowing positions that does not fit the heads."""
        if isinstance(position, RoPE):
            position.check(self.width(d_model))

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """Keys and values of one layer, [B, K, S, D]: the order in which decoding reads them.

        A window keeps ``sinks + window`` slots, or ``slots`` where these are fewer.
        """
        width = self.width(d_model)
        if self.window is not None:
            kept, shape = min(self.sinks + self.window, slots), (self.groups, width)
            return Kept.empty(rows, kept, dtype, keys=shape, values=shape)
        shape = (rows, self.groups, slots, width)
        return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}

    def plan(
        self, rows: int, length: int, d_model: int, style: Style, platform: str, device: str, packed: bool = False
    ) -> dict[str, str]:
        """The implementation that each use of this layer gets, by name: "training", "prefill" and "decode".

        Args:
            rows: of a batch.
            length: of a row, and slots of the cache.
            d_model: width of the model.
            style: of the model.
            platform: "cpu", "gpu" or "tpu".
            device: its own name, see ``Case``.
            packed: whether rows may hold several documents in training.

        Raises:
            ValueError: the named implementation cannot serve one of the uses.
        """
        width, position = self.width(d_model), style.position
        alone = isinstance(position, RoPE) and position.by_query and not position.unscaled(length)
        kept = length if self.window is None else min(self.sinks + self.window, length)
        case = Case(
            platform, device, rows, 1 if alone else length, length, self.heads, self.groups, width, width,
            jnp.dtype(style.dtype).name, rule=Rule(sinks=self.sinks), window=self.window, aligned=not (packed or alone),
            softcap=self.softcap is not None, slopes=isinstance(position, ALiBi), sink_logits=self.sink_logits,
        )  # fmt: skip
        chunk = length if self.window is None else kept + length
        # One query after the other is what decoding does, also inside a prefill.
        prefill = dataclasses.replace(case, slots=chunk, aligned=False)
        return {
            "training": choose(self.implementation, dataclasses.replace(case, dropout=self.dropout > 0.0)),
            "prefill": (choose_decoder if alone else choose)(self.implementation, prefill),
            "decode": choose_decoder(
                self.implementation, dataclasses.replace(case, length=1, slots=kept, aligned=False)
            ),
        }

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        queries = keys = shared.queries  # one value, by which masks know that keys are the queries' own tokens
        rope = shared.style.position if isinstance(shared.style.position, RoPE) else None
        q, k, v = self._project(x, shared)
        if self.qk_norm:
            q, k = RMSNorm(name="query_norm")(q, shared.style), RMSNorm(name="key_norm")(k, shared.style)
        if rope is not None and not rope.by_query:
            q, k = rope.rotate(q, queries.positions), rope.rotate(k, queries.positions)
        drop = self.make_rng("dropout") if self.dropout > 0.0 and not shared.deterministic else None
        terms = self._terms(q.shape[-1], shared)
        attend = functools.partial(self._attend, terms=terms, decoding=cache is not None and drop is None)
        if rope is not None and rope.by_query:
            # Positions lie below the number of slots of the layout that all layers share.
            attend = functools.partial(_attend_turning, attend, rope, rope.unscaled(shared.keys.positions.shape[1]))
        if cache is not None:
            k, v, keys, cache = self._remember(k, v, shared, cache)
        return self._merge(attend(q, k, v, queries, keys, drop), x.shape[-1], shared), cache

    def _terms(self, width: int, shared: Shared) -> Terms:
        """What the logits consist of."""
        sinks = None
        if self.sink_logits:
            exact = dataclasses.replace(shared.style, dtype=jnp.float32)
            sinks = parameter(self, "sink_logits", (self.heads,), ("heads",), 0.0, exact)
        return Terms(
            scale=width**-0.5,
            softcap=self.softcap,
            slopes=alibi_slopes(self.heads) if isinstance(shared.style.position, ALiBi) else None,
            sink_logits=sinks,
        )

    def _remember(self, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], shared: Shared, cache: PyTree):
        """Enter new keys and values; the keys and values [B, S, K, D] to attend to, and where they stand."""
        new = {"keys": jnp.swapaxes(k, 1, 2), "values": jnp.swapaxes(v, 1, 2)}
        if self.window is None:
            assert shared.slot is not None
            cache = {name: _enter(cache[name], new[name], shared.slot) for name in new}
            seen, keys = cache, shared.keys
        else:
            slots = ring(shared.queries.positions, self.window, self.sinks)
            written = cache.write(shared.queries, slots, **new)
            # One new token displaces one that it no longer sees; the first tokens of a chunk still see what its last
            # ones displace.
            if k.shape[1] == 1:
                seen, keys = written.contents, written.context
            else:
                seen, keys = cache.beside(shared.queries, **new)
            cache = written
        return jnp.swapaxes(seen["keys"], 1, 2), jnp.swapaxes(seen["values"], 1, 2), keys, cache

    def _attend(self, q, k, v, queries: Context, keys: Context, drop, terms: Terms, decoding: bool):
        """Mix values [B, S, K, D] for queries [B, T, H, D]."""
        mask = Mask.ranges(queries, keys, window=self.window, rule=Rule(sinks=self.sinks))
        if decoding and q.shape[1] == 1:
            stored = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
            return decode_attention(q[:, 0], *stored, mask, terms, self.implementation)[:, None]
        return attention(
            q, k, v, mask,
            scale=terms.scale,
            softcap=terms.softcap,
            slopes=terms.slopes,
            sink_logits=terms.sink_logits,
            dropout=self.dropout,
            dropout_key=drop,
            implementation=self.implementation,
            across=self.across,
        )  # fmt: skip

    def _project(self, x, shared: Shared):
        """Queries [B, T, H, D], keys and values [B, T, K, D] by one product with a kernel grouped by key/value head."""
        style, per_group, width = shared.style, self.heads // self.groups, self.width(x.shape[-1])
        shape = (self.groups, per_group + 2, width)
        axes = ("kv_heads", None, "head_dim")
        kernel = parameter(self, "qkv", (x.shape[-1], *shape), ("embed", *axes), style.init_std, style)
        out = product(x, kernel)
        if self.qkv_bias:
            out = out + parameter(self, "qkv_bias", shape, axes, 0.0, style)
        parts = jnp.split(out, (per_group, per_group + 1), axis=3)
        counts = (self.heads, self.groups, self.groups)
        return tuple(part.reshape(*x.shape[:2], n, width) for part, n in zip(parts, counts, strict=True))

    def _merge(self, mixed, d_model: int, shared: Shared):
        """Project the heads' outputs back into the residual stream."""
        style, (heads, width) = shared.style, mixed.shape[2:]
        axes = ("heads", "head_dim", "embed")
        kernel = parameter(self, "out", (heads, width, d_model), axes, style.residual_std, style)
        y = product(mixed.reshape(*mixed.shape[:2], -1), kernel.reshape(-1, d_model))
        return y + parameter(self, "out_bias", (d_model,), ("embed",), 0.0, style) if self.out_bias else y


def _attend_turning(attend: Callable, position: RoPE, unscaled: bool, q, k, v, queries: Context, keys: Context, drop):
    """``attend`` to unturned keys, which each query turns as far as its own position asks for.

    One query at a time, so that memory stays linear in the tokens; all at once where rows are short enough not to be
    scaled.
    """

    def turned(q, queries: Context, drop):
        lengths = queries.positions[:, :1] + 1
        q, near = position.rotate(q, queries.positions, lengths), position.rotate(k, keys.positions, lengths)
        return attend(q, near, v, queries, keys, drop)

    if unscaled or q.shape[1] == 1:
        return turned(q, queries, drop)

    @jax.checkpoint
    def one(token):
        q, at, segment, drop = token
        return turned(q[:, None], Context(at[:, None], segment[:, None]), drop)[:, 0]

    by_token = [jnp.swapaxes(each, 0, 1) for each in (q, queries.positions, queries.segments)]
    drops = None if drop is None else jax.random.split(drop, q.shape[1])
    return jnp.swapaxes(jax.lax.map(one, (*by_token, drops)), 0, 1)


def _enter(stored: Float[Array, "B K S D"], new: Float[Array, "B K T D"], slot) -> Float[Array, "B K S D"]:
    """New tokens at ``slot`` and after, the same slots for all rows."""
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), slot, axis=2)
