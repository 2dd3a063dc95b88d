"""Routing against plain loops and hand numbers: choices, weights, capacity, losses, the selection bias."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import routing
from rlhf_jax.ops.routing import TopK, route

EXPERTS, K = 8, 3
ROUTERS = {
    "qwen": TopK(),
    "switch": TopK(renormalise=False),
    "mixtral": TopK(order="select_first"),
    "sigmoid": TopK("sigmoid"),
    "deepseek": TopK("sigmoid", groups=4, group_limit=2),
    "softmax-groups": TopK(renormalise=False, groups=4, group_limit=2),
}


def in_plain_python(logits, k: int, router: TopK, bias):
    """(experts, weights, probs) of one token."""
    top = max(logits)
    total = sum(math.exp(z - top) for z in logits)
    scores = [math.exp(z - top) / total if router.score == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // router.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(router.groups)]
    if router.group_limit is not None:
        groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
        groups = groups[: router.group_limit]
    experts = sorted((e for group in groups for e in group), key=lambda e: -biased[e])[:k]
    if router.order == "select_first":
        weights = [math.exp(logits[e] - top) for e in experts]
        weights = [w / sum(weights) for w in weights]
    else:
        weights = [scores[e] for e in experts]
        if router.renormalise:
            weights = [w / sum(weights) for w in weights]
    return experts, weights, [s / sum(scores) for s in scores]


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(0), (40, EXPERTS)) * 2


@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routing_equals_a_plain_loop(name, biased, logits):
    router, bias = ROUTERS[name], 0.3 * jax.random.normal(jax.random.key(1), (EXPERTS,)) * biased
    found = jax.jit(lambda z, b: route(z, K, router, b))(logits, bias)
    for token in range(len(logits)):
        experts, weights, probs = in_plain_python(logits[token].tolist(), K, router, bias.tolist())
        assert found.experts[token].tolist() == experts
        np.testing.assert_allclose(found.weights[token], weights, rtol=1e-5)
        np.testing.assert_allclose(found.probs[token], probs, rtol=1e-5)


def test_renormalised_scores_are_a_softmax_over_the_chosen(logits):
    one, other = route(logits, K, TopK()), route(logits, K, TopK(order="select_first"))
    np.testing.assert_array_equal(one.experts, other.experts)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-5)


def test_the_selection_bias_changes_choices_only_and_has_no_gradient(logits):
    bias = jnp.array([5.0] + [0.0] * (EXPERTS - 1))
    router = TopK("sigmoid", renormalise=False)
    found = route(logits, K, router, bias)
    assert (found.experts[:, 0] == 0).all() and not (route(logits, K, router).experts[:, 0] == 0).all()
    np.testing.assert_allclose(found.weights[:, 0], jax.nn.sigmoid(logits[:, 0]), rtol=1e-6)
    weigh = jnp.arange(1.0, K + 1)
    gradient = jax.grad(lambda b: (route(logits, K, router, b).weights * weigh).sum())(bias)
    np.testing.assert_array_equal(gradient, np.zeros(EXPERTS))


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_differentiate_as_finite_differences_do(name, logits):
    router, weigh = ROUTERS[name], jnp.arange(1.0, K + 1)

    def value(z):
        return (route(z, K, router).weights * weigh).sum()

    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits[:4]), jnp.float64)
        weigh = jnp.asarray(np.asarray(weigh), jnp.float64)
        gradient, step = jax.grad(value)(wide), 1e-6
        for at in np.ndindex(2, EXPERTS):
            difference = (value(wide.at[at].add(step)) - value(wide.at[at].add(-step))) / (2 * step)
            np.testing.assert_allclose(gradient[at], difference, atol=1e-7)


def test_given_experts_are_weighed_by_the_present_router(logits):
    chosen = jnp.tile(jnp.array([6, 1, 3]), (len(logits), 1))
    found = route(logits, K, TopK(renormalise=False), experts=chosen)
    np.testing.assert_array_equal(found.experts, chosen)
    np.testing.assert_allclose(found.weights, jax.nn.softmax(logits)[:, [6, 1, 3]], rtol=1e-6)
    same = route(logits, K, experts=route(logits, K).experts)
    np.testing.assert_array_equal(same.weights, route(logits, K).weights)


def kept_in_plain_python(experts, real, number, room):
    taken, kept = [0] * number, np.zeros(experts.shape, bool)
    for choice in range(experts.shape[1]):
        for token in range(len(experts)):
            if real[token] and taken[experts[token, choice]] < room:
                taken[experts[token, choice]] += 1
                kept[token, choice] = True
    return kept


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 100.0])
def test_capacity_keeps_first_choices_first(factor, logits):
    experts, real = np.asarray(route(logits, K).experts), np.arange(len(logits)) % 5 > 0
    room = math.ceil(factor * K * int(real.sum()) / EXPERTS)
    kept = jax.jit(lambda e, r: routing.keep(e, r, EXPERTS, factor))(experts, real)
    np.testing.assert_array_equal(kept, kept_in_plain_python(experts, real, EXPERTS, room))
    loads = np.bincount(experts[real].ravel(), minlength=EXPERTS)
    assert int(kept.sum()) == np.minimum(loads, room).sum()
    np.testing.assert_array_equal(np.bincount(experts[np.asarray(kept)], minlength=EXPERTS), np.minimum(loads, room))


def test_capacity_by_hand():
    # Two experts with room for one slot each: both go to first choices, before the first token's second choice.
    both = jnp.array([True, True])
    assert routing.keep(jnp.array([[0, 1], [1, 0]]), both, 2, 0.5).tolist() == [[True, False], [True, False]]
    assert routing.keep(jnp.array([[0, 1], [0, 1]]), both, 2, 0.5).tolist() == [[True, True], [False, False]]
    assert [int(routing.capacity(n, 2, 8, 1.25)) for n in (16, 17, 0)] == [5, 6, 0]


def test_losses_of_even_and_collapsed_routing():
    real = jnp.ones((2, 12), bool)
    even = jnp.tile(jnp.arange(4)[:, None], (2, 3, 1))
    loads, probs = routing.loads(even, real, 4), jnp.full((2, 12, 4), 0.25)
    np.testing.assert_allclose(routing.balance_loss(loads, routing.mean_probs(probs, real)), [1.0, 1.0])
    np.testing.assert_allclose(routing.max_violation(loads), [0.0, 0.0])
    np.testing.assert_allclose(routing.entropy(probs, real), [math.log(4)] * 2, rtol=1e-6)
    one = jnp.zeros((2, 12, 1), jnp.int32)
    loads, probs = routing.loads(one, real, 4), jax.nn.one_hot(one[..., 0], 4)
    np.testing.assert_allclose(routing.balance_loss(loads, routing.mean_probs(probs, real)), [4.0, 4.0])
    np.testing.assert_allclose(routing.max_violation(loads), [3.0, 3.0])
    np.testing.assert_allclose(routing.entropy(probs, real), [0.0, 0.0])


def test_statistics_of_rows_by_hand():
    real = jnp.array([[True, True, False], [False, False, False]])
    experts = jnp.array([[[0, 1], [0, 2], [3, 3]]] * 2)
    probs = jnp.array([[[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]]] * 2)
    np.testing.assert_allclose(routing.loads(experts, real, 4), [[0.5, 0.25, 0.25, 0.0], [0.0] * 4])
    np.testing.assert_allclose(routing.mean_probs(probs, real), [[0.375, 0.375, 0.125, 0.125], [0.0] * 4])
    # (log 2 + log 4) / 2
    np.testing.assert_allclose(routing.entropy(probs, real), [1.5 * math.log(2), 0.0], rtol=1e-6)
    kept = jnp.array([[[True, False], [True, True], [False, False]]] * 2)
    np.testing.assert_allclose(routing.dropped_fraction(kept, real), [0.25, 0.0])
    # logsumexp of (0, log 3) is log 4.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [9.0, 9.0]]] * 2))
    z = (math.log(4) ** 2 + math.log(2) ** 2) / 2
    np.testing.assert_allclose(routing.z_loss(logits, real), [z, 0.0], rtol=1e-6)
    assert float(routing.max_violation(jnp.zeros(4))) == -1.0


def test_z_loss_differentiates_as_finite_differences_do(logits):
    with jax.enable_x64(True):
        rows = jnp.asarray(np.asarray(logits[:6]), jnp.float64).reshape(2, 3, EXPERTS)
        real = jnp.array([[True, True, False], [True, True, True]])
        gradient, step = jax.grad(lambda z: routing.z_loss(z, real).sum())(rows), 1e-6
        for at in [(0, 0, 1), (0, 1, 7), (0, 2, 3), (1, 2, 4)]:
            up, down = (routing.z_loss(rows.at[at].add(sign * step), real).sum() for sign in (1, -1))
            np.testing.assert_allclose(gradient[at], (up - down) / (2 * step), atol=1e-8)


def test_averages_over_the_batch_weigh_rows_by_their_tokens():
    real = jnp.array([[True, True, True], [True, False, False], [False] * 3])
    rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(routing.batchwise(rows, real), [[0.75, 0.25]] * 3)


def test_the_selection_bias_evens_out_a_skewed_router():
    key, bias = jax.random.key(3), jnp.zeros(EXPERTS)
    slope = jnp.linspace(0.0, 2.0, EXPERTS)

    @jax.jit
    def step(bias, i):
        logits = jax.random.normal(jax.random.fold_in(key, i), (512, EXPERTS)) + slope
        chosen = route(logits, 2, TopK("sigmoid"), bias).experts
        load = routing.loads(chosen[None], jnp.ones((1, 512), bool), EXPERTS)[0]
        return routing.updated_bias(bias, load, 5e-3), routing.max_violation(load)

    bias, violations = jax.lax.scan(step, bias, jnp.arange(200))
    assert violations[0] > 1.0 and violations[-20:].mean() < 0.35
    moved = routing.updated_bias(jnp.zeros(3), jnp.array([0.5, 0.25, 0.0]), 0.001)
    np.testing.assert_allclose(moved, [-0.001, 0.0, 0.001])


def test_a_router_in_fp32_chooses_what_one_in_float64_does():
    x = jax.random.normal(jax.random.key(5), (256, 32), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(6), (32, EXPERTS))
    found = route(x.astype(jnp.float32) @ kernel, 2)
    assert found.weights.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_array_equal(found.experts, np.argsort(-exact, axis=-1, kind="stable")[:, :2])


def test_jitter_multiplies_by_its_range():
    noisy = routing.jittered(jnp.full(4000, 2.0), 0.1, jax.random.key(0))
    assert 1.8 <= float(noisy.min()) < 1.81 and 2.19 < float(noisy.max()) <= 2.2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopK("tanh"), "unknown score 'tanh' of a router; expected one of softmax, sigmoid"),
        (lambda: TopK(order="last"), "unknown order 'last' of a router"),
        (lambda: TopK("sigmoid", "select_first"), "softmax over the chosen logits"),
        (lambda: TopK(eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: TopK(groups=0), "groups must be at least 1, got 0"),
        (lambda: TopK(groups=2, group_limit=3), "group_limit must be from 1 to the 2 groups, got 3"),
        (lambda: TopK().check(4, 5), "top_k must be from 1 to the 4 experts, got 5"),
        (lambda: TopK(groups=3).check(8, 1), "8 experts are not a multiple of 3 groups"),
        (lambda: TopK(groups=4, group_limit=1).check(8, 3), "1 groups of 2 experts do not have 3 experts to choose"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
