"""The patterns of the Sparse Transformer as mixers (Child et al. 2019, arXiv 1904.10509).

``Strided``, ``Fixed`` and, for the local pattern, ``Attention(window=l)``. Two layers reach every token of the past:
``Attention(window=l)`` then ``Strided(stride=l)`` (the published choice for images and sound), or ``Fixed`` twice (the
choice for text). Layers get their patterns by ``Transformer(pattern=...)``, the heads of one layer by ``Parallel``.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.mixers.caches import Kept
from rlhf_jax.models.mixers.heads import Heads, case_of, groups_of, merged, named, part, project, terms_of, width_of
from rlhf_jax.ops import sparse
from rlhf_jax.ops.attention import Case, Mask, Terms, choose, decode_attention, merge, partial_attention
from rlhf_jax.ops.attention.decode import choose_decoder
from rlhf_jax.types import Context, PyTree


class Strided(Heads, nn.Module):
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
        self.check_heads()
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 (every token), got {self.stride}")
        super().__post_init__()

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """Keys and values by residue class of their positions, [B, stride, K, T / stride, D], and who is there."""
        classes = min(self.stride, slots)
        shape = (rows, classes, groups_of(self), -(-slots // classes), width_of(self, d_model))
        return {
            "keys": jnp.zeros(shape, dtype),
            "values": jnp.zeros(shape, dtype),
            "segments": jnp.zeros((rows, classes, shape[3]), jnp.int32),
        }

    def plan(
        self, rows: int, length: int, d_model: int, style: Style, platform: str, device: str, packed: bool = False
    ) -> dict[str, str]:
        """The implementation that each use of this layer gets; arguments and errors as in ``Attention.plan``."""
        classes = min(self.stride, length)
        each = -(-length // classes)
        whole = part(case_of(self, d_model, style, platform, device), rows * classes, each, each)
        one = part(whole, rows, 1, each, lse=False)
        return {
            "training": choose(self.implementation, part(whole, rows * classes, each, each, aligned=not packed)),
            "prefill": choose(self.implementation, whole),
            "decode": choose_decoder(self.implementation, one),
        }

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        q, k, v = project(self, x, shared)
        terms = terms_of(self, q.shape[-1], shared)
        if cache is None:
            mixed = sparse.strided_attention(
                q, k, v, shared.queries, terms, stride=self.stride, implementation=self.implementation
            )
        else:
            cache = self._entered(cache, k, v, shared.queries)
            mixed = self._from_cache(q, cache, shared.queries, terms)
        return merged(self, mixed, x.shape[-1], shared), cache

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


class Fixed(Heads, nn.Module):
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
        self.check_heads()
        if self.block < 1:
            raise ValueError(f"block must be at least 1 (the token itself), got {self.block}")
        if not 1 <= self.columns <= self.block:
            raise ValueError(f"columns must be between 1 and block {self.block}, got {self.columns}")
        super().__post_init__()

    def empty_cache(self, rows: int, slots: int, d_model: int, dtype) -> PyTree:
        """The running block, slot ``position % block``, and behind it the columns of all blocks."""
        shape = (groups_of(self), width_of(self, d_model))
        return Kept.empty(rows, self._kept(slots), dtype, keys=shape, values=shape)

    def _kept(self, slots: int) -> int:
        """Tokens that the cache of so many slots keeps: the running block, and the columns of all blocks."""
        blocks = (slots + self.columns - 1) // self.block  # those of which a column exists
        return self.block + blocks * self.columns if blocks else slots

    def plan(
        self, rows: int, length: int, d_model: int, style: Style, platform: str, device: str, packed: bool = False
    ) -> dict[str, str]:
        """The implementations that each use of this layer gets; arguments and errors as in ``Attention.plan``.

        Training attends to the own block and to the columns of earlier ones, a prefill also to the running block.
        """
        case, kept = case_of(self, d_model, style, platform, device), self._kept(length)
        block = min(self.block, length)
        tiles = -(-length // block)
        alone = part(case, rows * tiles, block, block, window=self.block)
        # Blocks that begin anywhere lie in two tiles.
        across = part(alone, rows * tiles, block, block * min(tiles, 2))
        summaries = sparse.most_summaries(length, self.block, self.columns)
        training = {"its own block": across if packed else alone}
        if summaries > 0:
            training["columns"] = part(case, rows, length, summaries, causal=False)
        prefill = {"its own block": across}
        prefill["the running block"] = part(case, rows, length, min(self.block, kept), window=self.block)
        if kept > self.block:
            prefill["columns"] = part(case, rows, length, kept - self.block, causal=False)
        decode = part(case, rows, 1, kept, lse=False)

        def chosen(parts: dict[str, Case]) -> str:
            return named({what: choose(self.implementation, each) for what, each in parts.items()})

        return {
            "training": chosen(training),
            "prefill": chosen(prefill),
            "decode": choose_decoder(self.implementation, decode),
        }

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared, cache: PyTree | None = None
    ) -> tuple[Float[Array, "B T E"], PyTree | None]:
        q, k, v = project(self, x, shared)
        terms = terms_of(self, q.shape[-1], shared)
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
        return merged(self, mixed, x.shape[-1], shared), cache

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


def _slots(kept: Kept, chosen: slice):
    """Keys, values [B, S, K, D] and places of some slots."""
    keys, values = (jnp.swapaxes(kept.contents[name][:, :, chosen], 1, 2) for name in ("keys", "values"))
    return keys, values, Context(kept.positions[:, chosen], kept.segments[:, chosen])
