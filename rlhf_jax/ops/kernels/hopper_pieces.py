"""What the Hopper attention kernels share: their static plan, and the steps on one tile that all passes repeat.

Everything here is written for one warpgroup of 128 threads that owns 64 rows of a tile, in the register layout of
``wgmma``. Exponentials are taken in base 2, with the scale of the logits folded into it.
"""

# Written against a newer JAX than the oldest supported one, by whose stubs the types are checked.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.ops.attention.masks import Rule
from rlhf_jax.ops.attention.terms import HIDDEN

LOG2E = math.log2(math.e)
ROWS = 64
"""Rows of a tile that one warpgroup owns: the height of a ``wgmma``."""
CONSUMERS = 2
"""Warpgroups that compute; one more only loads."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
"""Per thread, after reallocation; 2 * 240 + 24 of 512."""
START, END, SEGMENT, POSITION = range(4)
"""Rows of the array that describes queries."""
KEY_POSITION, KEY_SEGMENT = range(2)
"""Rows of the array that describes keys."""
Vectors = Callable[[int], jax.Array]
"""Loads one row of a description."""


@dataclass(frozen=True)
class Plan:
    """The static facts of one call.

    ``interpret`` runs the kernels in Mosaic GPU's interpreter on a CPU, which takes no accumulators that start with
    values: products that are added to others are then plain ones.
    """

    width: int
    scale: float
    softcap: float | None
    sloped: bool
    sinks: bool
    rule: Rule
    interpret: bool = False

    @property
    def folded(self) -> bool:
        """Whether the logits are the products times a positive constant, so that the constant joins the exponent."""
        return self.softcap is None and not self.sloped and self.scale > 0

    def logits(self, products, distance, slope):
        """Logits in units of base 2, and the bounded part's ``tanh`` (None without a soft-cap)."""
        if self.softcap is None:
            bounded, logits = None, products * (self.scale * LOG2E)
        else:
            # Of the exponential, because the hardware's own tanh has 11 bits.
            power = jnp.exp2(products * (2.0 * LOG2E * self.scale / self.softcap))
            bounded = 1.0 - 2.0 / (1.0 + power)
            logits = bounded * (self.softcap * LOG2E)
        if distance is not None:
            logits = logits - distance * (slope * LOG2E)
        return logits, bounded

    def parameters(self) -> Any:
        """How Mosaic compiles these kernels."""
        import jax.experimental.pallas.mosaic_gpu as plgpu

        return plgpu.CompilerParams(approx_math=True)

    def mode(self) -> Any:
        """The argument ``interpret`` of ``plgpu.kernel``."""
        if not self.interpret:
            return None
        import jax.experimental.pallas.mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams(detect_races=True)


def tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory in the layout that TMA writes and ``wgmma`` reads without bank conflicts."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def spread(vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along one axis of a tile, the same for all of the other."""
    return lax.broadcast_in_dim(vector, shape, (axis,))


def shown(plan: Plan, queries: Vectors, keys: Vectors, shape: tuple[int, int], query_axis: int) -> jax.Array:
    """Who sees whom in one tile."""

    def query(row):
        return spread(queries(row), shape, query_axis)

    def key(row):
        return spread(keys(row), shape, 1 - query_axis)

    # Only rules that look at the query's own position read it, and those are refused.
    visible = plan.rule.visible(None, query(START), query(END), key(KEY_POSITION))
    return visible & (query(SEGMENT) == key(KEY_SEGMENT))


def distance(queries: Vectors, keys: Vectors, shape: tuple[int, int], query_axis: int) -> jax.Array:
    """How far behind its query each key of a tile lies."""
    ahead = spread(queries(POSITION), shape, query_axis) - spread(keys(KEY_POSITION), shape, 1 - query_axis)
    return ahead.astype(jnp.float32)


def vectors(description: Any, axis: int) -> Vectors:
    """Rows of a description in shared memory, loaded where they are used, because there are few registers to wait in.

    ``axis`` is that of the tile along which they lie.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return lambda row: plgpu.load(description.at[row], layout=plgpu.Layout.WGMMA.reduce(1 - axis))


def drain(steps: jax.Array, depth: int, *returned: Any) -> None:
    """Wait until the last slots of a ring came back, so that no warpgroup leaves a barrier behind in mid-phase."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    @pl.loop(steps, steps + depth)
    def _wait(i):
        @pl.when(i >= depth)
        def _used():
            for barrier in returned:
                plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(depth))])


def give_back(plan: Plan, barrier: Any, read: bool) -> None:
    """Let a slot of a ring be written again; what ``read`` it by loads must come before what TMA writes next."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    # The interpreter reads by loads what ``wgmma`` reads on a device.
    if read or plan.interpret:
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def product(left: Any, right: Any, shape: tuple[int, int]) -> jax.Array:
    """``left @ right.T`` of two tiles in shared memory."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def multiply(accumulator):
        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_products(
    plan: Plan, *sums: tuple[jax.Array, jax.Array, Any], meanwhile: Callable[[], None] | None = None
) -> list[jax.Array]:
    """``total + left @ right`` of each, with ``left`` in registers and ``right`` in shared memory.

    The products are in flight together, and ``meanwhile`` happens while they are.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if plan.interpret:
        if meanwhile is not None:
            meanwhile()
        return [total + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32)) for total, a, b in sums]

    def multiply(accumulators):
        for accumulator, (_, left, right) in zip(accumulators, sums, strict=True):
            plgpu.wgmma(accumulator, left, right)
        if meanwhile is not None:
            meanwhile()

    return pl.run_state(multiply)([plgpu.ACC.init(total) for total, _, _ in sums])


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """An accumulator, or the column of one number a row."""
    return filled(shape, 0.0)


def filled(shape: tuple[int, ...], value) -> jax.Array:
    """A constant in the layout of an accumulator, or of one number a row."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


NOWHERE = HIDDEN / 2
"""Maximum of a row that has seen no key: far above a hidden logit, so that hidden weights are exactly 0."""
