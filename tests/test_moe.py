"""The mixture of experts as a layer and inside a model: against a plain loop, and its laws."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.models import Attention, Block, MoE, SwiGLU, Transformer, empty_cache, init_params
from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.ops import routing
from rlhf_jax.ops.routing import ExpertChoice, TopK
from rlhf_jax.types import Context

ROWS, LENGTH, WIDTH = 3, 10, 8
VARIANTS = {
    "mixtral": MoE(4, 2, 6, router=TopK(order="select_first")),
    "olmoe": MoE(8, 3, 5, router=TopK(renormalise=False), z_coef=0.001, activation="gelu"),
    "deepseek": MoE(
        8, 2, 6, router=TopK("sigmoid", groups=4, group_limit=2), shared_experts=1, bias_rate=0.001, scale=2.5
    ),
    "switch": MoE(4, 1, 6, router=TopK(renormalise=False), gated=False, activation="relu", balance="batch"),
}
DROPPING = MoE(4, 2, 6, capacity=0.7)


def draw(layer: MoE, dtype=jnp.float32):
    """Parameters large enough that every path matters, and tokens."""
    shape = (ROWS, LENGTH, WIDTH)
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    style = Style(init_std=0.5, residual_std=0.5, dtype=dtype, param_dtype=dtype)
    context = Context.of_lengths(jnp.array([LENGTH, 6, 0]), LENGTH)
    shared = Shared(context, context, style=style)
    params = quick(layer.init)(jax.random.key(0), x, shared)["params"]
    params = nn.unbox(params)
    if "router_bias" in params:
        params["router_bias"] = 0.2 * jax.random.normal(jax.random.key(2), params["router_bias"].shape)
    return params, x, shared


def quick(function, **more):
    """Compile with little optimisation: these programs run once or twice, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **more)


@functools.cache
def run(layer: MoE):
    return quick(lambda params, x, shared: layer.apply({"params": params}, x, shared))


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / 2**0.5)))(x),
}


def dense_loop(layer: MoE, params, x, segments):
    """Every token through its experts, one at a time."""
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.asarray(x, np.float64)

    def forward(token, w_in, w_out):
        parts = np.einsum("d,dpw->pw", token, w_in)
        hidden = ACTIVATIONS[layer.activation](parts[0])
        return (hidden * parts[1] if layer.gated else hidden) @ w_out

    out, bias = np.zeros_like(x), params.get("router_bias")
    with jax.enable_x64(True):
        routed = quick(lambda z: routing.route(z, layer.top_k, layer.router, bias))(x @ params["router"])
    for at in zip(*np.nonzero(np.asarray(segments)), strict=True):
        for expert, weight in zip(routed.experts[at].tolist(), routed.weights[at].tolist(), strict=True):
            out[at] += layer.scale * weight * forward(x[at], params["in"][expert], params["out"][expert])
    if layer.shared_experts:
        for at in np.ndindex(x.shape[:2]):
            out[at] += forward(x[at], params["shared"]["in"], params["shared"]["out"])
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layer_equals_a_loop_over_tokens(name):
    layer = VARIANTS[name]
    params, x, shared = draw(layer)
    y, _ = run(layer)(params, x, shared)
    np.testing.assert_allclose(y, dense_loop(layer, params, x, shared.queries.segments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocked", "ragged"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_gradients_equal_those_of_the_reference(name, implementation):
    with jax.enable_x64(True):
        layer = VARIANTS[name]
        params, x, shared = draw(layer, jnp.float64)

        def loss(params, x, implementation):
            y, aux = layer.clone(implementation=implementation).apply({"params": params}, x, shared)
            return jnp.tanh(y).sum() + aux["loss"].sum()

        gradients = [
            quick(jax.grad(loss, (0, 1)), static_argnums=2)(params, x, i) for i in (implementation, "reference")
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *gradients)
        if "router_bias" in params:
            assert not gradients[0][0]["router_bias"].any()
        assert np.abs(gradients[0][0]["router"]).max() > 1e-3


def test_gradients_equal_finite_differences():
    """Through router, weights and experts at once; nothing here shares code with the layer's own gradient."""
    layer = VARIANTS["olmoe"].clone(balance_coef=0.5, z_coef=0.1)
    with jax.enable_x64(True):
        params, x, shared = draw(layer, jnp.float64)
        chosen = run(layer)(params, x, shared)[1]["moe/experts"]
        held = shared.replace(routing=chosen)

        def loss(params):
            y, aux = layer.apply({"params": params}, x, held)
            return jnp.tanh(y).sum() + aux["loss"].sum()

        gradient, value = quick(jax.grad(loss))(params), quick(loss)
        for name in ("router", "in", "out"):
            at = np.unravel_index(int(np.abs(gradient[name]).argmax()), params[name].shape)
            up, down = (value({**params, name: params[name].at[at].add(sign * 1e-5)}) for sign in (1, -1))
            np.testing.assert_allclose(gradient[name][at], (up - down) / 2e-5, rtol=1e-6)


def test_all_experts_are_a_softmax_mixture_and_one_expert_is_a_dense_layer():
    layer = MoE(4, 4, 6)
    params, x, shared = draw(layer)
    y, _ = run(layer)(params, x, shared)
    weights = jax.nn.softmax(x @ params["router"])
    parts = jnp.einsum("btd,xdpw->btxpw", x, params["in"])
    each = jnp.einsum("btxw,xwd->btxd", jax.nn.silu(parts[..., 0, :]) * parts[..., 1, :], params["out"])
    seen = np.asarray(shared.queries.segments) > 0
    np.testing.assert_allclose(y[seen], (weights[..., None] * each).sum(2)[seen], rtol=1e-4, atol=1e-5)
    single = MoE(1, 1, 6)
    params, x, shared = draw(single)
    dense = SwiGLU(6).apply({"params": {"in": params["in"][0], "out": params["out"][0]}}, x, shared)[0]
    np.testing.assert_allclose(run(single)(params, x, shared)[0][seen], dense[seen], rtol=1e-5, atol=1e-6)


def test_shared_experts_are_added():
    with_shared, without = VARIANTS["deepseek"], VARIANTS["deepseek"].clone(shared_experts=0)
    params, x, shared = draw(with_shared)
    own = SwiGLU(6).apply({"params": params["shared"]}, x, shared)[0]
    rest = {name: value for name, value in params.items() if name != "shared"}
    expected = run(without)(rest, x, shared)[0] + own
    np.testing.assert_allclose(run(with_shared)(params, x, shared)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_numbers_of_experts_do_not_matter(name):
    layer = VARIANTS[name].clone(router=TopK())
    params, x, shared = draw(layer)
    order = np.random.default_rng(0).permutation(layer.experts)
    turned = {**params, "router": params["router"][:, order], "in": params["in"][order], "out": params["out"][order]}
    if "router_bias" in params:
        turned["router_bias"] = params["router_bias"][order]
    (y, aux), (other, moved) = run(layer)(params, x, shared), run(layer)(turned, x, shared)
    np.testing.assert_allclose(other, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved["moe/load"], aux["moe/load"][:, order], atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_do_not_see_each_other(name):
    """Other rows change no bit, and a permutation of tokens permutes the results."""
    layer = VARIANTS[name]
    params, x, shared = draw(layer)
    context = Context.of_lengths(jnp.full(ROWS, LENGTH), LENGTH)
    shared = shared.replace(queries=context)
    y, _ = run(layer)(params, x, shared)
    other, _ = run(layer)(params, x.at[1:].set(jax.random.normal(jax.random.key(9), x[1:].shape)), shared)
    np.testing.assert_array_equal(other[0], y[0])
    order = np.random.default_rng(1).permutation(LENGTH)
    turned, _ = run(layer)(params, x[:, order], shared)
    np.testing.assert_allclose(turned, y[:, order], rtol=1e-6, atol=1e-6)
    alone, _ = run(layer)(params, x[:1], shared.replace(queries=Context.of_lengths(jnp.array([LENGTH]), LENGTH)))
    np.testing.assert_allclose(alone[0], y[0], rtol=1e-6, atol=1e-6)


def test_what_stands_in_padding_does_not_matter_and_counts_nowhere():
    for layer in (VARIANTS["deepseek"], VARIANTS["switch"], DROPPING):
        params, x, shared = draw(layer)
        real = np.asarray(shared.queries.segments) > 0
        layer = layer.clone(shared_experts=0)
        dirty = jnp.where(real[..., None], x, jnp.nan)

        def loss(params, x, layer=layer, shared=shared, real=real):
            y, aux = layer.apply({"params": params}, x, shared)
            return jnp.where(real[..., None], y, 0.0).sum() + aux["loss"].sum(), (y, aux)

        gradient = quick(jax.grad(loss, has_aux=True))
        one, other = gradient(params, x), gradient(params, dirty)
        jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
        np.testing.assert_array_equal(one[1][0], other[1][0])
        assert not one[1][0][~real].any()
        for name, value in one[1][1].items():
            if name != "moe/experts":
                np.testing.assert_array_equal(value, other[1][1][name])
                if layer.balance == "sequence":
                    assert not value[2].any(), name


def test_reports_of_a_row_are_of_its_own_tokens():
    layer = VARIANTS["olmoe"]
    params, x, shared = draw(layer)
    _, aux = run(layer)(params, x, shared)
    short = Context.of_lengths(jnp.array([6]), 6)
    _, alone = run(layer)(params, x[1:2, :6], shared.replace(queries=short))
    for name, value in aux.items():
        value = value[1:2, :6] if name == "moe/experts" else value[1:2]
        np.testing.assert_allclose(value, alone[name], rtol=1e-5)
    experts = np.asarray(aux["moe/experts"][1, :6])
    np.testing.assert_allclose(aux["moe/load"][1], np.bincount(experts.ravel(), minlength=8) / 18, rtol=1e-6)
    probs = jax.nn.softmax(x[1, :6] @ params["router"])
    np.testing.assert_allclose(aux["moe/balance"][1], 8 * (aux["moe/load"][1] * probs.mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["loss"], 0.01 * aux["moe/balance"] + 0.001 * aux["moe/z"], rtol=1e-5)
    assert {name: value.shape for name, value in aux.items()} == {
        "loss": (3,), "moe/balance": (3,), "moe/z": (3,), "moe/entropy": (3,), "moe/dropped": (3,),
        "moe/load": (3, 8), "moe/experts": (3, 10, 3),
    }  # fmt: skip


def test_the_balance_of_the_batch_is_the_same_in_every_row():
    layer = VARIANTS["switch"]
    params, x, shared = draw(layer)
    _, aux = run(layer)(params, x, shared)
    real = np.asarray(shared.queries.segments) > 0
    experts, probs = np.asarray(aux["moe/experts"])[real], np.asarray(jax.nn.softmax(x @ params["router"]))[real]
    expected = 4 * (np.bincount(experts.ravel(), minlength=4) / len(experts) * probs.mean(0)).sum()
    np.testing.assert_allclose(aux["moe/balance"], [expected] * 3, rtol=1e-5)


def test_capacity_drops_and_enough_of_it_does_not():
    params, x, shared = draw(DROPPING)
    plenty, _ = run(DROPPING.clone(capacity=4.0))(params, x, shared)
    everything, aux = run(DROPPING.clone(capacity=None))(params, x, shared)
    np.testing.assert_array_equal(plenty, everything)
    assert not aux["moe/dropped"].any()
    _, aux = run(DROPPING)(params, x, shared)
    experts = np.asarray(aux["moe/experts"])[np.asarray(shared.queries.segments) > 0]
    load, room = np.bincount(experts.ravel(), minlength=4), int(np.ceil(0.7 * 2 * 16 / 4))
    dropped = (load - np.minimum(load, room)).sum()
    assert dropped > 0
    np.testing.assert_allclose((aux["moe/dropped"] * jnp.array([10, 6, 0])).sum() * 2, dropped, rtol=1e-5)


def test_jitter_acts_only_in_training():
    layer = MoE(4, 2, 6, jitter=0.4)
    params, x, shared = draw(layer)

    @quick
    def drawn(key, shared):
        return layer.apply({"params": params}, x, shared, rngs={"dropout": key})[0]

    def outputs(deterministic, seed):
        return drawn(jax.random.key(seed), shared.replace(deterministic=deterministic))

    plain = run(layer.clone(jitter=0.0))(params, x, shared)[0]
    np.testing.assert_allclose(outputs(True, 0), plain, rtol=1e-5, atol=1e-6)
    assert np.abs(outputs(False, 0) - plain).max() > 1e-3 and np.abs(outputs(False, 0) - outputs(False, 1)).max() > 1e-3


def test_the_router_stays_in_float32_beside_bfloat16():
    layer = MoE(4, 2, 6)
    params, x, shared = draw(layer)
    narrow = shared.replace(style=Style(dtype=jnp.bfloat16))
    y, aux = run(layer)(params, x.astype(jnp.bfloat16), narrow)
    assert y.dtype == jnp.bfloat16 and all(aux[name].dtype == jnp.float32 for name in aux if name != "moe/experts")
    exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(params["router"], np.float64)
    seen = np.asarray(shared.queries.segments) > 0
    expected = np.argsort(-exact, axis=-1)[..., :2]
    np.testing.assert_array_equal(np.asarray(aux["moe/experts"])[seen], expected[seen])
    whole, _ = run(layer)(params, x, shared)
    np.testing.assert_allclose(np.asarray(y, float), whole, rtol=3e-2, atol=0.1)


VOCAB = 17
MODEL = Transformer(
    VOCAB, 16,
    (Block(Attention(4, 2), MoE(4, 2, 8)), Block(Attention(2), SwiGLU(8)), Block(Attention(2), MoE(4, 2, 6))),
    2, max_length=32, init_std=0.3, scale_residual_init=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    tokens = jax.random.randint(jax.random.key(2), (3, 12), 0, VOCAB)
    context = Context.of_lengths(jnp.array([12, 7, 4]), 12)
    params = init_params(MODEL, jax.random.key(0))
    apply = quick(lambda params, cache=None, routing=None: MODEL.apply(
        {"params": params}, tokens, context, cache, routing=routing))  # fmt: skip
    return params, apply


def test_layers_report_in_a_known_order_in_both_paths(scene):
    params, apply = scene
    _, _, full = apply(params)
    _, _, cached = apply(params, empty_cache(MODEL, 3, 16))
    assert full["moe/experts"].shape == (4, 3, 12, 2) and full["loss"].shape == (4, 3) and MODEL.routed_layers == 4
    for name in full:
        np.testing.assert_allclose(full[name], cached[name], rtol=1e-4, atol=1e-6)


def test_recorded_routing_replays_in_both_paths(scene):
    params, apply = scene
    logits, _, aux = apply(params)
    again, _, _ = apply(params, None, aux["moe/experts"])
    np.testing.assert_array_equal(again, logits)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(4), leaf.shape), params)
    assert (apply(moved)[2]["moe/experts"] != aux["moe/experts"]).any()
    one, _, replayed = apply(moved, None, aux["moe/experts"])
    other, _, through = apply(moved, empty_cache(MODEL, 3, 16), aux["moe/experts"])
    for found in (replayed, through):
        np.testing.assert_array_equal(found["moe/experts"], aux["moe/experts"])
    np.testing.assert_allclose(one, other, atol=2e-5)
    # Each layer takes its own: another routing of one of them changes that layer alone.
    for layer in range(4):
        turned = aux["moe/experts"].at[layer].set((aux["moe/experts"][layer] + 1) % 4)
        np.testing.assert_array_equal(apply(params, None, turned)[2]["moe/experts"], turned)


def test_refusals_of_models(scene):
    params, apply = scene
    with pytest.raises(ValueError, match="routing is for 3 layers, and the model has 4 mixtures of experts"):
        apply(params, None, jnp.zeros((3, 3, 12, 2), jnp.int32))
    blocks = (Block(Attention(2), MoE(4, 2, 8)), Block(Attention(2), MoE(8, 2, 8)))
    with pytest.raises(ValueError, match="need equal experts and top_k.*4 experts with top_k 2 and 8 experts"):
        Transformer(VOCAB, 16, blocks)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE(0, 1, 8), "experts of a mixture of experts must be positive, got 0"),
        (lambda: MoE(4, 5, 8), "top_k must be from 1 to the 4 experts, got 5"),
        (lambda: MoE(4, 2, 8, router=ExpertChoice()), "ExpertChoice is not causal"),
        (lambda: MoE(4, 2, 8, balance_coef=-1.0), "balance_coef must not be negative, got -1.0"),
        (lambda: MoE(4, 2, 8, activation="tanh"), "unknown activation 'tanh'"),
        (lambda: MoE(4, 2, 8, balance="token"), "unknown balance 'token'; expected one of sequence, batch"),
        (lambda: MoE(4, 2, 8, jitter=1.0), r"jitter must be in \[0, 1\), got 1.0"),
        (lambda: MoE(4, 2, 8, capacity=0.0), "capacity must be positive, got 0.0; None drops nothing"),
        (lambda: MoE(4, 2, 8, bias_rate=-0.1), "bias_rate must not be negative"),
        (lambda: MoE(4, 2, 8, scale=0.0), "scale must be positive, got 0.0"),
        (lambda: MoE(4, 2, 8, implementation="fast"), "unknown grouped matmul implementation 'fast'"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
