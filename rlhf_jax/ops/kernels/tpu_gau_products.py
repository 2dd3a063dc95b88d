"""The two products of a gated attention unit on TPUs: the weighted sum, and the gradient of one side of the scores.

Grids run over rows, tiles and the steps of a list of tiles in scalar memory, so invisible tiles are neither loaded nor
computed. ``mix`` is tiled over the wide values and computes the scores again for each tile of them; ``pull`` sums the
wide product over slices of the values, then takes one step towards the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.gau_terms import Score
from rlhf_jax.ops.kernels.gau_tiles import Linear, Walk, shown, value
from rlhf_jax.ops.kernels.tiles import product

VALUE_TILES = 1024, 512, 256, 128
"""Widths of a tile of values, the widest that divides them."""


def mix(
    rows: Float[Array, "B R D"],
    columns: Float[Array, "B C D"],
    values: Float[Array, "B C E"],
    walk: Walk,
    score: Score | Linear,
    scale: float,
    far: tuple[Float[Array, "B R D"], Float[Array, "B G D E"]] | None,
    interpret: bool,
) -> Float[Array, "B R E"]:
    """``score(scale rows columns') values``, as ``gau_schedule.Kernels`` describes it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, key_width = rows.shape
    dtype, width = values.dtype, values.shape[2]
    row_tile, column_tile, tiles, steps = _tiles(walk)
    value_tile = value_tile_of(width)

    def kernel(order, partial, total, rows_r, columns_r, values_r, row_facts_r, column_facts_r, *rest):
        far_r, (out_r, sums) = rest[:-2], rest[-2:]
        at, step = pl.program_id(0) * tiles + pl.program_id(2), pl.program_id(3)

        @pl.when(step == 0)
        def _():
            start = product(far_r[0][0], far_r[1][0, 0], (1, 0)) if far_r else jnp.zeros_like(sums)
            sums[...] = start

        def add(masked: bool):
            weights = value(score, product(rows_r[0], columns_r[0], (1, 1)) * scale)
            if masked:
                weights = jnp.where(_shown(walk, row_facts_r, column_facts_r), weights, 0.0)
            sums[...] += product(weights.astype(dtype), values_r[0], (1, 0))

        pl.when(step < partial[at])(lambda: add(masked=True))
        pl.when((step >= partial[at]) & (step < total[at]))(lambda: add(masked=False))

        @pl.when(step == steps - 1)
        def _():
            out_r[0] = sums[...].astype(dtype)

    def row(b, e, r, step, *lists):
        return b, r, 0

    def visited(b, r, step, lists):
        return _visited(lists, b * tiles + r, step, steps)

    in_specs = [
        pl.BlockSpec((1, row_tile, key_width), row),
        pl.BlockSpec((1, column_tile, key_width), lambda b, e, r, step, *lists: (b, visited(b, r, step, lists), 0)),
        pl.BlockSpec((1, column_tile, value_tile), lambda b, e, r, step, *lists: (b, visited(b, r, step, lists), e)),
        pl.BlockSpec((1, row_tile, walk.rows.shape[1]), row),
        pl.BlockSpec(
            (1, walk.columns.shape[1], column_tile), lambda b, e, r, step, *lists: (b, 0, visited(b, r, step, lists))
        ),
    ]
    if far is not None:
        shared = tiles // far[1].shape[1]
        in_specs += [
            pl.BlockSpec((1, row_tile, key_width), row),
            pl.BlockSpec(
                (1, 1, key_width, value_tile),
                lambda b, e, r, step, *lists: (b, jax.lax.div(r, jnp.int32(shared)), 0, e),
            ),
        ]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, length, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, width // value_tile, tiles, steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, row_tile, value_tile), lambda b, e, r, step, *lists: (b, r, e)),
            scratch_shapes=[pltpu.VMEM((row_tile, value_tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=interpret,
        name="gau_mix",
    )(*_lists(walk), rows, columns, values, walk.rows.swapaxes(1, 2), walk.columns, *(far or ()))


def pull(
    rows: Float[Array, "B R D"],
    columns: Float[Array, "B C D"],
    row_values: Float[Array, "B R E"],
    column_values: Float[Array, "B C E"],
    walk: Walk,
    score: Score | Linear,
    scale: float,
    interpret: bool,
) -> Float[Array, "B R D"]:
    """The gradient of the rows, as ``gau_schedule.Kernels`` describes it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, key_width = rows.shape
    dtype, width = rows.dtype, row_values.shape[2]
    row_tile, column_tile, tiles, steps = _tiles(walk)
    value_tile = value_tile_of(width)
    slices = width // value_tile

    def kernel(
        order, partial, total, rows_r, columns_r, row_values_r, column_values_r, row_facts_r, column_facts_r,
        out_r, cotangents, gradient,
    ):  # fmt: skip
        at, step, e = pl.program_id(0) * tiles + pl.program_id(1), pl.program_id(2), pl.program_id(3)
        seen = step < total[at]

        @pl.when((step == 0) & (e == 0))
        def _():
            gradient[...] = jnp.zeros_like(gradient)

        @pl.when(seen & (e == 0))
        def _():
            cotangents[...] = jnp.zeros_like(cotangents)

        @pl.when(seen)
        def _():
            cotangents[...] += product(row_values_r[0], column_values_r[0], (1, 1))

        def add(masked: bool):
            slopes = score.gradient(product(rows_r[0], columns_r[0], (1, 1)) * scale) * cotangents[...] * scale
            if masked:
                slopes = jnp.where(_shown(walk, row_facts_r, column_facts_r), slopes, 0.0)
            gradient[...] += product(slopes.astype(dtype), columns_r[0], (1, 0))

        last = e == slices - 1
        pl.when((step < partial[at]) & last)(lambda: add(masked=True))
        pl.when((step >= partial[at]) & seen & last)(lambda: add(masked=False))

        @pl.when((step == steps - 1) & last)
        def _():
            out_r[0] = gradient[...].astype(dtype)

    def row(b, r, step, e, *lists):
        return b, r, 0

    def visited(b, r, step, lists):
        return _visited(lists, b * tiles + r, step, steps)

    def slice_of(b, r, step, e, lists):
        # Past the end of the list nothing moves.
        return jnp.where(step < lists[2][b * tiles + r], e, slices - 1)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, length, key_width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, tiles, steps, slices),
            in_specs=[
                pl.BlockSpec((1, row_tile, key_width), row),
                pl.BlockSpec(
                    (1, column_tile, key_width), lambda b, r, step, e, *lists: (b, visited(b, r, step, lists), 0)
                ),
                pl.BlockSpec(
                    (1, row_tile, value_tile), lambda b, r, step, e, *lists: (b, r, slice_of(b, r, step, e, lists))
                ),
                pl.BlockSpec(
                    (1, column_tile, value_tile),
                    lambda b, r, step, e, *lists: (b, visited(b, r, step, lists), slice_of(b, r, step, e, lists)),
                ),
                pl.BlockSpec((1, row_tile, walk.rows.shape[1]), row),
                pl.BlockSpec(
                    (1, walk.columns.shape[1], column_tile),
                    lambda b, r, step, e, *lists: (b, 0, visited(b, r, step, lists)),
                ),
            ],
            out_specs=pl.BlockSpec((1, row_tile, key_width), row),
            scratch_shapes=[
                pltpu.VMEM((row_tile, column_tile), jnp.float32),
                pltpu.VMEM((row_tile, key_width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2 + ("arbitrary",) * 2),
        interpret=interpret,
        name="gau_pull",
    )(*_lists(walk), rows, columns, row_values, column_values, walk.rows.swapaxes(1, 2), walk.columns)


def value_tile_of(width: int) -> int:
    """The width of a tile of values."""
    return next((tile for tile in VALUE_TILES if width % tile == 0), width)


def _tiles(walk: Walk) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, tiles of rows, and the most tiles that one visits."""
    tiles, steps = walk.order.shape[1:]
    return walk.rows.shape[2] // tiles, walk.columns.shape[2] // steps, tiles, steps


def _lists(walk: Walk) -> tuple[Array, Array, Array]:
    """Flat, as scalar memory pads the last axis to its own width."""
    return walk.order.reshape(-1), walk.partial.reshape(-1), walk.total.reshape(-1)


def _visited(lists: tuple[Array, ...], at, step, steps: int):
    """The tile that a step loads: past the end of the list the last one again, which costs no transfer."""
    order, _, total = lists
    return order[at * steps + jnp.minimum(step, jnp.maximum(total[at] - 1, 0))]


def _shown(walk: Walk, row_facts, column_facts):
    rows = [row_facts[0, :, line : line + 1] for line in range(row_facts.shape[2])]
    columns = [column_facts[0, line : line + 1, :] for line in range(column_facts.shape[1])]
    return shown(walk, rows, columns)
