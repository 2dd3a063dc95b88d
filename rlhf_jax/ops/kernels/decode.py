"""What the decode kernels share: attention of one query a row over a cache, split along its slots.

The query heads of one key head form the rows of one tile, so that a cached key is read once for all of them. Programs
share out the tiles of the cache that the row's mask can see, and the parts are merged by their log-sum-exps. Decoding
has no gradient. None of them was measured on its device yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import tiles
from rlhf_jax.ops.kernels.tiles import Plan


@struct.dataclass
class Step:
    """One step of decoding, in the form that kernels read.

    ``facts`` are each row's query position, start, end and segment. ``order[b, :total[b]]`` are the tiles of slots that
    row ``b`` sees, of which the first ``partial[b]`` need the mask.
    """

    q: Float[Array, "B K M D"]
    keys: Float[Array, "B K S D"]
    values: Float[Array, "B K S Dv"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    facts: Int[Array, "B 4"]
    order: Int[Array, "B n"]
    partial: Int[Array, "B"]
    total: Int[Array, "B"]
    slopes: Float[Array, "K M"]


@dataclass(frozen=True)
class Split:
    """How a step is cut: slots of a tile, rows that a group's heads are padded to, programs that share a cache."""

    tile: int
    rows: int
    programs: int
    plan: Plan


def refused_shape(case: Case, widest: int) -> str | None:
    """What no decode kernel serves."""
    if case.length != 1:
        return f"it decodes one token a row, got {case.length}"
    if max(case.width, case.value_width) > widest:
        return f"heads are at most {widest} wide, got {case.width} and {case.value_width}"
    return None


def prepare(
    q: Float[Array, "B H D"],
    keys,
    values,
    mask: Mask,
    terms: Terms,
    *,
    tile: int,
    rows: int,
    programs: int,
    **rest: Any,
) -> tuple[Split, Step]:
    """The step in tiles.

    Args:
        q: queries.
        keys: [B, K, S, D]; caches shorter than a tile are padded, longer ones are never copied.
        values: [B, K, S, Dv].
        mask: of one query a row.
        terms: what the logits are besides products.
        tile: slots of a tile.
        rows: what the number of query heads of a key head is padded to a multiple of.
        programs: the most that share one cache.
        rest: further facts of the plan.
    """
    groups = keys.shape[1]
    grouped = tiles.padded(q.reshape(q.shape[0], groups, -1, q.shape[2]), 2, rows)
    plan = Plan.of(mask, terms, 1, tile, head_axis=1, **rest)
    if keys.shape[2] < tile:
        mask = mask.padded(1, tile)
        keys, values = tiles.padded(keys, 2, tile), tiles.padded(values, 2, tile)
    visits = tiles.visits(mask.padded(1, tile).blocks(1, tile))
    slopes = jnp.zeros(q.shape[1], jnp.float32) if terms.slopes is None else terms.slopes.astype(jnp.float32)
    facts = jnp.stack((mask.query_positions, mask.start, mask.end, mask.query_segments), axis=1)
    step = Step(
        q=grouped,
        keys=keys,
        values=values,
        positions=mask.key_positions.astype(jnp.int32),
        segments=mask.key_segments.astype(jnp.int32),
        facts=facts[:, :, 0].astype(jnp.int32),
        order=visits.order[:, 0],
        partial=visits.partial[:, 0],
        total=visits.total[:, 0],
        slopes=tiles.padded(slopes.reshape(groups, -1), 1, rows),
    )
    return Split(tile, grouped.shape[2], min(programs, visits.order.shape[2]), plan), step


def programs_for(rows: int, groups: int, processors: int = 132, each: int = 4) -> int:
    """Programs that share a cache, so that all of them together occupy every processor of the device ``each`` times."""
    return max(1, -(-processors * each // (rows * groups)))


def merged(
    parts: Float[Array, "B K splits M Dv"],
    logs: Float[Array, "B K splits M"],
    terms: Terms,
    heads: int,
    dtype,
) -> Float[Array, "B H Dv"]:
    """Attention over the whole cache from the parts, where empty parts have a log-sum-exp of ``HIDDEN``."""
    rows, groups = parts.shape[:2]
    per_group = heads // groups
    parts, logs = parts[:, :, :, :per_group], logs[:, :, :, :per_group]
    sinks = tiles.sinks_of(terms, heads).reshape(groups, per_group)
    # Far above the log of an empty part, so that a row that sees nothing has weights of exactly 0.
    top = jnp.maximum(jnp.maximum(logs.max(axis=2), sinks), HIDDEN / 2)
    weights = jnp.exp(logs - top[:, :, None])
    whole = weights.sum(axis=2) + jnp.exp(sinks - top)
    mixed = jnp.sum(weights[..., None] * parts, axis=2) / jnp.where(whole == 0.0, 1.0, whole)[..., None]
    return mixed.reshape(rows, heads, -1).astype(dtype)
