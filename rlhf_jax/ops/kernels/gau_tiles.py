"""What the kernels of gated attention units share: who sees whom from either side, and the score of one tile.

Every product of a GAU, forward and backward, walks the tiles that a mask shows either by query (rows are queries) or
by key (rows are keys). Nothing is carried from tile to tile but a sum, so the order in which a row's tiles are visited
is free: those that need the mask come first, those that do not come after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.ops.attention.masks import ALL, NOTHING, Mask, Rule
from rlhf_jax.ops.gau_terms import LAPLACE_MEAN, LAPLACE_STD, Laplace, Score
from rlhf_jax.types import Context

POSITION, START, END, SEGMENT = 0, 1, 2, 3
"""Lines of the facts of queries."""
KEY_POSITION, KEY_SEGMENT = 0, 1
"""Lines of the facts of keys."""


@dataclass(frozen=True)
class Linear:
    """The score that is the logit itself, of the linear part of a chunked unit."""

    def value(self, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The score."""
        return logits

    def gradient(self, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """Its derivative."""
        return jnp.ones_like(logits)


@struct.dataclass
class Walk:
    """The tiles of columns that each tile of rows visits.

    ``order[:partial]`` need the mask, ``order[partial:total]`` do not; the rest are never visited. ``by_query`` says
    that rows are queries and columns keys, else the other way round.
    """

    rows: Int[Array, "B lines R"]
    columns: Int[Array, "B lines C"]
    order: Int[Array, "B n m"]
    partial: Int[Array, "B n"]
    total: Int[Array, "B n"]
    rule: Rule = struct.field(pytree_node=False)
    by_query: bool = struct.field(pytree_node=False)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What a kernel takes besides the operands, in the order of the fields."""
        return self.rows, self.columns, self.order, self.partial, self.total


def walk(mask: Mask, row_tile: int, column_tile: int, *, by_query: bool) -> Walk:
    """The walk over a mask whose lengths are multiples of the tiles."""
    # A key of segment 0 must not meet the queries of segment 0.
    segments = jnp.where(mask.key_segments == 0, -1, mask.key_segments)
    queries = jnp.stack((mask.query_positions, mask.start, mask.end, mask.query_segments), axis=1).astype(jnp.int32)
    keys = jnp.stack((mask.key_positions, segments), axis=1).astype(jnp.int32)
    if by_query:
        blocks, rows, columns = mask.blocks(row_tile, column_tile), queries, keys
    else:
        blocks, rows, columns = mask.blocks(column_tile, row_tile).swapaxes(1, 2), keys, queries
    # NOTHING, SOME, ALL = 0, 1, 2 sort as 2, 0, 1.
    order = jnp.argsort((blocks - 1) % 3, axis=-1, stable=True).astype(jnp.int32)
    total = (blocks != NOTHING).sum(-1, dtype=jnp.int32)
    return Walk(rows, columns, order, total - (blocks == ALL).sum(-1, dtype=jnp.int32), total, mask.rule, by_query)


def value(score: Score | Linear, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """``score.value`` of operations that kernels have: Mosaic knows no error function."""
    if isinstance(score, Laplace):
        return 0.5 * (1.0 + _erf((logits - LAPLACE_MEAN) * (math.sqrt(0.5) / LAPLACE_STD)))
    return score.value(logits)


def _erf(x):
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    size = jnp.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = series * jnp.exp(-size * size)
    return jnp.where(x < 0.0, tail - 1.0, 1.0 - tail)


def shown(walk: Walk, rows, columns):
    """Whether the rows of a tile meet its columns; facts by line, each to broadcast against the tile."""
    queries, keys = (rows, columns) if walk.by_query else (columns, rows)
    inside = walk.rule.visible(queries[POSITION], queries[START], queries[END], keys[KEY_POSITION])
    return inside & (queries[SEGMENT] == keys[KEY_SEGMENT])


def chunk_mask(position: Int[Array, "B T"], document: Int[Array, "B T"], chunk: int) -> Mask:
    """Each token sees itself and what is before it in its document's chunk of ``chunk`` positions."""
    start = position // chunk * chunk
    return Mask(start, position + 1, position, document, position, document)


@struct.dataclass
class Documents:
    """How packed rows pass through tiles of ``chunk`` slots: ``here`` and ``near`` are seen directly, the rest of a
    document by those that are ``readable`` through a state that takes up what is ``kept`` and begins anew unless
    ``keep``."""

    here: Mask
    near: Mask
    readable: Bool[Array, "B T"]
    kept: Bool[Array, "B T"]
    keep: Float[Array, "B G"]


def documents(context: Context, chunk: int) -> Documents:
    """The places of documents that each lie in their row without a gap and in order.

    Tokens more than a tile apart are never in one chunk. So a tile sees itself and the tile before it directly: pairs
    of one chunk are ``here``, pairs of two are ``near``. When a tile is read, the state holds what the document that
    was open at the end of the tile before the last has there and earlier.
    """
    position, segment = context.positions, context.segments
    rows, length = position.shape
    # Neighbours with one segment are one document unless the positions start again.
    follows = (segment[:, 1:] == segment[:, :-1]) & (position[:, 1:] == position[:, :-1] + 1)
    document = jnp.cumsum(jnp.pad(~follows, ((0, 0), (1, 0)), constant_values=True), axis=1) * (segment != 0)
    slot = jnp.arange(length)
    first_near = jnp.maximum(position - slot + (slot // chunk - 1) * chunk, 0)
    near = Mask(first_near, position // chunk * chunk, position, document, position, document)
    last = document.reshape(rows, -1, chunk)[:, :, -1]
    before, before_that = (jnp.pad(last, ((0, 0), (tiles, 0)))[:, : last.shape[1]] for tiles in (1, 2))

    def by_token(x):
        return jnp.repeat(x, chunk, axis=1)

    return Documents(
        here=chunk_mask(position, document, chunk),
        near=near,
        readable=(document == by_token(before_that)) & (document != 0),
        kept=document == by_token(last),
        keep=(last == before).astype(jnp.float32),
    )
