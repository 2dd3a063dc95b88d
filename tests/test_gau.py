"""Gated attention against plain Python loops, and its tiles against the dense form."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import gau_blocked, gau_reference
from rlhf_jax.ops.attention import Mask, Rule
from rlhf_jax.ops.gau import GAU_IMPLEMENTATIONS, GauCase, Laplace, Relu2, choose, gau_attention
from rlhf_jax.types import Context

XLA = ("reference", "blocked")


def packed(*rows: tuple[int, ...], width: int) -> Context:
    """Rows of documents of these lengths behind each other; a negative one is a gap of padding."""
    positions, segments = np.zeros((2, len(rows), width), np.int32)
    for b, documents in enumerate(rows):
        at = 0
        for number, length in enumerate(documents):
            if length > 0:
                positions[b, at : at + length] = np.arange(length)
                segments[b, at : at + length] = number + 1
            at += abs(length)
    return Context(jnp.array(positions), jnp.array(segments))


def score_by_hand(name: str, x: float) -> float:
    if name == "relu2":
        return max(x, 0.0) ** 2
    return 0.5 * (1.0 + math.erf((x - math.sqrt(0.5)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2.0))))


SCORES = {"relu2": Relu2(), "laplace": Laplace()}


def by_loop(q, k, v, queries, keys, score, scale, normaliser, bias=None, window=None, rule=Rule()):
    """float64, one pair after another."""
    q, k, v, normaliser = (np.asarray(x, np.float64) for x in (q, k, v, normaliser))
    out = np.zeros((*q.shape[:2], v.shape[2]))
    query_positions, query_segments = np.asarray(queries.positions), np.asarray(queries.segments)
    key_positions, key_segments = np.asarray(keys.positions), np.asarray(keys.segments)
    for b, t in np.ndindex(q.shape[:2]):
        at, own = int(query_positions[b, t]), int(query_segments[b, t])
        for s in range(k.shape[1]):
            key = int(key_positions[b, s])
            if own == 0 or own != int(key_segments[b, s]) or key > at:
                continue
            if (window is not None and at - key >= window) and not key < rule.sinks:
                continue
            logit = scale * sum(q[b, t, i] * k[b, s, i] for i in range(q.shape[2]))
            if bias is not None:
                logit += float(bias[min(at - key, len(bias) - 1)])
            out[b, t] += score_by_hand(score, logit) * v[b, s]
        out[b, t] /= normaliser[b, t]
    return out


def draw(seed, *shapes, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(dtype) for shape in shapes]


def quick(function):
    """Compile with little optimisation: these programs run once, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


T = 13
WHOLE = Context.of_lengths(jnp.array([13, 6]), T)
PACKED = packed((5, 1, 7), (-2, 4, -1, 6), width=T)
# Decoding: keys out of order, another document among them, free slots.
STORED = Context(jnp.array([[3, 0, 1, 2, 0, 1, 0], [5, 4, 0, 1, 2, 3, 6]]), jnp.array([[1, 1, 1, 1, 2, 2, 0], [1] * 7]))
LAST = Context(jnp.array([[3], [6]]), jnp.array([[1], [1]]))
CASES = {
    "whole": (WHOLE, WHOLE, {}),
    "packed": (PACKED, PACKED, {}),
    "window": (PACKED, PACKED, {"window": 3}),
    "sinks": (WHOLE, WHOLE, {"window": 4, "rule": Rule(sinks=2)}),
    "cache": (LAST, STORED, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("score", "biased"), [("relu2", False), ("relu2", True), ("laplace", True)])
@pytest.mark.parametrize("implementation", XLA)
def test_values_equal_a_loop(implementation, score, biased, case):
    queries, keys, fields = CASES[case]
    rows, length, slots = *queries.positions.shape, keys.positions.shape[1]
    q, k, v, bias = draw(0, (rows, length, 5), (rows, slots, 5), (rows, slots, 7), (4,), dtype=np.float64)
    settings = {"scale": 0.7, "normaliser": np.asarray(queries.positions + 2.0, np.float64)}
    settings["bias"] = bias if biased else None

    def mixed(q, k, v, normaliser, bias):
        return gau_attention(
            q, k, v, Mask.ranges(queries, keys, **fields),
            score=SCORES[score], scale=0.7, normaliser=normaliser, bias=bias, implementation=implementation,
        )  # fmt: skip

    with jax.enable_x64(True):
        out = quick(mixed)(q, k, v, settings["normaliser"], settings["bias"])
    expected = by_loop(q, k, v, queries, keys, score, **settings, **fields)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("tile", [3, 4, 64])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_tiles_equal_those_of_the_dense_form(score, tile):
    """In float64, where the dense form's gradients come from automatic differentiation."""
    mask = Mask.ranges(PACKED, PACKED, window=6)
    shapes = ((2, T, 4), (2, T, 4), (2, T, 6), (2, T, 6), (3,))
    q, k, v, cotangent, bias = draw(1, *shapes, dtype=np.float64)

    def gradients(attend, **more):
        def loss(q, k, v, bias):
            divisor = PACKED.positions + 1.0
            out = attend(q, k, v, mask, divisor, bias, score=SCORES[score], scale=0.8, **more)
            return jnp.sum(out * cotangent)

        return quick(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias)

    with jax.enable_x64(True):
        one, other = gradients(gau_reference.attend), gradients(gau_blocked.attend, tile=tile)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-12), one, other)
    assert np.abs(np.asarray(one[1][3])).min() > 1e-3


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_the_scores_know_their_slope(score):
    x = jnp.linspace(-2.0, 2.0, 21) + 0.013
    np.testing.assert_allclose(score.gradient(x), jax.vmap(jax.grad(score.value))(x), atol=1e-6)


def test_laplace_meets_relu2_in_value_and_slope():
    """At its mean sqrt(1/2): value 1/2, slope sqrt(2); the slope is another for s = sqrt(pi / 4), a known mistake."""
    at = jnp.float32(math.sqrt(0.5))
    for score in SCORES.values():
        np.testing.assert_allclose(score.value(at), 0.5, atol=1e-6)
        np.testing.assert_allclose(score.gradient(at), math.sqrt(2.0), atol=1e-6)
    np.testing.assert_allclose(Laplace().value(jnp.float32(0.0)), score_by_hand("laplace", 0.0), rtol=1e-4)


@pytest.mark.parametrize("implementation", XLA)
def test_a_hidden_key_counts_nothing_though_its_score_would(implementation):
    """The mask acts after the score: a bias gives even a zero logit a score."""
    q, v = jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 1))
    context = Context.of_lengths(jnp.array([2]), 3)
    out = gau_attention(
        q, q, v, Mask.ranges(context, context), score=Relu2(), scale=1.0, normaliser=1.0, bias=jnp.full(1, 3.0),
        implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(out[0, :, 0], [9.0, 18.0, 0.0])


@pytest.mark.parametrize("implementation", XLA)
def test_padding_neither_sees_nor_is_seen(implementation):
    q, k, v = draw(2, (2, T, 4), (2, T, 4), (2, T, 6))

    def loss(q, k, v):
        mask = Mask.ranges(WHOLE, WHOLE)
        return gau_attention(
            q, k, v, mask, score=Laplace(), scale=1.0, normaliser=2.0, implementation=implementation
        ).sum()

    run = quick(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, grads = run(q, k, v)
    padding = np.asarray(WHOLE.segments) == 0
    for grad in grads:
        np.testing.assert_array_equal(np.asarray(grad)[padding], 0.0)
    real = ~padding[..., None]
    np.testing.assert_array_equal(value, run(*(np.where(real, x, np.float32(1e4)) for x in (q, k, v)))[0])


def test_tiles_outside_the_mask_are_not_visited():
    """NaN in tiles that nobody sees would spread through a product even where its weight is 0."""
    context = packed((8, 8), width=16)
    q, k, v = draw(3, (1, 16, 4), (1, 16, 4), (1, 16, 6))

    def mixed(q, k, v):
        mask = Mask.ranges(context, context)
        return gau_blocked.attend(q, k, v, mask, jnp.ones((1, 16)), None, score=Relu2(), scale=1.0, tile=4)

    poisoned = np.where(np.arange(16)[:, None] < 8, np.nan, v)
    run = quick(mixed)
    out = run(q, k, poisoned)
    assert np.isnan(out[:, :8]).all()
    np.testing.assert_array_equal(out[:, 8:], run(q, k, v)[:, 8:])
    grads = quick(jax.grad(lambda *x: mixed(*x)[:, 8:].sum(), argnums=(0, 1)))(q, k, poisoned)
    assert np.isfinite(grads[0][:, 8:]).all() and np.isfinite(grads[1][:, 8:]).all()


def test_memory_of_tiles_grows_with_the_length_and_not_with_its_square():
    def bytes_at(length):
        def loss(q, k, v):
            context = Context.of_lengths(jnp.full(1, length), length)
            mask = Mask.ranges(context, context)
            return gau_attention(
                q, k, v, mask, score=Relu2(), scale=1.0, normaliser=1.0, implementation="blocked"
            ).sum()

        shapes = [jax.ShapeDtypeStruct((1, length, width), jnp.float32) for width in (16, 16, 32)]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_at(8192) < 2.0 * bytes_at(4096) < 2**26


@pytest.mark.parametrize("implementation", XLA)
def test_bfloat16_stays_near_float64(implementation):
    """No worse than twice the rounding of the inputs and the output themselves."""
    shapes = ((2, 40, 8), (2, 40, 8), (2, 40, 12))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(4, *shapes))
    context = packed((17, 23), (40,), width=40)

    @quick
    def mixed(q, k, v):
        return gau_attention(
            q, k, v, Mask.ranges(context, context), score=Laplace(), scale=0.5,
            normaliser=context.positions + 1.0, implementation=implementation,
        )  # fmt: skip

    out = mixed(q, k, v)
    expected = by_loop(q, k, v, context, context, "laplace", 0.5, context.positions + 1.0)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert error.max() < 1.6e-2 and math.sqrt((error**2).mean()) < 2e-3


def test_auto_takes_tiles_for_long_rows_and_says_why_it_cannot():
    case = GauCase("cpu", "cpu", 1, 4096, 4096, 64, 512, "float32", Relu2())
    assert choose("auto", case, GAU_IMPLEMENTATIONS) == "blocked"
    short = GauCase("cpu", "cpu", 1, 64, 64, 64, 512, "float32", Relu2())
    assert choose("auto", short, GAU_IMPLEMENTATIONS) == "reference"
    with pytest.raises(ValueError, match="unknown gated attention implementation 'fast'"):
        choose("fast", case, GAU_IMPLEMENTATIONS)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = draw(5, (1, 4, 3), (1, 4, 2), (1, 4, 6))
    context = Context.of_lengths(jnp.array([4]), 4)
    message = "queries (1, 4, 3), keys (1, 4, 2) and values (1, 4, 6) do not fit"
    with pytest.raises(ValueError, match=re.escape(message)):
        gau_attention(q, k, v, Mask.ranges(context, context), score=Relu2(), scale=1.0, normaliser=1.0)
