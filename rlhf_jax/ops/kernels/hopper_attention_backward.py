"""The backward pass of attention on Hopper, without atomics: the same bits each time.

``queries_gradient`` walks over the keys that a tile of queries sees, ``keys_gradient`` over the queries, of all heads
of a group, that see a tile of keys; both compute the weights again from the log-sum-exp. Wide heads leave no
registers for both gradients of a tile of keys in one warpgroup: there one of the two gathers that of the keys, and the
other that of the values; and in the widest each gathers half of the width of a tile of queries.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.terms import HIDDEN
from rlhf_jax.ops.kernels.hopper_pieces import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LOG2E,
    PRODUCER_REGISTERS,
    ROWS,
    Plan,
    Vectors,
    add_products,
    distance,
    drain,
    give_back,
    product,
    shown,
    spread,
    tiled,
    vectors,
    zeros,
)
from rlhf_jax.ops.kernels.tiles import Visits

LSE, DELTA = range(2)
"""Rows of ``stats``."""


def query_tile(width: int) -> int:
    """Queries of one block of ``queries_gradient``."""
    return ROWS * CONSUMERS if width <= 192 else ROWS


def key_step(width: int) -> int:
    """Keys of one step of ``queries_gradient``."""
    return 128 if width <= 64 else 64


def key_tile(plan: Plan) -> int:
    """Keys of one block of ``keys_gradient``."""
    return ROWS * CONSUMERS if plan.width <= 64 or (plan.width <= 128 and plan.folded) else ROWS


def query_step(width: int) -> int:
    """Queries of one step of ``keys_gradient``."""
    return ROWS


def _weights(plan: Plan, products, lse, queries: Vectors, keys: Vectors, query_axis: int, slope, masked: bool):
    """The softmax's weights of one tile from its products, and the same times the soft-cap's derivative."""
    shape, factor = products.shape, plan.scale * LOG2E
    lse = spread(lse, shape, query_axis)
    if plan.folded:
        if masked:
            products = jnp.where(shown(plan, queries, keys, shape, query_axis), products, HIDDEN / factor)
        weights = jnp.exp2(products * factor - lse)
        return weights, weights
    logits, bounded = plan.logits(products, distance(queries, keys, shape, query_axis) if plan.sloped else None, slope)
    if masked:
        logits = jnp.where(shown(plan, queries, keys, shape, query_axis), logits, HIDDEN)
    weights = jnp.exp2(logits - lse)
    return weights, weights if bounded is None else weights * (1.0 - bounded * bounded)


def queries_gradient(
    plan: Plan,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    d_out: Float[Array, "B T H D"],
    stats: Float[Array, "B H 2 T"],
    queries: Int[Array, "B 4 T"],
    keys: Int[Array, "B 2 S"],
    visits: Visits,
    slopes: Float[Array, " H"],
) -> Float[Array, "B T H D"]:
    """The cotangent of ``q``; ``stats`` holds the log-sum-exp in units of base 2, and the rows' sums to subtract."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    rows, length, heads, width = q.shape
    group = heads // k.shape[2]
    tile, depth = key_step(width), 2
    parts = query_tile(width) // ROWS
    # A tile of queries for each warpgroup, or one tile and half of its width for each.
    columns = width * parts // CONSUMERS
    shape = (ROWS, tile)

    def hopper_queries_gradient(
        q_ref, k_ref, v_ref, d_ref, stats_ref, queries_ref, keys_ref, order_ref, partial_ref, total_ref, slopes_ref,
        dq_ref,
        q_smem, d_smem, k_smem, v_smem, stats_smem, queries_smem, keys_smem,
        q_ready, k_ready, v_ready, keys_ready, k_free, v_free, done,
    ):  # fmt: skip
        head, row, warpgroup = lax.axis_index("heads"), lax.axis_index("rows"), lax.axis_index("warpgroup")
        block = length // (ROWS * parts) - 1 - lax.axis_index("blocks")
        steps = total_ref[row, block]
        masked = partial_ref[row, block]
        described = steps if plan.sloped else masked

        def meet():
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)

        def compute(part, first: int):
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            own, own_d = q_smem.at[part], d_smem.at[part]
            here = pl.ds((block * parts + part) * ROWS, ROWS)
            plgpu.barrier_wait(q_ready)
            about, stat = vectors(queries_smem.at[part], 0), vectors(stats_smem.at[part], 0)
            slope = slopes_ref[head] if plan.sloped else None

            def step(i, dq, masked: bool):
                slot = lax.rem(i, jnp.int32(depth))
                plgpu.barrier_wait(k_ready.at[slot])
                if masked or plan.sloped:
                    plgpu.barrier_wait(keys_ready.at[slot])
                other = vectors(keys_smem.at[slot], 1)

                products = product(own, k_smem.at[slot], shape)
                _, slanted = _weights(plan, products, stat(LSE), about, other, 0, slope, masked)
                plgpu.barrier_wait(v_ready.at[slot])
                d_weights = product(own_d, v_smem.at[slot], shape)
                d_logits = slanted * (d_weights - spread(stat(DELTA), shape, 0))
                plgpu.barrier_arrive(v_free.at[slot])
                (dq,) = add_products(plan, (dq, d_logits.astype(q.dtype), k_smem.at[slot, :, pl.ds(first, columns)]))
                give_back(plan, k_free.at[slot], masked or plan.sloped)
                return dq

            dq = lax.fori_loop(0, masked, partial(step, masked=True), zeros((ROWS, columns)))
            dq = lax.fori_loop(masked, steps, partial(step, masked=False), dq)
            # A warpgroup writes where the other, when they share a tile, may still read.
            meet()
            q_smem.at[part, :, pl.ds(first, columns)][...] = (dq * plan.scale).astype(q.dtype)
            plgpu.commit_smem()
            if parts == 1:
                meet()
            if first == 0:
                plgpu.copy_smem_to_gmem(own, dq_ref.at[row, here, head])
            plgpu.wait_smem_to_gmem(0)

        if parts == 1:
            for each in range(CONSUMERS):
                pl.when(warpgroup == each)(partial(compute, 0, each * columns))
        else:
            pl.when(warpgroup < CONSUMERS)(partial(compute, warpgroup, 0))

        @pl.when(warpgroup == CONSUMERS)
        def _load():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            key_head = lax.div(head, jnp.int32(group))
            for part in range(parts):
                here = pl.ds((block * parts + part) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[row, here, head], q_smem.at[part], q_ready)
                plgpu.copy_gmem_to_smem(d_ref.at[row, here, head], d_smem.at[part], q_ready)
                plgpu.copy_gmem_to_smem(stats_ref.at[row, head, :, here], stats_smem.at[part], q_ready)
                plgpu.copy_gmem_to_smem(queries_ref.at[row, :, here], queries_smem.at[part], q_ready)

            @pl.loop(0, steps)
            def _step(i):
                slot = lax.rem(i, jnp.int32(depth))
                there = pl.ds(order_ref[row, block, i] * tile, tile)
                again = i >= depth
                # The keys are the last that a step reads, their description among the first.
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[row, there, key_head], v_smem.at[slot], v_ready.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[row, there, key_head], k_smem.at[slot], k_ready.at[slot])

                @pl.when(i < described)
                def _describe():
                    plgpu.copy_gmem_to_smem(keys_ref.at[row, :, there], keys_smem.at[slot], keys_ready.at[slot])

            drain(steps, depth, k_free, v_free)

    ring = plgpu.Barrier(num_barriers=depth)
    returned = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=depth)
    return plgpu.kernel(
        hopper_queries_gradient,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            tiled((parts, ROWS, width), q.dtype),
            tiled((parts, ROWS, width), q.dtype),
            tiled((depth, tile, width), q.dtype),
            tiled((depth, tile, width), q.dtype),
            plgpu.SMEM((parts, 2, ROWS), jnp.float32),
            plgpu.SMEM((parts, 4, ROWS), jnp.int32),
            plgpu.SMEM((depth, 2, tile), jnp.int32),
            plgpu.Barrier(num_arrivals=4 * parts),
            ring, ring, ring, returned, returned,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        grid=(heads, length // (ROWS * parts), rows),
        grid_names=("heads", "blocks", "rows"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plan.parameters(),
        interpret=plan.mode(),
    )(q, k, v, d_out, stats, queries, keys, visits.order, visits.partial, visits.total, slopes)  # fmt: skip


def keys_gradient(
    plan: Plan,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    d_out: Float[Array, "B T H D"],
    stats: Float[Array, "B H 2 T"],
    queries: Int[Array, "B 4 T"],
    keys: Int[Array, "B 2 S"],
    visits: Visits,
    slopes: Float[Array, " H"],
) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """The cotangents of ``k`` and ``v``, summed over the heads of a group in the registers that gather them."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    rows, slots, key_heads, width = k.shape
    group = q.shape[2] // key_heads
    tile, depth = query_step(width), 4 if width <= 64 else 2
    divided = key_tile(plan) == ROWS
    # Two loops, with a mask and without, would spill registers: every step takes the mask.
    one_loop = width > 128
    parts = 1 if divided else CONSUMERS
    shape = (ROWS, tile)

    def hopper_keys_gradient(
        q_ref, k_ref, v_ref, d_ref, stats_ref, queries_ref, keys_ref, order_ref, partial_ref, total_ref, slopes_ref,
        dk_ref, dv_ref,
        k_smem, v_smem, q_smem, d_smem, stats_smem, queries_smem, keys_smem,
        k_ready, q_ready, d_ready, queries_ready, q_free, d_free, done,
    ):  # fmt: skip
        key_head, row, warpgroup = lax.axis_index("heads"), lax.axis_index("rows"), lax.axis_index("warpgroup")
        block = lax.axis_index("blocks")
        blocks = total_ref[row, block]
        masked_blocks = partial_ref[row, block]
        masked, steps = masked_blocks * group, blocks * group
        described = steps if plan.sloped or one_loop else masked

        def place(i) -> tuple[Any, Any]:
            """Which query head a step is about, and which of the visited tiles: masked tiles of all heads first."""
            whole = i - masked
            first, others = jnp.maximum(masked_blocks, 1), jnp.maximum(blocks - masked_blocks, 1)
            inside = i < masked
            head = jnp.where(inside, lax.div(i, first), lax.div(whole, others))
            at = jnp.where(inside, lax.rem(i, first), masked_blocks + lax.rem(whole, others))
            return key_head * group + head, at

        def gather(part, for_keys: bool, for_values: bool):
            own_k, own_v = k_smem.at[part], v_smem.at[part]
            here = pl.ds(block * ROWS * parts + part * ROWS, ROWS)
            plgpu.barrier_wait(k_ready)
            about = vectors(keys_smem.at[part], 0)

            def step(i, sums, masked: bool):
                slot = lax.rem(i, jnp.int32(depth))
                plgpu.barrier_wait(q_ready.at[slot])
                if masked or plan.sloped:
                    plgpu.barrier_wait(queries_ready.at[slot])
                other, stat = vectors(queries_smem.at[slot], 1), vectors(stats_smem.at[slot], 1)
                slope = slopes_ref[place(i)[0]] if plan.sloped else None

                products = product(own_k, q_smem.at[slot], shape)
                weights, slanted = _weights(plan, products, stat(LSE), other, about, 1, slope, masked)
                if width > 64:
                    # They wait for the next product in 16 bits, as the product with the cotangent takes them anyway.
                    low = (weights.astype(q.dtype), slanted.astype(q.dtype))
                    weights, slanted = lax.optimization_barrier(low if plan.softcap is not None else low[:1] * 2)
                plgpu.barrier_wait(d_ready.at[slot])
                if for_keys:
                    d_weights = product(own_v, d_smem.at[slot], shape)
                    d_logits = slanted.astype(jnp.float32) * (d_weights - spread(stat(DELTA), shape, 1))
                added = []
                if for_values:
                    added.append((sums[0], weights.astype(q.dtype), d_smem.at[slot]))
                if for_keys:
                    added.append((sums[-1], d_logits.astype(q.dtype), q_smem.at[slot]))
                sums = add_products(plan, *added)
                give_back(plan, d_free.at[slot], read=False)
                give_back(plan, q_free.at[slot], read=True)
                return sums

            sums = [zeros((ROWS, width))] * (for_keys + for_values)
            sums = lax.fori_loop(0, steps if one_loop else masked, partial(step, masked=True), sums)
            if not one_loop:
                sums = lax.fori_loop(masked, steps, partial(step, masked=False), sums)
            # A warpgroup writes where the other, when they share a tile, may still read.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            if for_values:
                own_v[...] = sums[0].astype(q.dtype)
            if for_keys:
                own_k[...] = (sums[-1] * plan.scale).astype(q.dtype)
            plgpu.commit_smem()
            if for_values:
                plgpu.copy_smem_to_gmem(own_v, dv_ref.at[row, here, key_head])
            if for_keys:
                plgpu.copy_smem_to_gmem(own_k, dk_ref.at[row, here, key_head])
            plgpu.wait_smem_to_gmem(0)

        def compute(**what):
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            gather(**what)

        if divided:
            pl.when(warpgroup == 0)(partial(compute, part=0, for_keys=False, for_values=True))
            pl.when(warpgroup == 1)(partial(compute, part=0, for_keys=True, for_values=False))
        else:
            pl.when(warpgroup < CONSUMERS)(partial(compute, part=warpgroup, for_keys=True, for_values=True))

        @pl.when(warpgroup == CONSUMERS)
        def _load():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            for part in range(parts):
                here = pl.ds(block * ROWS * parts + part * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(k_ref.at[row, here, key_head], k_smem.at[part], k_ready)
                plgpu.copy_gmem_to_smem(v_ref.at[row, here, key_head], v_smem.at[part], k_ready)
                plgpu.copy_gmem_to_smem(keys_ref.at[row, :, here], keys_smem.at[part], k_ready)

            @pl.loop(0, steps)
            def _step(i):
                slot = lax.rem(i, jnp.int32(depth))
                head, at = place(i)
                there = pl.ds(order_ref[row, block, at] * tile, tile)
                again = i >= depth
                pl.when(again)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_ref.at[row, there, head], q_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(stats_ref.at[row, head, :, there], stats_smem.at[slot], q_ready.at[slot])

                @pl.when(i < described)
                def _describe():
                    plgpu.copy_gmem_to_smem(
                        queries_ref.at[row, :, there], queries_smem.at[slot], queries_ready.at[slot]
                    )

                pl.when(again)(lambda: plgpu.barrier_wait(d_free.at[slot]))
                plgpu.copy_gmem_to_smem(d_ref.at[row, there, head], d_smem.at[slot], d_ready.at[slot])

            drain(steps, depth, q_free, d_free)

    ring = plgpu.Barrier(num_barriers=depth)
    returned = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=depth)
    return plgpu.kernel(
        hopper_keys_gradient,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=(
            tiled((parts, ROWS, width), q.dtype),
            tiled((parts, ROWS, width), q.dtype),
            tiled((depth, tile, width), q.dtype),
            tiled((depth, tile, width), q.dtype),
            plgpu.SMEM((depth, 2, tile), jnp.float32),
            plgpu.SMEM((depth, 4, tile), jnp.int32),
            plgpu.SMEM((parts, 2, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=3 * parts),
            plgpu.Barrier(num_arrivals=2, num_barriers=depth),
            ring, ring, returned, returned,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        grid=(key_heads, slots // (ROWS * parts), rows),
        grid_names=("heads", "blocks", "rows"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plan.parameters(),
        interpret=plan.mode(),
    )(q, k, v, d_out, stats, queries, keys, visits.order, visits.partial, visits.total, slopes)  # fmt: skip
