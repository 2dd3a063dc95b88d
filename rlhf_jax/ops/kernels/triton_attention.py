"""Flash attention through Pallas:Triton, for NVIDIA GPUs older than Hopper and as the portable tier on newer ones.

One program per row, query head and tile of queries loops over the list of tiles of keys that it can see, first those
that need a mask and then those that do not. JAX calls this way to Triton deprecated since 0.11; where it is gone, the
implementation says so. Not measured on a GPU yet.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import tiles
from rlhf_jax.ops.kernels.tiles import Plan, Scene, Visits, product

SMALLEST = 16
"""The shortest side of a product that Triton takes."""
FARTHEST = (1 << 31) - 1
"""Offsets into arrays are of 32 bits."""


def missing() -> str | None:
    """Why Pallas:Triton cannot be used in this process, or None."""
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas:Triton any more"
    capability = tiles.compute_capability()
    if capability is None or capability < 8.0:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, and this is {jax.devices()[0].device_kind!r}"
    return None


def refusal(case: Case) -> str | None:
    """Why the kernel cannot serve, or None."""
    if case.platform != "gpu":
        return f"it is written for GPUs, and JAX runs on {case.platform!r}"
    if case.dtype not in ("bfloat16", "float16", "float32"):
        return f"it takes bfloat16, float16 or float32, not {case.dtype}"
    if max(case.width, case.value_width) > 256:
        return f"heads are at most 256 wide, got {case.width} and {case.value_width}"
    if max(case.rows, case.heads) > 65535:
        return f"a grid has at most 65535 rows and heads, got {case.rows} and {case.heads}"
    entries = case.rows * max(case.length * case.heads, case.slots * case.kv_heads)
    entries *= power_of_two(max(case.width, case.value_width))
    if entries > FARTHEST:
        return f"its offsets of 32 bits reach arrays of at most {FARTHEST} entries, got {entries}"
    return missing()


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    tile: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and the log of each query's sum of exponentials, in fp32.

    Args:
        q: queries.
        k: keys; ``H`` is a multiple of ``K``.
        v: values.
        mask: who sees whom.
        terms: what the logits are besides products.
        tile: length of the tiles of queries and keys, a power of two from 16; None to choose.
        interpret: compute with ordinary operations, on any device.
    """
    if not interpret:
        ignore_the_deprecation()
    length, value_width = q.shape[1], v.shape[3]
    forward, backward = _tiles(q, v) if tile is None else ((tile, tile), (tile, tile))
    plan = Plan.of(mask, terms, *forward, head_axis=2, interpret=interpret, backward_tiles=backward)
    scene = tiles.scene(plan, mask, terms, q.shape[2])
    # Triton's tiles have powers of two on every side.
    q, k, v = (tiles.padded(x, 3, power_of_two(x.shape[3])) for x in (q, k, v))
    q = tiles.padded(q, 1, plan.multiples[0])
    k, v = (tiles.padded(x, 1, plan.multiples[1]) for x in (k, v))
    out, lse = _attend(plan, q, k, v, tiles.sinks_of(terms, q.shape[2]), scene)
    return out[:, :length, :, :value_width], lse[:, :length]


def power_of_two(length: int) -> int:
    """The next power of two, and at least the side of the smallest product."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def ignore_the_deprecation() -> None:
    """Silence the one warning that lowering through Pallas:Triton gives, which nobody who runs a model can act on."""
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def _tiles(q, v) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tiles of queries and keys, forward and backward, that fit into the 99 KiB of shared memory of small GPUs."""
    wide = max(q.shape[3], v.shape[3]) > 128
    if q.dtype == jnp.float32:
        return ((32, 16), (16, 16)) if wide else ((64, 32), (32, 32))
    return ((64, 32), (32, 32)) if wide else ((128, 64), (64, 64))


def warps(tile: int) -> int:
    """Number of warps of a program whose accumulators have this many rows."""
    return 8 if tile >= 128 else 4


def facts(queries, keys, start, query_first: bool, tile: int):
    """Facts of a whole tile of the own side and of the visited tile at ``start``, to broadcast against products.

    With ``query_first`` the own side are the queries, down the tile; else they are the keys, with queries across.
    """
    from jax.experimental import pallas as pl

    visited = pl.ds(start, tile)
    if query_first:
        return [queries[at, :][:, None] for at in range(4)], [keys[at, visited][None, :] for at in range(2)]
    return [queries[at, visited][None, :] for at in range(4)], [keys[at, :][:, None] for at in range(2)]


def visit_all(order, partial, total, visit, carry):
    """``carry`` after ``visit(masked, tile, carry)`` for every listed tile."""
    masked, count = partial[...], total[...]
    carry = jax.lax.fori_loop(0, masked, lambda at, carry: visit(True, order[at], carry), carry)
    return jax.lax.fori_loop(masked, count, lambda at, carry: visit(False, order[at], carry), carry)


def _kernel(q, k, v, queries, keys, order, partial, total, slopes, sinks, out, lse, *, plan: Plan):
    from jax.experimental import pallas as pl

    own = q[...]
    slope = slopes[...] if plan.sloped else None

    def visit(masked: bool, tile, carry):
        top, whole, mixed = carry
        start = tile * plan.key_tile
        slots = pl.ds(start, plan.key_tile)
        logits, _ = tiles.tile_logits(
            plan, product(own, k[slots, :], (1, 1)), *facts(queries, keys, start, True, plan.key_tile), slope, masked
        )
        after = jnp.maximum(top, logits.max(axis=1))
        weights = jnp.exp(logits - after[:, None])
        decay = jnp.exp(top - after)
        mixed = decay[:, None] * mixed + product(weights.astype(v.dtype), v[slots, :], (1, 0))
        return after, decay * whole + weights.sum(axis=1), mixed

    # Far above a hidden logit, so that a row without keys has weights of exactly 0.
    top = jnp.full(plan.query_tile, HIDDEN / 2, jnp.float32)
    empty = jnp.zeros(plan.query_tile, jnp.float32), jnp.zeros(out.shape, jnp.float32)
    top, whole, mixed = visit_all(order, partial, total, visit, (top, *empty))
    after = jnp.maximum(top, sinks[...])
    decay = jnp.exp(top - after)
    whole = whole * decay + jnp.exp(sinks[...] - after)
    divisor = jnp.where(whole == 0.0, 1.0, whole)
    out[...] = (mixed * (decay / divisor)[:, None]).astype(out.dtype)
    lse[...] = jnp.where(whole == 0.0, HIDDEN, after + jnp.log(divisor))


def list_specs(visits: Visits):
    """Blocks of the lists of the own tile; the grid is (tile, head, row)."""
    from jax.experimental import pallas as pl

    return [
        pl.BlockSpec((None, None, visits.order.shape[2]), lambda tile, head, row: (row, tile, 0)),
        pl.BlockSpec((None, None), lambda tile, head, row: (row, tile)),
        pl.BlockSpec((None, None), lambda tile, head, row: (row, tile)),
    ]


def _forward(plan: Plan, q, k, v, sinks, scene: Scene):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, length, heads, width = q.shape
    _, slots, groups, value_width = v.shape
    per_group = heads // groups
    visits = scene.by_query(plan)

    def of_head(tile, head, row):
        return (head,)

    def of_query(tile, head, row):
        return row, tile, head, 0

    def of_keys(tile, head, row):
        return row, 0, head // per_group, 0

    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(length // plan.query_tile, heads, rows),
        in_specs=[
            pl.BlockSpec((None, plan.query_tile, None, width), of_query),
            pl.BlockSpec((None, slots, None, width), of_keys),
            pl.BlockSpec((None, slots, None, value_width), of_keys),
            pl.BlockSpec((None, 4, plan.query_tile), lambda tile, head, row: (row, 0, tile)),
            pl.BlockSpec((None, 2, slots), lambda tile, head, row: (row, 0, 0)),
            *list_specs(visits),
            pl.BlockSpec((None,), of_head),
            pl.BlockSpec((None,), of_head),
        ],
        out_specs=[
            pl.BlockSpec((None, plan.query_tile, None, value_width), of_query),
            pl.BlockSpec((None, plan.query_tile, None), lambda tile, head, row: (row, tile, head)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, length, heads, value_width), q.dtype),
            jax.ShapeDtypeStruct((rows, length, heads), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=warps(plan.query_tile), num_stages=2),
        interpret=plan.interpret,
        name="attention_forward",
    )(q, k, v, scene.queries, scene.keys, visits.order, visits.partial, visits.total, scene.slopes, sinks)


def _backward(plan: Plan, q, k, v, scene: Scene, lse, delta, cotangent):
    from rlhf_jax.ops.kernels import triton_attention_backward

    return triton_attention_backward.gradients(plan, q, k, v, scene, lse, delta, cotangent)


_attend = tiles.differentiable(_forward, _backward)
