"""Memory and work of a program by formulas on shapes, where there is no compiler for the machine.

Gradients are those of the trained parameters in fp32, twice where microbatches are added up. Activations are what the
backward pass keeps of a row, found by differentiating one row and two rows abstractly, times the rows of a microbatch
on a device. To that comes one block without rematerialisation, ``tokens * (8 E + 3 F)`` numbers, and two chunks of
logits. Communication is that of parameters split by ``fsdp``: gathered for each pass, their gradients scattered.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import Transformer
from rlhf_jax.ops.meshes import CONTEXT
from rlhf_jax.planning.machines import Machine
from rlhf_jax.planning.numbers import Numbers, Traffic, device_bytes, item_bytes
from rlhf_jax.planning.pieces import Program
from rlhf_jax.scoring import LOGITS_AT_A_TIME
from rlhf_jax.types import PyTree, TrainState


def estimated(program: Program, model: Transformer, machine: Machine) -> Numbers:
    """The numbers of a program.

    Args:
        program: any.
        model: the language model.
        machine: what it runs on.
    """
    placement, (rows, width) = program.placement, program.shape
    tokens = math.ceil(rows / placement.row_ways) * math.ceil(width / _ways(program, CONTEXT))
    item = jnp.dtype(model.dtype).itemsize
    widest = max(int(getattr(block.ffn, "width", 0)) * (2 if getattr(block.ffn, "gated", False) else 1)
                 for block in model.pattern)  # fmt: skip
    block = len(model.pattern) * tokens * (8 * model.d_model + 3 * widest) * item // _ways(program, "tensor")
    chunk = min(rows * width, max(1, LOGITS_AT_A_TIME // model.vocab_size))
    logits = 2 * 4 * chunk * model.vocab_size // placement.row_ways
    cache = cache_bytes(program)
    temporary, params = block + logits + cache, program.arguments[0]
    passes, flops = 1 + (program.trips if cache else 0), program.work.flops
    if program.loss is not None:
        assert isinstance(params, TrainState)
        state, params, micro = params, params.params, program.loss[3]
        parts = max(1, jax.tree.leaves(program.transient["batch"])[0].shape[0] // micro)
        wide = sum(device_bytes(leaf) * 4 // jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))
        kept = kept_of_a_row(program) * math.ceil(micro / placement.row_ways) // _ways(program, CONTEXT)
        temporary += wide * (2 if parts > 1 else 1) + kept
        flops *= 1.0 if model.remat is None else 4 / 3
        passes, params = 3 * parts, state.whole
    moved = passes * device_bytes(params) + program.trips * cache + 10.0 * tokens * model.layers * model.d_model * item
    return Numbers("estimated", temporary, 0, 0, flops / machine.devices, "estimated", moved,
                   _gathered(program, params, passes, machine))  # fmt: skip


def cache_bytes(program: Program) -> int:
    """Keys and values on one device: rows and heads are split where they divide."""
    if program.cache is None:
        return 0
    return device_bytes(program.cache) // program.placement.row_ways // _ways(program, "tensor")


def kept_of_a_row(program: Program) -> int:
    """Bytes that the backward pass keeps for one more row of a microbatch, on one device alone."""
    assert program.loss is not None
    loss, params, rows, _ = program.loss
    key = jax.eval_shape(lambda: jax.random.key(0))
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def kept(count: int) -> int:
        def backward(params: PyTree, batch: PyTree, key: Any) -> Any:
            return jax.vjp(lambda p: loss(p, batch, key), params, has_aux=True)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, bare, rows(count), key))
        return sum(math.prod(leaf.shape) * item_bytes(leaf) for leaf in leaves)

    return kept(2) - kept(1)


def _ways(program: Program, axis: str) -> int:
    return 1 if program.placement.mesh is None else program.placement.mesh.shape[axis]


def _gathered(program: Program, params: PyTree, passes: int, machine: Machine) -> dict[str, Traffic]:
    ways = _ways(program, "fsdp")
    if ways == 1:
        return {}
    payload = float(device_bytes(params) * ways * passes)
    sent = payload * (ways - 1) / ways
    return {"all-gather": Traffic(passes * len(jax.tree.leaves(params)), payload, sent,
                                  sent / machine.speed(range(ways)))}  # fmt: skip
