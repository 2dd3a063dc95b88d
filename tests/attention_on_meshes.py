"""What tests/test_attention_meshes.py runs on 8 simulated devices: errors against one device, and collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_scenes import Problem, documents

from rlhf_jax.ops.attention import Rule, partial_attention
from rlhf_jax.sharding import Layout
from rlhf_jax.types import Context

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
WIDTH = 32
PACKED = documents((9, 13, 10), (20, 12), (32,), (5, 4), (), (1, 30), (16, 16), (31,), width=WIDTH)
RAGGED = Context(
    jnp.arange(WIDTH) * (jnp.arange(WIDTH) < jnp.array([[32], [17], [5], [0], [32], [31], [24], [8]])),
    (jnp.arange(WIDTH) < jnp.array([[32], [17], [5], [0], [32], [31], [24], [8]])).astype(jnp.int32),
    packed=False,
)
SCENES = {
    "causal": Problem(RAGGED, RAGGED, heads=8, kv_heads=4, width=8, value_width=8),
    "packed": Problem(PACKED, PACKED, heads=8, kv_heads=8, width=8, value_width=4),
    "one key head": Problem(PACKED, PACKED, heads=8, kv_heads=1, width=8, value_width=8),
    "window": Problem(RAGGED, RAGGED, heads=4, kv_heads=2, width=8, value_width=8, window=6),
    "long window": Problem(RAGGED, RAGGED, heads=4, kv_heads=2, width=8, value_width=8, window=10),
    "sinks": Problem(
        PACKED, PACKED, heads=4, kv_heads=4, width=8, value_width=8, window=5, rule=Rule(sinks=2), sinks=True
    ),
    "cap and slopes": Problem(
        PACKED, PACKED, heads=4, kv_heads=2, width=8, value_width=8, softcap=2.0, slopes=True, sinks=True
    ),
    "prefix and stride": Problem(
        RAGGED, RAGGED, heads=4, kv_heads=4, width=8, value_width=8, prefix=11, rule=Rule(stride=3)
    ),
    "one head": Problem(PACKED, PACKED, heads=1, kv_heads=1, width=8, value_width=16, sinks=True),
}
"""Masks and terms; 8 rows of 32 tokens, which every mesh here cuts. One row is empty, one nearly."""
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

    expected = jax.jit(lambda arrays: run(arrays, "reference"))(arrays)
    found: dict[str, dict[str, float]] = {}
    for layout in layouts:
        place = LAYOUTS[layout].place()
        with place.active():
            result = jax.device_get(jax.jit(run)(arrays))
        found[layout] = {name: difference(result[name], expected[name]) for name in SCENES}
    return found


def difference(found: Any, expected: Any) -> float:
    """The largest of all leaves, each in units of its own largest entry."""

    def one(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)) if np.isfinite(x).all() else np.inf

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))
