"""Grouped matmuls in plain XLA whose cost follows the rows, not the number of experts.

A loop over experts, and inside it one over tiles of the expert's rows: as many as it has. The last tile is the smallest
of a ladder of lengths that covers the rest. A tile may reach into the rows of the next expert; these are computed again
when their turn comes, so nothing needs a mask. Matrices are sliced once for each expert, not for each tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.kernels.grouped_schedule import GroupedCase

LADDER = (32, 64, 96, 128, 160, 192, 224, 256)
"""Lengths of tiles of rows; whole ones have the last."""
OUTER_LADDER = (32, 64, 96, 128, 160, 192, 256, 384, 512, 1024)
"""The same where rows are summed over: adding to a whole matrix costs as much as many rows, so tiles are long."""
OUTER_REST = (256, 1024)
"""Of tiles that add to what a first one has written."""


def refusal(case: GroupedCase) -> str | None:
    """It serves every case."""
    return None


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "X K N"], sizes: Int[Array, " X"], transpose_w: bool = False
) -> Float[Array, "M N"]:
    """See ``ops.experts.grouped_matmul``."""
    rows, width = x.shape[0], w.shape[1 if transpose_w else 2]
    contracted = ((1,), (1 if transpose_w else 0,))

    def of_group(out, group, begin, end):
        matrix = lax.dynamic_index_in_dim(w, group, keepdims=False)

        def tile(out, at, length: int, fits: bool):
            product = lax.dot_general(
                lax.dynamic_slice_in_dim(x, at, length), matrix, (contracted, ((), ())),
                preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
            ).astype(x.dtype)  # fmt: skip
            return _put(out, product, at, fits)

        return _walk(tile, out, begin, end, rows, LADDER)

    out = _each_group(of_group, jnp.zeros((rows, width), x.dtype), sizes)
    # The last tile may have reached behind the last group.
    total = sizes.sum()

    def clear(out, at, length: int, fits: bool):
        return _put(out, jnp.zeros((length, width), x.dtype), at, fits)

    return _walk(clear, out, total, jnp.minimum(total + LADDER[-1], rows), rows, LADDER)


def grouped_outer(x: Float[Array, "M K"], dy: Float[Array, "M N"], sizes: Int[Array, " X"]) -> Float[Array, "X K N"]:
    """``x' dy`` over the rows of each group; 0 for empty groups."""
    rows, wide = x.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    longest = _lengths(OUTER_LADDER, rows)[-1]

    def of_group(out, group, begin, end):
        def product(at, length: int, fits: bool):
            start = at if fits else jnp.minimum(at, rows - length)
            row = start + jnp.arange(length)[:, None]
            own = (row >= at) & (row < end)
            left, right = (jnp.where(own, lax.dynamic_slice_in_dim(each, start, length), 0) for each in (x, dy))
            return lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=wide)

        def write(out, at, length: int, fits: bool):
            return lax.dynamic_update_index_in_dim(out, product(at, length, fits), group, 0)

        def add(out, at, length: int, fits: bool):
            total = lax.dynamic_index_in_dim(out, group, keepdims=False) + product(at, length, fits)
            return lax.dynamic_update_index_in_dim(out, total, group, 0)

        first = jnp.minimum(begin + longest, end)  # one tile
        out = _walk(write, out, begin, first, rows, OUTER_LADDER)
        return out if longest == rows else _walk(add, out, first, end, rows, OUTER_REST)

    out = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), wide)
    return _each_group(of_group, out, sizes).astype(x.dtype)


def _each_group(of_group: Callable[..., Any], carry: Any, sizes: Int[Array, " X"]) -> Any:
    """``carry = of_group(carry, group, first row, row behind the last)`` for all groups in order."""
    ends = jnp.cumsum(sizes)

    def step(group, carry):
        return of_group(carry, group, ends[group] - sizes[group], ends[group])

    return lax.fori_loop(0, sizes.shape[0], step, carry)


def _walk(tile: Callable[..., Any], carry: Any, begin: Array, end: Array, rows: int, ladder: tuple[int, ...]) -> Any:
    """``carry = tile(carry, first row, length, fits)`` over the rows from ``begin`` to ``end``.

    Each loop is over the tiles of one length; those but the first run once or not at all. Where ``fits`` is False the
    tile may reach behind the last row of all.
    """
    lengths = _lengths(ladder, rows)
    longest = lengths[-1]

    def loop(state, length: int, shorter: int, fits: bool):
        def go(state):
            at, rest = state[0], end - state[0]
            wanted = rest > shorter
            if fits:
                wanted &= at + length <= rows
            return wanted if length == longest else wanted & (rest <= length)

        def step(state):
            at, carry = state
            return at + length, tile(carry, at, length, fits)

        return lax.while_loop(go, step, state)

    state = (begin, carry)
    if longest < rows:
        for length, shorter in zip(reversed(lengths), (*reversed(lengths[:-1]), 0), strict=True):
            state = loop(state, length, shorter, True)
    # What is left begins where no tile fits.
    return loop(state, longest, 0, False)[1]


def _lengths(ladder: tuple[int, ...], rows: int) -> tuple[int, ...]:
    return tuple(length for length in ladder if length < rows) or (rows,)


def _put(out: Float[Array, "M N"], values: Float[Array, "L N"], at: Array, fits: bool) -> Float[Array, "M N"]:
    """Rows from ``at`` on replaced; where the values begin earlier to fit in, only their rows from ``at`` on count."""
    if not fits:
        start = jnp.minimum(at, out.shape[0] - values.shape[0])
        old = lax.dynamic_slice_in_dim(out, start, values.shape[0])
        values = jnp.where((start + jnp.arange(values.shape[0]) >= at)[:, None], values, old)
    return lax.dynamic_update_slice_in_dim(out, values, at, 0)
