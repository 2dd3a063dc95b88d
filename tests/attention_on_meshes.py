"""What tests/test_attention_meshes.py runs on 8 simulated devices: errors against one device, and collectives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_scenes import Problem, documents

from rlhf_jax.ops.attention import Mask, Rule, partial_attention
from rlhf_jax.ops.flash import flash_attention
from rlhf_jax.ops.gau import Laplace, Relu2, gau_attention
from rlhf_jax.sharding import Layout
from rlhf_jax.types import Context

COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
PACKED = documents((9, 13, 10), (20, 12), (32,), (5, 4), (), (1, 30), (16, 16), (31,), width=32)
RAGGED = Context.of_lengths(jnp.array([32, 17, 5, 0, 32, 31, 24, 8]), 32)
FOUR = {"heads": 4, "kv_heads": 2, "width": 8, "value_width": 8}
SCENES = {
    "causal": Problem(RAGGED, RAGGED, heads=8, kv_heads=4, width=8, value_width=8),
    "one key head": Problem(PACKED, PACKED, heads=8, kv_heads=1, width=8, value_width=4),
    "window": Problem(RAGGED, RAGGED, **FOUR, window=6),
    "sinks": Problem(PACKED, PACKED, **FOUR, window=5, rule=Rule(sinks=2), sinks=True),
    "cap and slopes": Problem(PACKED, PACKED, **FOUR, softcap=2.0, slopes=True, sinks=True),
    "prefix and stride": Problem(RAGGED, RAGGED, **FOUR, prefix=11, rule=Rule(stride=3)),
    "one head": Problem(PACKED, PACKED, heads=1, kv_heads=1, width=8, value_width=16, sinks=True),
}
"""Masks and terms; 8 rows of 32 tokens, which every mesh here cuts. One row is empty, and some are nearly."""
LAYOUTS = {
    "data": Layout(),
    "fsdp x tensor": Layout(fsdp=2, tensor=4),
    "context 2": Layout(context=2),
    "context 4": Layout(context=4),
    "context 8": Layout(context=8),
    "data x context x tensor": Layout(data=2, context=2, tensor=2),
}


def both(scene: Problem, across: str, implementation: str) -> Callable[..., Any]:
    """Output, log-sum-exp and gradients of one scene."""

    def run(arrays):
        def loss(trained):
            terms = scene.terms(trained.get("sinks"))
            q, k, v = (trained[name] for name in ("q", "k", "v"))
            out, lse = partial_attention(q, k, v, scene.mask, terms, implementation, across)
            seen = jnp.where(lse > -1e29, lse, 0.0)
            return jnp.sum(out * arrays["out"]) + jnp.sum(seen * arrays["lse"]), {"out": out, "lse": seen}

        trained = {name: arrays[name] for name in ("q", "k", "v", "sinks") if name in arrays}
        gradients, values = jax.grad(loss, has_aux=True)(trained)
        return values | {f"d {name}": value for name, value in gradients.items()}

    return run


def errors(layouts: list[str], across: str, implementation: str) -> dict[str, dict[str, float]]:
    """By layout and scene, the largest difference to one device, in units of the largest entry of each result."""
    arrays = {name: scene.arrays(jnp.float32) for name, scene in SCENES.items()}

    def run(arrays, implementation=implementation):
        return {name: both(scene, across, implementation)(arrays[name]) for name, scene in SCENES.items()}

    return compared(run, arrays, layouts)


LONG = documents((64,), (5, 40, 19), (30, 34), (3, 2, 59), (), (7, 50), (16, 48), (63,), width=64)
LONG_ALONE = Context.of_lengths(jnp.array([64, 30, 5, 0, 64, 63, 24, 8]), 64)
CHUNK = 4


def gated(name: str, implementation: str) -> Callable[..., Any]:
    """Output and gradients of gated attention (of a window, by distance), or of FLASH (rows packed, or one each)."""
    context = LONG_ALONE if name == "flash" else LONG

    def mixed(trained):
        q, k, q_far, k_far, v = trained["tokens"]
        settings = {"scale": 0.3, "bias": trained["bias"], "implementation": implementation}
        if name == "gau":
            mask = Mask.ranges(context, context, window=21)
            return gau_attention(q, k, v, mask, score=Relu2(), normaliser=context.positions + 1.0, **settings)
        divisor = context.positions % CHUNK + 1.0
        arguments = (q, k, q_far / 64, k_far, v, context)
        return flash_attention(*arguments, chunk=CHUNK, score=Laplace(), normaliser=divisor, **settings)

    def run(arrays):
        def loss(trained):
            out = mixed(trained)
            return jnp.sum(out * arrays["out"]), out

        gradients, out = jax.grad(loss, has_aux=True)(arrays["trained"])
        return {"out": out, **gradients}

    return run


def gated_errors(layouts: list[str], implementation: str) -> dict[str, dict[str, float]]:
    """As ``errors``, for the gated units."""
    keys = jax.random.split(jax.random.key(0), 7)
    tokens = [jax.random.normal(keys[n], (8, 64, 8 if n < 4 else 16)) for n in range(5)]
    trained = {"tokens": tokens, "bias": jax.random.normal(keys[5], (3,))}
    arrays = {"trained": trained, "out": jax.random.normal(keys[6], tokens[4].shape)}

    def run(arrays, implementation=implementation):
        return {name: gated(name, implementation)(arrays) for name in ("gau", "flash", "flash packed")}

    return compared(run, arrays, layouts)


def compared(run: Callable[..., Any], arrays: Any, layouts: list[str]) -> dict[str, dict[str, float]]:
    """The differences of the program on each layout to its reference on one device."""
    expected = jax.device_get(jax.jit(lambda arrays: run(arrays, "reference"))(arrays))
    found: dict[str, dict[str, float]] = {}
    for layout in layouts:
        with LAYOUTS[layout].place().active():
            result = jax.device_get(jax.jit(run)(arrays))
        found[layout] = {name: difference(result[name], expected[name]) for name in expected}
    return found


def difference(found: Any, expected: Any) -> float:
    """The largest of all leaves, each in units of its own largest entry."""

    def one(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)) if np.isfinite(x).all() else np.inf

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))
