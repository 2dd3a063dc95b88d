"""The patterns of the Sparse Transformer in O(T sqrt T) work (Child et al. 2019, arXiv 1904.10509).

With a stride or block of ``l`` (about the square root of the length):

- *strided*: a token sees every ``l``-th token before it, which is dense causal attention inside each residue class of
  positions: a transpose ``[T/l, l] -> [l, T/l]``, then ``T / l`` keys a query;
- *fixed*: a token sees its own block of ``l`` positions, and of all earlier blocks the last ``c`` positions, their
  summary: ``l + c T / l`` keys a query. The two parts are computed apart and merged by their log-sum-exp;
- *local*, the third of the paper, is a sliding window (``Attention(window=l)``) and not here.

Blocks and residues are those of positions inside a document; rows may be packed. Nothing here makes a [T, T] array.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.ops.attention import Mask, Terms, merge, partial_attention
from rlhf_jax.types import Context

Part = tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]
"""Attention over some of the keys, and the log-sum-exp of its logits."""


def strided_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    context: Context,
    terms: Terms,
    *,
    stride: int,
    implementation: str = "auto",
) -> Float[Array, "B T H Dv"]:
    """Each token sees the tokens of its document that are a multiple of ``stride`` positions before it, and itself.

    Two tokens of a document are as many slots apart as positions, so residues of slots serve packed rows too.
    """
    classes = min(stride, q.shape[1])
    parted = Context(
        by_residue(context.positions, classes), by_residue(context.segments, classes), packed=context.packed
    )
    mask = Mask.ranges(parted, parted)
    q_parted, k_parted, v_parted = (by_residue(x, classes) for x in (q, k, v))
    out, _ = partial_attention(q_parted, k_parted, v_parted, mask, terms, implementation)
    return from_residues(out, classes, q.shape[1])


def by_residue(x: Array, classes: int) -> Array:
    """[B, T, ...] to [B * classes, ceil(T / classes), ...]: row ``b * classes + r`` holds slots ``r, r + classes, ...``

    Where ``classes`` does not divide T, zeros (segment 0: padding) fill the last column.
    """
    x = _padded(x, classes).reshape(x.shape[0], -1, classes, *x.shape[2:])
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])


def from_residues(x: Array, classes: int, length: int) -> Array:
    """The inverse of ``by_residue``."""
    x = jnp.swapaxes(x.reshape(-1, classes, *x.shape[1:]), 1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def fixed_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    context: Context,
    terms: Terms,
    *,
    block: int,
    columns: int,
    implementation: str = "auto",
) -> Float[Array, "B T H Dv"]:
    """Each token sees the past of its own block, and the last ``columns`` positions of every earlier block.

    Blocks count from the beginning of each document.
    """
    parts = [
        own_block_attention(
            q, k, v, context, terms, block=block, aligned=not context.packed, implementation=implementation
        )
    ]
    most = most_summaries(q.shape[1], block, columns)
    if most > 0:
        slots = summary_slots(context, block, columns, most)
        keys = Context(_taken(context.positions, slots), _taken(context.segments, slots))
        mask = summary_mask(context, keys, block)
        parts.append(partial_attention(q, _taken(k, slots), _taken(v, slots), mask, terms, implementation))
    return merge(parts)


def own_block_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K Dv"],
    context: Context,
    terms: Terms,
    *,
    block: int,
    aligned: bool = False,
    implementation: str = "auto",
) -> Part:
    """Each token sees the past of its own block of ``block`` positions, in tiles of so many slots.

    The block of a token began at most ``block - 1`` slots before it, so a tile sees itself and the tile before it;
    itself alone where blocks are ``aligned`` with tiles (each row is one document from its first token on).
    """
    length, width = q.shape[1], min(block, q.shape[1])
    with_keys = _tiles if aligned else _with_tile_before
    numbers = _blocks_as_segments(context, block)
    queries = Context(_tiles(context.positions, width), _tiles(numbers, width))
    keys = Context(with_keys(context.positions, width), with_keys(numbers, width))
    mask = Mask.ranges(queries, keys, window=block)
    out, lse = partial_attention(
        _tiles(q, width), with_keys(k, width), with_keys(v, width), mask, terms, implementation
    )
    return _from_tiles(out, length), _from_tiles(lse, length)


def summary_mask(queries: Context, keys: Context, block: int) -> Mask:
    """Queries see every given key of their document in blocks before their own."""
    start = queries.positions - queries.positions % block
    mask = Mask.ranges(queries, keys)
    return mask.replace(end=start, causal=False)  # pyright: ignore[reportAttributeAccessIssue]


def one_document_by_blocks(context: Context, block: int) -> Context:
    """A row's only document with each of its blocks as a segment, so that blocks do not see each other."""
    return Context(context.positions, jnp.where(context.segments != 0, context.positions // block + 1, 0))


def is_summary(context: Context, block: int, columns: int) -> Bool[Array, "B T"]:
    """Whether a token is one of the last ``columns`` of its block."""
    return (context.positions % block >= block - columns) & (context.segments != 0)


def most_summaries(length: int, block: int, columns: int) -> int:
    """The most summary tokens that a row of ``length`` can hold, however documents are packed in it.

    A document of ``n`` tokens has at most ``columns * n / block``. None are of use where one block is the whole row.
    """
    return columns * length // block if length > block else 0


def summary_slots(context: Context, block: int, columns: int, most: int) -> Int[Array, "B most"]:
    """The slots of each row's summary tokens in their order, then the row's length where there are fewer."""
    rows, length = context.positions.shape
    chosen = is_summary(context, block, columns)
    place = jnp.where(chosen, jnp.cumsum(chosen, axis=1) - 1, most)
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return jnp.full((rows, most), length, jnp.int32).at[jnp.arange(rows)[:, None], place].set(slots, mode="drop")


def _taken(x: Array, slots: Int[Array, "B N"]) -> Array:
    """The entries of each row at ``slots``, zeros (segment 0: padding) where a slot does not exist."""
    places = slots.reshape(*slots.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=0)


def _blocks_as_segments(context: Context, block: int) -> Int[Array, "B T"]:
    """A number for each block of each document, rising along the row; 0 for padding."""
    segments, positions = context.segments, context.positions
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    begins = (segments != before) | (positions % block == 0)
    return jnp.where(segments != 0, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)


def _tiles(x: Array, width: int) -> Array:
    """[B, T, ...] to [B * ceil(T / width), width, ...], zeros behind T."""
    x = _padded(x, width)
    return x.reshape(-1, width, *x.shape[2:])


def _with_tile_before(x: Array, width: int) -> Array:
    """The tiles of ``_tiles``, each behind the one before it in its row: [B * tiles, 2 * width, ...].

    A row of one tile has nothing before it: [B, width, ...].
    """
    padded = _padded(x, width)
    tiles = padded.reshape(x.shape[0], -1, width, *x.shape[2:])
    if tiles.shape[1] == 1:
        return padded
    nothing = ((0, 0), (1, 0), *(((0, 0),) * (tiles.ndim - 2)))
    both = jnp.concatenate((jnp.pad(tiles[:, :-1], nothing), tiles), axis=2)
    return both.reshape(-1, 2 * width, *x.shape[2:])


def _from_tiles(x: Array, length: int) -> Array:
    """The inverse of ``_tiles`` for rows of ``length``."""
    tiles = -(-length // x.shape[1])
    return x.reshape(-1, tiles * x.shape[1], *x.shape[2:])[:, :length]


def _padded(x: Array, multiple: int) -> Array:
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *(((0, 0),) * (x.ndim - 2)))) if missing else x
