"""Grouped matmuls on TPUs through Pallas: rows sorted by group times the group's matrix, and the matrices' gradient.

Blocks of rows begin at multiples of their length, and one that holds rows of several groups is visited once for each:
lists of visits lie in scalar memory, steps that are not needed load and compute nothing. Steps over rows lie
innermost but one, so a group's matrix is loaded once for each of its blocks and not once for each row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.kernels.grouped_schedule import GroupedCase, Visits, visits_of_blocks, visits_of_groups

LANES = 128
SUBLANES = 16
SIDES = 1024, 512, 256, 128
"""Of a tile of a matrix: the longest that divides it, half as long where numbers take four bytes."""
LONGEST_BLOCK, SHORTEST_BLOCK = 512, 128
SCALAR_ENTRIES = 1 << 13
"""Visits whose six numbers each are let into scalar memory."""


def refusal(case: GroupedCase) -> str | None:
    """Why these kernels cannot serve a case, or None."""
    if case.platform != "tpu":
        return f"it is written for TPUs, and JAX runs on {case.platform!r}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 or float32, not {case.dtype}"
    if case.k % LANES or case.n % LANES:
        return f"the sides of its matrices must be multiples of {LANES}, got {case.k} and {case.n}"
    if case.rows < 1:
        return "it needs rows"
    visits = -(-case.rows // block_of(case.rows, case.experts)) + case.experts
    if visits > SCALAR_ENTRIES:
        return f"its list of {visits} visits is longer than {SCALAR_ENTRIES}; take fewer rows or experts at a time"
    return None


def block_of(rows: int, groups: int) -> int:
    """The length of a block of rows: near that of a group, as each block is computed whole for each of its groups."""
    block = SHORTEST_BLOCK
    while block < LONGEST_BLOCK and block * 2 * groups <= rows:
        block *= 2
    return min(block, -(-rows // SUBLANES) * SUBLANES)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    transpose_w: bool = False,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, summed in fp32; rows behind the last group give 0.

    Args:
        x: rows sorted by group.
        w: with ``transpose_w`` ``[G, N, K]``, whose transposes are multiplied.
        sizes: rows of each group.
        transpose_w: see ``w``.
        block: rows of a block, None to choose.
        interpret: run on any device.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, depth = x.shape
    groups, width = w.shape[0], w.shape[1 if transpose_w else 2]
    block = block_of(rows, groups) if block is None else block
    visits = visits_of_blocks(sizes, rows, block)
    deep, wide = (_side(length, x.dtype.itemsize) for length in (depth, width))
    steps = depth // deep

    def kernel(group, at, begin, end, first, count, x_r, w_r, out_r, sums):
        visit, step = pl.program_id(1), pl.program_id(2)
        real = (visit < count[0]) & (group[visit] < groups)

        @pl.when(step == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(real)
        def _():
            sums[...] += _product(x_r[...], w_r[0], (1, 1 if transpose_w else 0))

        # What the groups before left in the block stays.
        @pl.when((step == steps - 1) & (visit < count[0]))
        def _():
            own = _inside(at[visit] * block, begin[visit], end[visit], out_r.shape, 0)
            kept = jnp.where(first[visit] != 0, jnp.zeros_like(out_r), out_r[...])
            out_r[...] = jnp.where(own, sums[...].astype(out_r.dtype), kept)

    def step_of(visit, step, lists):
        # Where nothing is computed nothing moves.
        return jnp.where((visit < lists[-1][0]) & (lists[0][visit] < groups), step, steps - 1)

    def matrix(n, visit, step, *lists):
        k = step_of(visit, step, lists)
        return jnp.minimum(lists[0][visit], groups - 1), *((n, k) if transpose_w else (k, n))

    def some_rows(n, visit, step, *lists):
        return lists[1][visit], step_of(visit, step, lists)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(width // wide, visits.group.shape[0], steps),
            in_specs=[
                pl.BlockSpec((block, deep), some_rows),
                pl.BlockSpec((1, wide, deep) if transpose_w else (1, deep, wide), matrix),
            ],
            out_specs=pl.BlockSpec((block, wide), lambda n, visit, step, *lists: (lists[1][visit], n)),
            scratch_shapes=[pltpu.VMEM((block, wide), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(*_lists(visits, visits.first), x, w)


def grouped_outer(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    sizes: Int[Array, " G"],
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "G K N"]:
    """``x' dy`` over the rows of each group, summed in fp32; 0 for empty groups; rows behind the last one are left out.

    Arguments as in ``grouped_matmul``.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, depth), width, groups = x.shape, dy.shape[1], sizes.shape[0]
    block = block_of(rows, groups) if block is None else block
    visits = visits_of_groups(sizes, rows, block)
    deep, wide = (_side(length, x.dtype.itemsize) for length in (depth, width))

    def kernel(group, at, begin, end, edges, count, x_r, dy_r, out_r, sums):
        visit = pl.program_id(2)
        offset, edge = at[visit] * block, edges[visit]
        whole = (begin[visit] <= offset) & (end[visit] >= offset + block)
        counts = visit < count[0]

        @pl.when(edge % 2 == 1)
        def _():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(counts & whole)
        def _():
            sums[...] += _product(x_r[...], dy_r[...], (0, 0))

        # Both sides are masked, as 0 times what is not a number is not one.
        @pl.when(counts & ~whole & (end[visit] > begin[visit]))
        def _():
            left, right = (
                jnp.where(_inside(offset, begin[visit], end[visit], r.shape, 0), r[...], jnp.zeros_like(r))
                for r in (x_r, dy_r)
            )
            sums[...] += _product(left, right, (0, 0))

        @pl.when(counts & (edge >= 2))
        def _():
            out_r[0] = sums[...].astype(out_r.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, depth, width), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(depth // deep, width // wide, visits.group.shape[0]),
            in_specs=[
                pl.BlockSpec((block, deep), lambda k, n, visit, *lists: (lists[1][visit], k)),
                pl.BlockSpec((block, wide), lambda k, n, visit, *lists: (lists[1][visit], n)),
            ],
            out_specs=pl.BlockSpec((1, deep, wide), lambda k, n, visit, *lists: (lists[0][visit], k, n)),
            scratch_shapes=[pltpu.VMEM((deep, wide), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_outer",
    )(*_lists(visits, visits.first + 2 * visits.last), x, dy)


def _lists(visits: Visits, edges) -> tuple[Array, ...]:
    """What lies in scalar memory."""
    plain = (visits.group, visits.block, visits.begin, visits.end, edges, visits.count[None])
    return tuple(x.astype(jnp.int32) for x in plain)


def _product(a, b, contracted: tuple[int, int]):
    """``a b`` in fp32, over one axis of each; fp32 operands keep their full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _side(length: int, itemsize: int) -> int:
    return next((side for side in SIDES if length % side == 0 and side * itemsize <= 2048), length)


def _inside(offset, begin, end, shape: tuple[int, ...], axis: int):
    """Which rows of a block are the group's."""
    row = offset + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (row >= begin) & (row < end)
