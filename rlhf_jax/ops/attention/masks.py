"""Who sees whom, as a value that every attention takes.

A mask is one half-open range of key *positions* per query, inside the query's own segment, and a rule that can thin the
range out or add to it. Causality, sliding windows, bidirectional prefixes, packing, ragged rows, the gaps of a cache,
attention sinks and the patterns of the Sparse Transformer are all such values, so every implementation takes the same
O(T + S) description. ``dense()`` is its plain form, ``blocks()`` says which tiles an implementation has to visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Context

NOTHING, SOME, ALL = 0, 1, 2
"""What the queries of a tile see of its keys, in ``Mask.blocks``."""


@dataclass(frozen=True)
class Rule:
    """How a mask departs from the plain range; all rules look at positions, and never past ``end``.

    Args:
        sinks: the first ``sinks`` positions of a segment are seen whatever ``start`` is (StreamingLLM).
        stride: inside the range only keys a multiple of ``stride`` before the query are seen (Sparse Transformer).
        block: together with ``columns``: the last ``columns`` positions of every ``block`` positions are seen whatever
            ``start`` is (the summary columns of the Sparse Transformer's fixed pattern).
        columns: see ``block``.
    """

    sinks: int = 0
    stride: int | None = None
    block: int | None = None
    columns: int = 0

    def __post_init__(self):
        if self.sinks < 0:
            raise ValueError(f"the number of sinks must not be negative, got {self.sinks}")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}; None switches it off")
        if (self.block is None) != (self.columns == 0):
            raise ValueError(f"block {self.block} and columns {self.columns} go together; give both or neither")
        if self.block is not None and not 1 <= self.columns <= self.block:
            raise ValueError(f"columns must be between 1 and block {self.block}, got {self.columns}")

    def visible(self, query, start, end, key) -> Bool[Array, " ..."]:
        """Whether queries at ``query`` with the ranges ``[start, end)`` see keys at ``key`` (broadcasting positions).

        Elementwise, and of plain operators only: kernels call it on their tiles.
        """
        inside = key >= start
        if self.stride is not None:
            inside = inside & ((query - key) % self.stride == 0)
        if self.sinks:
            inside = inside | (key < self.sinks)
        if self.block is not None:
            inside = inside | (key % self.block >= self.block - self.columns)
        return inside & (key < end)


@struct.dataclass
class Mask:
    """Query ``t`` of row ``b`` sees the keys of its segment whose position lies in ``[start, end)``, as ``rule`` says.

    Queries and keys of segment 0 (padding, unused cache slots) see nothing and are seen by nobody.

    Static facts let an implementation choose a schedule and never change what the mask means: ``causal`` (``end`` is
    the query's position + 1), ``window`` (``start`` is that much before it; None for 0) and ``aligned`` (keys are the
    queries' own tokens, and each row is one document in the order of its slots, padding behind it).
    """

    start: Int[Array, "B T"]
    end: Int[Array, "B T"]
    query_positions: Int[Array, "B T"]
    query_segments: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    key_segments: Int[Array, "B S"]
    rule: Rule = struct.field(pytree_node=False, default=Rule())
    causal: bool = struct.field(pytree_node=False, default=False)
    window: int | None = struct.field(pytree_node=False, default=None)
    aligned: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def ranges(
        cls,
        queries: Context,
        keys: Context,
        *,
        window: int | None = None,
        prefix: Int[Array, " ..."] | int = 0,
        rule: Rule = Rule(),
    ) -> Mask:
        """Each token sees itself and the past of its segment.

        Args:
            queries: where the queries stand.
            keys: where the keys stand (the same value without a cache).
            window: see only the last ``window`` positions, the own one included.
            prefix: the first ``prefix`` positions of a segment also see each other forwards (broadcasts to [B, T]).
            rule: what is seen besides, or what is left out.
        """
        positions = queries.positions
        start = jnp.zeros_like(positions) if window is None else jnp.maximum(positions - window + 1, 0)
        plain = isinstance(prefix, int) and prefix == 0
        end = positions + 1
        if not plain:
            end = jnp.where(positions < prefix, jnp.maximum(end, prefix), end)
        return cls(
            start, end, positions, queries.segments, keys.positions, keys.segments,
            rule=rule, causal=plain, window=window, aligned=keys is queries and not queries.packed,
        )  # fmt: skip

    def dense(self) -> Bool[Array, "B T S"]:
        """Whether each query sees each key."""
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        shown = self.rule.visible(
            self.query_positions[:, :, None], self.start[:, :, None], self.end[:, :, None],
            self.key_positions[:, None, :],
        )  # fmt: skip
        return same & shown & (self.query_segments[:, :, None] != 0)

    def blocks(self, query_block: int, key_block: int) -> Int[Array, "B query_blocks key_blocks"]:
        """What each tile of queries sees of each tile of keys: ``NOTHING``, ``SOME`` or ``ALL``.

        Safe from both sides: ``NOTHING`` and ``ALL`` are certain, ``SOME`` may be either. O(T + S) work and a result of
        one number a tile. The lengths must be multiples of the tiles (see ``padded``).
        """
        rows, length = self.start.shape
        slots = self.key_positions.shape[1]
        if length % query_block or slots % key_block:
            raise ValueError(
                f"{length} queries and {slots} keys are not multiples of the tiles {query_block} and {key_block}; "
                "pad the mask first"
            )
        queries, keys = (rows, -1, query_block), (rows, -1, key_block)
        segments, positions = self.key_segments.reshape(keys), self.key_positions.reshape(keys)
        used = segments != 0
        low, high = _extent(positions, used)
        first, last = _extent(segments, used)
        own = self.query_segments.reshape(queries)
        real = own != 0
        start_low, start_high = _extent(self.start.reshape(queries), real)
        end_low, end_high = _extent(self.end.reshape(queries), real)
        own_first, own_last = _extent(own, real)

        def query(x):
            return x[:, :, None]

        def key(x):
            return x[:, None, :]

        meet = (query(own_first) <= key(last)) & (query(own_last) >= key(first))
        in_range = key(high) >= query(start_low)
        if self.rule.sinks:
            in_range = in_range | (key(low) < self.rule.sinks)
        if self.rule.block is not None:
            in_range = jnp.ones_like(in_range)
        some = meet & in_range & (key(low) < query(end_high))
        one_segment = (query(own_first) == key(last)) & (query(own_last) == key(first))
        whole = query(real.all(-1)) & key(used.all(-1))
        every = whole & one_segment & (key(low) >= query(start_high)) & (key(high) < query(end_low))
        if self.rule.stride not in (None, 1):
            every = jnp.zeros_like(every)
        return jnp.where(every, ALL, jnp.where(some, SOME, NOTHING)).astype(jnp.int32)

    def padded(self, query_block: int, key_block: int) -> Mask:
        """The same mask with padding behind it, up to multiples of the tiles."""

        def pad(x, multiple):
            return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))

        return self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            start=pad(self.start, query_block),
            end=pad(self.end, query_block),
            query_positions=pad(self.query_positions, query_block),
            query_segments=pad(self.query_segments, query_block),
            key_positions=pad(self.key_positions, key_block),
            key_segments=pad(self.key_segments, key_block),
        )


def _extent(x: Int[Array, "B blocks n"], counted: Bool[Array, "B blocks n"]):
    """The smallest and the largest counted entry of each block; of an empty one, values that meet nothing."""
    large = jnp.iinfo(jnp.int32).max
    return jnp.where(counted, x, large).min(-1), jnp.where(counted, x, -1).max(-1)


def alibi_slopes(heads: int) -> Float[Array, " H"]:
    """ALiBi's slope of each head: ``2^(-8 (h + 1) / H)`` for a power of two, else as published (arXiv 2108.12409)."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    # The remaining heads take every other slope of twice as many heads.
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(heads - power)]
    return jnp.array(slopes, jnp.float32)
