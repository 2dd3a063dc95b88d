"""The patterns of the Sparse Transformer as mixers (Child et al. 2019, arXiv 1904.10509).

``Strided``, ``Fixed`` and, for the local pattern, ``Attention(window=l)``. Two layers reach every token of the past:
``Attention(window=l)`` then ``Strided(stride=l)`` (the published choice for images and sound), or ``Fixed`` twice (the
choice for text). Layers get their patterns by ``Transformer(pattern=...)``, the heads of one layer by ``Parallel``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import RMSNorm, Shared, parameter, product
from rlhf_jax.models.mixers.caches import Kept
from rlhf_jax.models.positions import ALiBi, Position, RoPE
from rlhf_jax.ops import sparse
from rlhf_jax.ops.attention import (
    Mask,
    Terms,
    alibi_slopes,
    check_implementation,
    decode_attention,
    merge,
    partial_attention,
)
from rlhf_jax.types import Context, PyTree


class Strided(nn.Module):
    """Attention to every ``stride``-th token of the past: ``T / stride`` keys a query.

    The cache keeps all keys, since each will be seen again, and decoding reads ``T / stride`` of them.

    Args:
        heads: number of query heads.
        stride: distance between the tokens that are seen; about the square root of the length makes the work least.
        kv_heads: number of key/value heads, which divides ``heads``; None for as many as there are query heads.
        head_dim: width of a head; None for ``d_model // heads``.
        qk_norm: RMS-normalise queries and keys per head, before the rotation.
        implementation: schedule of ``ops.attention``.
    """

    heads: int
    stride: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    implementation: str = "auto"

    def __post_init__(self):
        _check_heads(self)
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 (every token), got {self.stride}")
        super().__post_init__()

    def check(self, d_model: int) -> None:
        """Refuse a model width that the heads do not divide."""
        _width(self, d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse a way of knowing positions that does not fit the heads."""
        _check_position(self, position, d_model)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """Keys and values by residue class of their positions, [B, stride, K, T / stride, D], and who is there."""
        classes = min(self.stride, slots)
        shape = (rows, classes, _groups(self), -(-slots // classes), _width(self, d_model))
        return {
            "keys": jnp.zeros(shape, dtype),
            "values": jnp.zeros(shape, dtype),
            "segments": jnp.zeros((rows, classes, shape[3]), jnp.int32),
        }

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        q, k, v = _project(self, x, shared)
        terms = _terms(self, q.shape[-1], shared)
        if cache is None:
            mixed = sparse.strided_attention(
                q, k, v, shared.queries, terms, stride=self.stride, implementation=self.implementation
            )
        else:
            cache = self._entered(cache, k, v, shared.queries)
            mixed = self._from_cache(q, cache, shared.queries, terms)
        return _merged(self, mixed, x.shape[-1], shared), cache

    def _entered(self, cache: PyTree, k, v, context: Context) -> PyTree:
        """The cache with the new tokens in it, each where its position belongs."""
        row = jnp.arange(k.shape[0])[:, None]
        residue, place = context.positions % self.stride, context.positions // self.stride
        residue = jnp.where(context.segments != 0, residue, cache["segments"].shape[1])
        return {
            "keys": cache["keys"].at[row, residue, :, place].set(k.astype(cache["keys"].dtype), mode="drop"),
            "values": cache["values"].at[row, residue, :, place].set(v.astype(cache["values"].dtype), mode="drop"),
            "segments": cache["segments"].at[row, residue, place].set(context.segments, mode="drop"),
        }

    def _from_cache(self, q, cache: PyTree, context: Context, terms: Terms):
        """Each residue class of the new tokens attends to its own part of the cache.

        The first new tokens of a row tell which residue each class of slots has: where they are padding, so is the rest
        of their class.
        """
        rows, length = context.positions.shape
        classes = min(self.stride, length)
        residues = jnp.minimum(context.positions[:, :classes] % self.stride, cache["segments"].shape[1] - 1)
        row = jnp.arange(rows)[:, None]
        keys, values = (cache[name][row, residues] for name in ("keys", "values"))  # [B, classes, K, T / stride, D]
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
        places = jnp.arange(keys.shape[2], dtype=jnp.int32) * self.stride
        seen = Context(
            (residues[..., None] + places).reshape(-1, keys.shape[2]),
            cache["segments"][row, residues].reshape(-1, keys.shape[2]),
        )
        queries = Context(sparse.by_residue(context.positions, classes), sparse.by_residue(context.segments, classes))
        mask = Mask.ranges(queries, seen)
        if length == 1:
            return decode_attention(q[:, 0], keys, values, mask, terms, self.implementation)[:, None]
        parted = sparse.by_residue(q, classes)
        keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
        out, _ = partial_attention(parted, keys, values, mask, terms, self.implementation)
        return sparse.from_residues(out, classes, length)


class Fixed(nn.Module):
    """Attention to the own block of positions, and to the last ``columns`` positions of every earlier block.

    The cache keeps the running block and the summary columns: ``block + columns * T / block`` tokens.

    Args:
        heads: number of query heads.
        block: positions of a block; about the square root of the length makes the work least.
        columns: summary positions at the end of each block (the paper takes 8 to 32 of 128).
        kv_heads: as in ``Strided``, and so are the others.
    """

    heads: int
    block: int
    columns: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    implementation: str = "auto"

    def __post_init__(self):
        _check_heads(self)
        if self.block < 1:
            raise ValueError(f"block must be at least 1 (the token itself), got {self.block}")
        if not 1 <= self.columns <= self.block:
            raise ValueError(f"columns must be between 1 and block {self.block}, got {self.columns}")
        super().__post_init__()

    def check(self, d_model: int) -> None:
        """Refuse a model width that the heads do not divide."""
        _width(self, d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse a way of knowing positions that does not fit the heads."""
        _check_position(self, position, d_model)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """The running block, slot ``position % block``, and behind it the columns of all blocks."""
        blocks = (slots + self.columns - 1) // self.block  # those of which a column exists
        kept = self.block + blocks * self.columns if blocks else slots
        shape = (_groups(self), _width(self, d_model))
        return Kept.empty(rows, kept, dtype, keys=shape, values=shape)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        q, k, v = _project(self, x, shared)
        terms = _terms(self, q.shape[-1], shared)
        if cache is None:
            mixed = sparse.fixed_attention(
                q, k, v, shared.queries, terms,
                block=self.block, columns=self.columns, implementation=self.implementation,
            )  # fmt: skip
        elif x.shape[1] == 1:
            cache = self._entered(cache, k, v, shared.queries)
            mixed = self._decoded(q, cache, shared.queries, terms)
        else:
            written = self._entered(cache, k, v, shared.queries)
            mixed = self._chunk(q, k, v, cache, written, shared.queries, terms)
            cache = written
        return _merged(self, mixed, x.shape[-1], shared), cache

    def _entered(self, cache: Kept, k, v, context: Context) -> Kept:
        """The cache with the new tokens in the running block, and the columns among them also behind it."""
        new = {"keys": jnp.swapaxes(k, 1, 2), "values": jnp.swapaxes(v, 1, 2)}
        cache = cache.write(context, context.positions % self.block, **new)
        number, column = context.positions // self.block, context.positions % self.block - (self.block - self.columns)
        chosen = sparse.is_summary(context, self.block, self.columns)
        return cache.write(context, jnp.where(chosen, self.block + number * self.columns + column, -1), **new)

    def _decoded(self, q, cache: Kept, context: Context, terms: Terms):
        """One query a row over the running block and the columns of the blocks before it, in one pass."""
        current = cache.positions >= context.positions - context.positions % self.block
        running = jnp.arange(cache.positions.shape[1]) < self.block
        seen = Context(cache.positions, jnp.where(current == running, cache.segments, 0))
        mask = Mask.ranges(context, seen)
        keys, values = cache.contents["keys"], cache.contents["values"]
        return decode_attention(q[:, 0], keys, values, mask, terms, self.implementation)[:, None]

    def _chunk(self, q, k, v, before: Kept, after: Kept, context: Context, terms: Terms):
        """New tokens over what was the running block, over each other, and over all columns, their own included."""
        implementation, columns = self.implementation, slice(self.block, None)
        parts = [sparse.own_block_attention(q, k, v, context, terms, block=self.block, implementation=implementation)]
        keys, values, seen = _slots(before, slice(self.block))
        queries, seen = (sparse.one_document_by_blocks(each, self.block) for each in (context, seen))
        mask = Mask.ranges(queries, seen, window=self.block)
        parts.append(partial_attention(q, keys, values, mask, terms, implementation))
        if after.positions.shape[1] > self.block:
            keys, values, seen = _slots(after, columns)
            mask = sparse.summary_mask(context, seen, self.block)
            parts.append(partial_attention(q, keys, values, mask, terms, implementation))
        return merge(parts)


class Parallel(nn.Module):
    """Several mixers on the same input, their outputs added: the heads of one layer divided among patterns.

    A head's output and its part of the output projection are added to those of the other heads in any case, so
    ``Parallel((Attention(4, head_dim=32, window=64), Strided(4, 64, head_dim=32)))`` is one layer of 8 heads, half of
    them local. Give each part its ``head_dim``: the default divides the width of the model by the heads of that part.
    """

    mixers: tuple[nn.Module, ...]

    def __post_init__(self):
        if not self.mixers:
            raise ValueError("Parallel has no mixers; give it at least one")
        super().__post_init__()

    def check(self, d_model: int) -> None:
        """Refuse what one of the mixers refuses."""
        for mixer in self.mixers:
            mixer.check(d_model)

    def check_position(self, position: Position | None, d_model: int) -> None:
        """Refuse what one of the mixers refuses."""
        for mixer in self.mixers:
            mixer.check_position(position, d_model)

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """The states of the mixers."""
        return tuple(mixer.empty_cache(rows, slots, d_model, dtype) for mixer in self.mixers)

    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        states = (None,) * len(self.mixers) if cache is None else cache
        total, written = jnp.zeros_like(x), []
        for mixer, state in zip(self.mixers, states, strict=True):
            y, state = mixer(x, shared, state)
            total = total + y
            written.append(state)
        return total, (None if cache is None else tuple(written))


def _slots(kept: Kept, chosen: slice):
    """Keys, values [B, S, K, D] and places of some slots."""
    keys, values = (jnp.swapaxes(kept.contents[name][:, :, chosen], 1, 2) for name in ("keys", "values"))
    return keys, values, Context(kept.positions[:, chosen], kept.segments[:, chosen])


def _check_heads(mixer: Strided | Fixed) -> None:
    if mixer.heads < 1 or _groups(mixer) < 1:
        raise ValueError(f"attention needs at least one head, got heads={mixer.heads}, kv_heads={mixer.kv_heads}")
    if mixer.heads % _groups(mixer):
        raise ValueError(f"{mixer.heads} query heads are not a multiple of {_groups(mixer)} key/value heads")
    check_implementation(mixer.implementation)


def _groups(mixer: Strided | Fixed) -> int:
    """Number of key/value heads."""
    return mixer.heads if mixer.kv_heads is None else mixer.kv_heads


def _width(mixer: Strided | Fixed, d_model: int) -> int:
    """Width of a head in a model of this width."""
    if mixer.head_dim is not None:
        return mixer.head_dim
    if d_model % mixer.heads:
        raise ValueError(f"d_model {d_model} is not a multiple of {mixer.heads} heads; set head_dim")
    return d_model // mixer.heads


def _check_position(mixer: Strided | Fixed, position: Position | None, d_model: int) -> None:
    if not isinstance(position, RoPE):
        return
    position.check(_width(mixer, d_model))
    if position.by_query:
        raise ValueError(
            f"dynamic NTK turns each key anew for each query, which {type(mixer).__name__} does not; take "
            "RoPE(scaling=NTK(...)) or YaRN"
        )


def _terms(mixer: Strided | Fixed, width: int, shared: Shared) -> Terms:
    slopes = alibi_slopes(mixer.heads) if isinstance(shared.style.position, ALiBi) else None
    return Terms(scale=width**-0.5, slopes=slopes)


def _project(mixer: Strided | Fixed, x, shared: Shared) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, D], keys and values [B, T, K, D], rotated to their positions."""
    style, positions, groups = shared.style, shared.queries.positions, _groups(mixer)
    per_group, width = mixer.heads // groups, _width(mixer, x.shape[-1])
    shape, axes = (groups, per_group + 2, width), ("kv_heads", None, "head_dim")
    kernel = parameter(mixer, "qkv", (x.shape[-1], *shape), ("embed", *axes), style.init_std, style)
    parts = jnp.split(product(x, kernel), (per_group, per_group + 1), axis=3)
    counts = (mixer.heads, groups, groups)
    q, k, v = (part.reshape(*x.shape[:2], n, width) for part, n in zip(parts, counts, strict=True))
    if mixer.qk_norm:
        q = RMSNorm(name="query_norm", parent=mixer)(q, style)
        k = RMSNorm(name="key_norm", parent=mixer)(k, style)
    if isinstance(style.position, RoPE):
        q, k = style.position.rotate(q, positions), style.position.rotate(k, positions)
    return q, k, v


def _merged(mixer: Strided | Fixed, mixed, d_model: int, shared: Shared):
    """Project the heads' outputs back into the residual stream."""
    style, (heads, width) = shared.style, mixed.shape[2:]
    axes = ("heads", "head_dim", "embed")
    kernel = parameter(mixer, "out", (heads, width, d_model), axes, style.residual_std, style)
    return product(mixed.reshape(*mixed.shape[:2], -1), kernel.reshape(-1, d_model))
