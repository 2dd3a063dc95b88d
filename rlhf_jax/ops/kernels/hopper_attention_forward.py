"""The forward pass of attention on Hopper: one block of the grid for 128 queries of one head.

Two warpgroups compute 64 queries each, and a third loads. Tiles of keys that nobody of the 128 sees are never touched;
those that everybody sees wholly pass without a mask. The softmax of one warpgroup runs while the tensor cores work for
the other: they take turns by a barrier.
"""

# Written against a newer JAX than the oldest supported one, by whose stubs the types are checked.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.terms import HIDDEN
from rlhf_jax.ops.kernels.hopper_pieces import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LOG2E,
    NOWHERE,
    PRODUCER_REGISTERS,
    ROWS,
    Plan,
    add_products,
    distance,
    drain,
    filled,
    give_back,
    shown,
    spread,
    tiled,
    vectors,
    zeros,
)
from rlhf_jax.ops.kernels.tiles import Visits

QUERY_TILE = ROWS * CONSUMERS


def key_tile(width: int) -> int:
    """Keys of one step."""
    return 128 if width <= 128 else 64


def stages(width: int) -> int:
    """Steps whose keys and values are in shared memory at once."""
    return 4 if width <= 64 else 2


def forward(
    plan: Plan,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    queries: Int[Array, "B 4 T"],
    keys: Int[Array, "B 2 S"],
    visits: Visits,
    slopes: Float[Array, " H"],
    sinks: Float[Array, " H"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """The output, and the natural log of each query's sum of exponentials; lengths are multiples of the tiles."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    rows, length, heads, width = q.shape
    group = heads // k.shape[2]
    tile, depth = key_tile(width), stages(width)
    shape = (ROWS, tile)

    def hopper_attention(
        q_ref, k_ref, v_ref, queries_ref, keys_ref, order_ref, partial_ref, total_ref, slopes_ref, sinks_ref,
        out_ref, lse_ref,
        q_smem, k_smem, v_smem, queries_smem, keys_smem, lse_smem,
        q_ready, k_ready, v_ready, keys_ready, k_free, v_free, turn,
    ):  # fmt: skip
        head, row, warpgroup = lax.axis_index("heads"), lax.axis_index("rows"), lax.axis_index("warpgroup")
        # The last queries of a causal mask have the most to do, and begin first.
        block = length // QUERY_TILE - 1 - lax.axis_index("blocks")
        steps = total_ref[row, block]
        masked = partial_ref[row, block]
        described = steps if plan.sloped else masked

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(warpgroup < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            own = q_smem.at[warpgroup]
            here = pl.ds(block * QUERY_TILE + warpgroup * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[row, here, head], own, q_ready.at[warpgroup])
            plgpu.copy_gmem_to_smem(queries_ref.at[row, :, here], queries_smem.at[warpgroup], q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])
            about = vectors(queries_smem.at[warpgroup], 0)
            slope = slopes_ref[head] if plan.sloped else None
            if plan.sinks:
                sink = sinks_ref[head] * LOG2E
                first = jnp.maximum(sink, NOWHERE)
                top, total = filled((ROWS,), first), filled((ROWS,), jnp.exp2(sink - first))
            else:
                top, total = filled((ROWS,), NOWHERE), zeros((ROWS,))

            @pl.when(steps > 0)
            def _first():
                plgpu.barrier_wait(k_ready.at[0])

            pl.when(warpgroup == 1)(take_turns)

            def step(i, carry, masked: bool):
                mixed, top, total = carry
                slot = lax.rem(i, jnp.int32(depth))

                def multiply(accumulator):
                    plgpu.wgmma(accumulator, own, k_smem.at[slot].transpose((1, 0)))
                    take_turns()
                    return accumulator[...]

                other = vectors(keys_smem.at[slot], 1)
                products = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                if masked or plan.sloped:
                    plgpu.barrier_wait(keys_ready.at[slot])
                if plan.folded:
                    factor = plan.scale * LOG2E
                    if masked:
                        products = jnp.where(shown(plan, about, other, shape, 0), products, HIDDEN / factor)
                    higher = jnp.maximum(top, products.max(axis=1) * factor)
                    weights = jnp.exp2(products * factor - spread(higher, shape, 0))
                else:
                    logits, _ = plan.logits(products, distance(about, other, shape, 0) if plan.sloped else None, slope)
                    if masked:
                        logits = jnp.where(shown(plan, about, other, shape, 0), logits, HIDDEN)
                    higher = jnp.maximum(top, logits.max(axis=1))
                    weights = jnp.exp2(logits - spread(higher, shape, 0))
                shrink = jnp.exp2(top - higher)
                top = higher
                mixed = mixed * spread(shrink, (ROWS, width), 0)
                total = total * shrink
                low = weights.astype(q.dtype)
                if width <= 128:
                    total = total + weights.sum(axis=1)
                    mixed, total, top, low = lax.optimization_barrier((mixed, total, top, low))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)
                if width > 128:
                    total = total + weights.sum(axis=1)

                def next_keys():
                    @pl.when(i + 1 < steps)
                    def _wait():
                        plgpu.barrier_wait(k_ready.at[lax.rem(i + 1, jnp.int32(depth))])

                (mixed,) = add_products(plan, (mixed, low, v_smem.at[slot]), meanwhile=next_keys)
                give_back(plan, v_free.at[slot], masked or plan.sloped)
                return mixed, top, total

            carry = (zeros((ROWS, width)), top, total)
            carry = lax.fori_loop(0, masked, partial(step, masked=True), carry)
            mixed, top, total = lax.fori_loop(masked, steps, partial(step, masked=False), carry)
            pl.when(warpgroup == 0)(take_turns)

            empty = total == 0.0
            divisor = jnp.where(empty, 1.0, total)
            own[...] = (mixed * spread(1.0 / divisor, (ROWS, width), 0)).astype(q.dtype)
            lse_smem[warpgroup] = jnp.where(empty, HIDDEN, top * (1.0 / LOG2E) + jnp.log(divisor))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, out_ref.at[row, here, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, here])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _load():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            key_head = lax.div(head, jnp.int32(group))

            @pl.loop(0, steps)
            def _step(i):
                slot = lax.rem(i, jnp.int32(depth))
                there = pl.ds(order_ref[row, block, i] * tile, tile)
                again = i >= depth
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[row, there, key_head], k_smem.at[slot], k_ready.at[slot])
                # The description of the keys is read before the values, so it is free when they are.
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))

                @pl.when(i < described)
                def _describe():
                    plgpu.copy_gmem_to_smem(keys_ref.at[row, :, there], keys_smem.at[slot], keys_ready.at[slot])

                plgpu.copy_gmem_to_smem(v_ref.at[row, there, key_head], v_smem.at[slot], v_ready.at[slot])

            drain(steps, depth, k_free, v_free)

    ring = plgpu.Barrier(num_barriers=depth)
    returned = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=depth)
    return plgpu.kernel(
        hopper_attention,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ),
        scratch_types=(
            tiled((CONSUMERS, ROWS, width), q.dtype),
            tiled((depth, tile, width), q.dtype),
            tiled((depth, tile, width), q.dtype),
            plgpu.SMEM((CONSUMERS, 4, ROWS), jnp.int32),
            plgpu.SMEM((depth, 2, tile), jnp.int32),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
            ring, ring, ring, returned, returned,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        grid=(heads, length // QUERY_TILE, rows),
        grid_names=("heads", "blocks", "rows"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plan.parameters(),
        interpret=plan.mode(),
    )(q, k, v, queries, keys, visits.order, visits.partial, visits.total, slopes, sinks)  # fmt: skip
