"""What tests/test_attention_meshes.py runs on 8 simulated devices: errors against one device, and collectives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_scenes import Problem, documents
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import FLASH, GAU, Attention, Block, SwiGLU, Transformer, init_params
from rlhf_jax.models.mixers.gated import SoftmaxPlus
from rlhf_jax.ops.attention import Mask, Rule, Terms, alibi_slopes, attention, decode_attention, partial_attention
from rlhf_jax.ops.flash import flash_attention, flash_attention_chunks
from rlhf_jax.ops.gau import Laplace, Relu2, gau_attention
from rlhf_jax.ops.meshes import ROWS
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


def errors(layouts: list[str], across: str, implementation: str, scenes: list[str]) -> dict[str, dict[str, float]]:
    """By layout and scene, the largest difference to one device, in units of the largest entry of each result.

    No scenes mean all.
    """
    chosen = {name: scene for name, scene in SCENES.items() if name in scenes or not scenes}
    arrays = {name: scene.arrays(jnp.float32) for name, scene in chosen.items()}

    def run(arrays, implementation=implementation):
        return {name: both(scene, across, implementation)(arrays[name]) for name, scene in chosen.items()}

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


def decode_errors(layouts: list[str]) -> dict[str, dict[str, float]]:
    """As ``errors``, for one new query a row over caches, and for the chunks of FLASH that go on from a state."""
    keys = jax.random.split(jax.random.key(0), 8)
    queries = Context(jnp.arange(8)[:, None] + 20, jnp.ones((8, 1), jnp.int32))
    shapes = {"heads": (8, 4, 8), "one key head": (4, 1, 8), "one head": (1, 1, 16)}

    def run(arrays, implementation="auto"):
        def decoded(heads: int, kv_heads: int, width: int):
            q = jax.random.normal(keys[0], (8, heads, 8))
            cache = [jax.random.normal(keys[n], (8, kv_heads, 32, size)) for n, size in ((1, 8), (2, width))]
            terms = Terms(scale=0.3, slopes=alibi_slopes(heads), sink_logits=arrays["sinks"][:heads])
            return decode_attention(q, *cache, Mask.ranges(queries, RAGGED, window=12), terms, implementation)

        state, tokens = arrays["state"], [arrays["q"]] * 4
        lengths, settings = jnp.arange(8) + 1, {"chunk": CHUNK, "score": Laplace(), "scale": 0.3, "normaliser": 2.0}
        chunks = flash_attention_chunks(*tokens, arrays["v"], lengths, state, **settings)
        return {"chunks": chunks} | {name: decoded(*shape) for name, shape in shapes.items()}

    normal = {"state": (8, 8, 16), "q": (8, 8, 8), "v": (8, 8, 16), "sinks": (8,)}
    arrays = {name: jax.random.normal(key, normal[name]) for name, key in zip(normal, keys[3:], strict=False)}
    return compared(run, arrays, layouts)


def collectives(layout: str, across: str) -> dict[str, list[list[Any]]]:
    """What moves between devices in attention of packed rows, forward ("values") and with its gradient ("gradients").

    Each is a sorted list of [operation, elements that one device gets].
    """
    scene = Problem(PACKED, PACKED, heads=8, kv_heads=4, width=8, value_width=8)
    place = LAYOUTS[layout].place()
    assert place.mesh is not None
    spec = P(ROWS, "context", "tensor")
    arrays = {n: jax.device_put(x, NamedSharding(place.mesh, spec)) for n, x in scene.arrays(jnp.float32).items()}

    def values(arrays):
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        out = attention(q, k, v, scene.mask, scale=0.3, implementation="reference", across=across)
        return jax.lax.with_sharding_constraint(out, spec)

    def gradients(arrays):
        return jax.vjp(values, arrays)[1](arrays["out"])[0]

    with place.active():
        return {each.__name__: moved(jax.jit(each).lower(arrays).compile().as_text()) for each in (values, gradients)}


def moved(program: str) -> list[list[Any]]:
    """The collectives of a compiled program, each with the number of elements of its result."""
    found = []
    for line in program.splitlines():
        if kind := COLLECTIVES.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", line[: kind.start()])
            found.append([kind[1], sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)])
    return sorted(found)


MIXERS = (
    Attention(heads=8, kv_heads=4, window=9, sinks=2, sink_logits=True),
    GAU(key_dim=8, score=SoftmaxPlus()),
    FLASH(key_dim=8, chunk=4),
)


def model_errors(layouts: list[str], across: str) -> dict[str, float]:
    """By layout, the largest difference of a model of all mixers to one device: logits and gradients of parameters."""
    mixers = [m.clone(across=across, parent=None) if isinstance(m, Attention) else m for m in MIXERS]
    pattern = tuple(Block(m, SwiGLU(16) if isinstance(m, Attention) else None) for m in mixers)
    model = Transformer(vocab_size=16, d_model=16, pattern=pattern, max_length=32, init_std=0.3)
    params = init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, 16)
    cotangent = jax.random.normal(jax.random.key(2), (8, 32, 16))

    def run(params, tokens, context, cotangent):
        def loss(params):
            logits, _, _ = model.apply({"params": params}, tokens, context)
            # Logits of padding may be anything finite.
            logits = jnp.where(context.segments[..., None] != 0, jnp.asarray(logits), 0.0)
            return jnp.sum(logits * cotangent), logits

        return jax.grad(loss, has_aux=True)(params)

    batch = (tokens, PACKED, cotangent)
    expected = jax.device_get(jax.jit(run)(params, *batch))
    found = {}
    for layout in layouts:
        place = LAYOUTS[layout].place()
        with place.active():
            given = place.put(params, place.params(model)), *place.put_batch(jax.device_get(batch))
            found[layout] = difference(jax.device_get(jax.jit(run)(*given)), expected)
    return found


def memory(across: str, length: int, sizes: list[int]) -> dict[str, list[int]]:
    """Bytes that one device needs for attention and its gradient beside its arguments, by the devices of a row.

    Also the largest number of elements of any array in the program.
    """
    found = {}
    for size in sizes:
        mesh = Layout(context=size).mesh(jax.devices()[:size])
        shape = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "context")))
        numbers = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=NamedSharding(mesh, P(None, "context")))

        def gradients(q, k, v, context, cotangent):
            def values(q, k, v):
                mask = Mask.ranges(context, context)
                return attention(q, k, v, mask, scale=0.2, implementation="blocked", across=across)

            return jax.vjp(values, q, k, v)[1](cotangent)

        with jax.set_mesh(mesh):
            program = jax.jit(gradients).lower(shape, shape, shape, Context(numbers, numbers), shape).compile()
        largest = max(math.prod(map(int, x.split(","))) for x in re.findall(r"f32\[([\d,]+)\]", program.as_text()))
        found[str(size)] = [program.memory_analysis().temp_size_in_bytes, largest]
    return found


def several(programs: dict[str, list[Any]]) -> dict[str, Any]:
    """Results by name; each program is the name of a function here and its arguments."""
    return {name: globals()[function](*given) for name, (function, *given) in programs.items()}
