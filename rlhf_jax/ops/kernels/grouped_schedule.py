"""What the grouped matmul kernels share: the case that they are asked about, and which rows each step works on.

Rows are sorted by group; group ``g`` has the next ``sizes[g]`` of them, and rows behind the last group belong to none.
All lists have lengths that follow from the shapes alone, and say themselves how many of their entries count.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class GroupedCase:
    """One grouped matmul ``[rows, k] x [experts, k, n]``, or its gradients, as an implementation sees it when asked.

    ``platform`` is "cpu", "gpu" or "tpu", ``device`` the device's own name.
    """

    platform: str
    device: str
    rows: int
    k: int
    n: int
    experts: int
    dtype: str


ALIGNED = 8
"""Rows that a tile in shared memory is made of: a copy to or from it begins at a multiple of them."""


@struct.dataclass
class Tiles:
    """Tiles of rows that begin near where their group does, so that none is visited for two groups.

    ``group`` is ``G`` for tiles of rows behind the last group. ``start`` is a multiple of ``ALIGNED``; of the rows from
    there on those from ``begin`` to ``end`` are the group's. Entries from ``count`` on mean nothing.
    """

    group: Int[Array, " S"]
    start: Int[Array, " S"]
    begin: Int[Array, " S"]
    end: Int[Array, " S"]
    count: Int[Array, ""]


@struct.dataclass
class Visits:
    """Which blocks of rows each group meets, group by group; blocks begin at multiples of their length.

    ``begin`` and ``end`` bound the rows of the visit's group (``G`` behind the last one), inside the block or not.
    ``first`` and ``last`` mark the ends of the runs of visits that add to the same result. Entries from ``count`` on
    repeat the last visit, so that they move nothing.
    """

    group: Int[Array, " S"]
    block: Int[Array, " S"]
    begin: Int[Array, " S"]
    end: Int[Array, " S"]
    first: Bool[Array, " S"]
    last: Bool[Array, " S"]
    count: Int[Array, ""]


def bounds(sizes: Int[Array, " G"], rows: int) -> tuple[Int[Array, " G+1"], Int[Array, " G+1"]]:
    """The first row of each group and the row behind its last one; the last entry is of the rows of no group.

    Sizes that add up to more than ``rows`` are cut off there, so that kernels never leave their arrays.
    """
    ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
    return jnp.append(jnp.zeros(1, jnp.int32), ends), jnp.append(ends, jnp.int32(rows))


def tiles(sizes: Int[Array, " G"], rows: int, tile: int) -> Tiles:
    """The tiles of ``tile`` rows, a multiple of ``ALIGNED``, in order of their rows; empty groups have none."""
    begins, ends = bounds(sizes, rows)
    starts = begins // ALIGNED * ALIGNED
    needed = jnp.where(ends > begins, -(-(ends - starts) // tile), 0)
    # Counted in ALIGNED rows, of which a tile is a multiple, each group but one adds less than a tile.
    group, nth, count = _entries(needed, -(-rows // tile) + sizes.shape[0])
    start = starts[group] + nth * tile
    begin, end = jnp.maximum(start, begins[group]), jnp.minimum(start + tile, ends[group])
    return Tiles(group, start, begin, end, count)


def visits_of_blocks(sizes: Int[Array, " G"], rows: int, block: int) -> Visits:
    """Every block of ``block`` rows once for each group in it, also the groupless rows; runs are those of a block."""
    begins, ends = bounds(sizes, rows)
    met = jnp.where(ends > begins, -(-ends // block) - begins // block, 0)
    return _visits(begins, ends, met, -(-rows // block), block, by_block=True)


def visits_of_groups(sizes: Int[Array, " G"], rows: int, block: int) -> Visits:
    """The blocks of each group, at least one, so that empty groups have a result too; runs are those of a group."""
    begins, ends = (x[:-1] for x in bounds(sizes, rows))
    met = jnp.where(ends > begins, -(-ends // block) - begins // block, 1)
    return _visits(begins, ends, met, -(-rows // block), block, by_block=False)


def _visits(begins, ends, met, blocks: int, block: int, *, by_block: bool) -> Visits:
    length = blocks + ends.shape[0] - 1
    group, nth, count = _entries(met, length)
    # An empty group may begin behind the last block.
    at = jnp.minimum(begins[group] // block + nth, blocks - 1)
    run = at if by_block else group
    changes = run[1:] != run[:-1]
    edge = jnp.ones(1, bool)
    last = jnp.append(changes, edge) | (jnp.arange(length) == count - 1)
    return Visits(group, at, begins[group], ends[group], jnp.append(edge, changes), last, count)


def _entries(counts: Int[Array, " G"], length: int):
    """For each of ``length`` entries its owner and which of the owner's it is; owner ``g`` has the next ``counts[g]``.

    Entries from the returned number on repeat the last one.
    """
    behind = jnp.cumsum(counts)
    entry = jnp.minimum(jnp.arange(length, dtype=jnp.int32), jnp.maximum(behind[-1] - 1, 0))
    owner = (entry[:, None] >= behind).sum(1, dtype=jnp.int32)
    return owner, entry - (behind - counts)[owner], behind[-1]
