"""What the tests of experts on a mesh run in a process of its own, where there are several simulated devices."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax.models import Attention, Block, MoE, Transformer, init_params
from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.sharding import Layout, Placement
from rlhf_jax.types import Context

LAYERS = {
    "plain": MoE(8, 2, 8, implementation="ragged"),
    "all-choices": MoE(4, 4, 4, implementation="ragged"),
    "deepseek": MoE(8, 3, 8, shared_experts=1, bias_rate=0.001, scale=2.5, z_coef=0.1, implementation="blocked"),
    "dropping": MoE(8, 2, 8, capacity=0.8, implementation="ragged"),
}


def quick(function: Any, **more: Any) -> Any:
    """Compile with little optimisation: these programs run once, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **more)


def difference(one: Any, other: Any) -> float:
    """The largest difference of two trees of arrays, relative to the largest entry of each array."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-6)) for a, b in pairs)


def place_of(axes: dict[str, int]) -> Placement:
    """On the first devices, as many as the axes take."""
    layout = Layout(**{"data": 1, **axes})
    return layout.place(jax.devices()[: math.prod(axes.values())])


def all_on(cases: list[tuple[dict[str, int], str, int, int]], axes: dict[str, int]) -> dict[str, Any]:
    """``layer_on`` for each case, and ``model_on``, in one process."""
    return {"layers": [layer_on(*case) for case in cases], "model": model_on(axes)}


def layer_on(axes: dict[str, int], name: str, rows: int, length: int) -> dict[str, float]:
    """Differences of value, report and gradients between a mesh and one device."""
    layer, width = LAYERS[name], 6
    x = jax.random.normal(jax.random.key(1), (rows, length, width))
    context = Context.of_lengths(jnp.arange(rows) % (length + 1), length)
    shared = Shared(context, context, style=Style(init_std=0.5, residual_std=0.5))
    params = nn.unbox(quick(layer.init)(jax.random.key(0), x, shared))["params"]

    def loss(params, x):
        y, aux = layer.apply({"params": params}, x, shared)
        numbers = {name: value for name, value in aux.items() if name != "moe/experts"}
        return jnp.tanh(y).sum() + aux["loss"].sum(), (y, numbers)

    program = quick(jax.grad(loss, (0, 1), has_aux=True))
    gradients, (y, aux) = jax.device_get(program(params, x))
    with place_of(axes).active():
        on_mesh = quick(jax.grad(loss, (0, 1), has_aux=True))
        found, (y_mesh, aux_mesh) = jax.device_get(on_mesh(params, x))
    return {
        "value": difference(y_mesh, y), "report": difference(aux_mesh, aux), "gradient": difference(found, gradients),
    }  # fmt: skip


def model_on(axes: dict[str, int]) -> dict[str, Any]:
    """A model whose parameters are split by the layout: difference of the loss's gradient, and what travels."""
    model = Transformer(32, 16, (Block(Attention(4), MoE(4, 2, 8)),), 2, max_length=16, init_std=0.3)
    params = init_params(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 8), 0, 32)
    context = Context.of_lengths(jnp.full(8, 8), 8)

    def loss(params, tokens):
        logits, _, aux = model.apply({"params": params}, tokens, context)
        return jnp.tanh(logits).sum() + aux["loss"].sum()

    expected = jax.device_get(quick(jax.grad(loss))(params, tokens))
    place = place_of(axes)
    with place.active():
        shardings = place.params(model)
        split = place.put(params, shardings)
        program = quick(jax.grad(loss), out_shardings=shardings).lower(split, place.put_batch(tokens)).compile()
        found = jax.device_get(program(split, place.put_batch(tokens)))
    text = program.as_text()
    return {"gradient": difference(found, expected), "travels": len(re.findall(r"all-to-all(?:-start)?\(", text))}
