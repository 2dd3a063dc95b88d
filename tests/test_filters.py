"""The filters against a plain Python reading of their definitions, and their laws."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.filters import filter_logits

COMBINATIONS = [
    dict(temperature=0.7),
    dict(top_k=3),
    dict(top_k=1),
    dict(top_p=0.6),
    dict(top_p=1e-6),
    dict(min_p=0.2),
    dict(temperature=0.5, top_k=5, top_p=0.8),
    dict(temperature=1.7, top_p=0.9, min_p=0.1),
    dict(temperature=0.7, top_k=6, top_p=0.95, min_p=0.05),
]


def support(row: list[float], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> set[int]:
    """The kept tokens by loops in double precision: sort, walk down, keep ties together."""
    scaled = [x / temperature for x in row]
    kept = sorted(range(len(row)), key=lambda i: -scaled[i])
    if 0 < top_k < len(row):
        kth = scaled[kept[top_k - 1]]
        kept = [i for i in kept if scaled[i] >= kth]
    if top_p < 1:
        total = sum(math.exp(scaled[i]) for i in kept)
        reached, last = 0.0, None
        for i in kept:
            if reached >= top_p and scaled[i] != last:
                kept = kept[: kept.index(i)]
                break
            reached, last = reached + math.exp(scaled[i]) / total, scaled[i]
    if min_p > 0:
        largest = max(math.exp(x) for x in scaled)
        kept = [i for i in kept if math.exp(scaled[i]) >= min_p * largest]
    return set(kept)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_support_and_values_are_those_of_the_definition(options):
    logits = np.random.default_rng(0).normal(size=(40, 17)).astype(np.float32) * 2
    out = np.asarray(jax.jit(lambda x: filter_logits(x, **options))(logits))
    for row, got in zip(logits, out, strict=True):
        kept = support(row.tolist(), **options)
        assert set(np.flatnonzero(np.isfinite(got))) == kept
        scaled = row / np.float32(options.get("temperature", 1.0))
        assert all(got[i] == pytest.approx(scaled[i], rel=1e-6) for i in kept)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cutoff_is_exact_at_any_magnitude_and_sign(scale):
    row = np.array([[3, -1, 0, -2, 5, -0.0, 1e-3]], np.float32) * np.float32(scale)
    for k in range(1, 7):
        kept = set(np.flatnonzero(np.isfinite(np.asarray(filter_logits(jnp.asarray(row), top_k=k))[0])))
        assert kept == support(row[0].tolist(), top_k=k)


def test_ties_stay_or_go_together():
    row = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2]))
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_k=2)), [True] * 4)
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_p=0.41)), [True] * 4)
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_p=0.39)), [True, False, False, False])


def test_a_set_that_reaches_top_p_exactly_is_enough():
    row = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))  # powers of two: no rounding
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_p=0.5)), [True, False, False, False])
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_p=0.75)), [True, True, False, False])


def test_top_p_sees_the_probabilities_that_top_k_left():
    row = jnp.log(jnp.array([0.3, 0.2, 0.1, 0.4]))  # after top_k=2: 4/7, 3/7
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_k=2, top_p=0.55)), [False, False, False, True])
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, top_p=0.55)), [True, False, False, True])


def test_kept_token_is_added_to_the_support():
    logits = jnp.array([[4.0, 3.0, 0.0, -9.0], [4.0, 3.0, 0.0, -9.0]])
    out = filter_logits(logits, temperature=0.5, top_k=2, top_p=0.999, min_p=0.01, keep=jnp.array([3, 0]))
    np.testing.assert_array_equal(jnp.isfinite(out), [[True, True, False, True], [True, True, False, False]])
    np.testing.assert_allclose(out[0, 3], -18.0)


def test_tokens_that_are_already_excluded_stay_excluded():
    row = jnp.array([1.0, -jnp.inf, 0.0, -jnp.inf])
    for options in (dict(top_k=3), dict(top_p=0.999999), dict(min_p=1e-9)):
        np.testing.assert_array_equal(jnp.isfinite(filter_logits(row, **options)), [True, False, True, False])


def test_neutral_values_cost_nothing():
    neutral = jax.make_jaxpr(lambda x: filter_logits(x, keep=jnp.zeros(2, jnp.int32)))(jnp.ones((2, 5)))
    assert [e.primitive.name for e in neutral.eqns if e.primitive.name != "broadcast_in_dim"] in ([], ["stop_gradient"])
    only_scale = jax.make_jaxpr(lambda x: filter_logits(x, temperature=2.0))(jnp.ones((2, 5)))
    assert [e.primitive.name for e in only_scale.eqns if e.primitive.name != "stop_gradient"] == ["div"]
    assert "sort" not in str(jax.make_jaxpr(lambda x: filter_logits(x, top_k=2, top_p=0.5))(jnp.ones((2, 5))))


def test_gradient_passes_through_kept_logits_alone():
    row = jnp.array([2.0, 1.0, 0.0, -1.0])
    grad = jax.grad(lambda x: jax.nn.log_softmax(filter_logits(x, temperature=0.5, top_k=2, top_p=0.99))[1])(row)
    share = 1 / (1 + math.exp(2.0))  # two tokens, two logits apart after the temperature
    np.testing.assert_allclose(grad, [-2 * (1 - share), 2 * (1 - share), 0, 0], rtol=1e-5)
