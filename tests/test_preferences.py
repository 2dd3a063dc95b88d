"""Losses from preferences: hand numbers, another system's outputs, definitions in plain Python, and gradients."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.preferences import (
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    log_odds,
    plackett_luce_loss,
    robust_loss,
    sigmoid_loss,
)

MARGINS = np.array([-30.0, -1.5, -0.2, 0.0, 0.3, 0.7, 2.0, 30.0])
PARITY = {
    "sigmoid": lambda h, beta: sigmoid_loss(h, beta),
    "cDPO eps=.1": lambda h, beta: sigmoid_loss(h, beta, 0.1),
    "IPO": ipo_loss,
    "hinge": hinge_loss,
}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    # pi: -10 and -11, ref: -10.5 and -10.8, so h = 0.5 - (-0.2) = 0.7; beta 0.1 gives 0.07.
    h = jnp.float32(0.7)
    np.testing.assert_allclose(sigmoid_loss(h), math.log(1 + math.exp(-0.07)), rtol=1e-6)
    np.testing.assert_allclose(hinge_loss(h), 0.93, rtol=1e-6)
    np.testing.assert_allclose(ipo_loss(h), (0.7 - 5) ** 2, rtol=1e-6)
    # SimPO, beta 2 and gamma 0.5: -log sigmoid(1.4 - 0.5)
    np.testing.assert_allclose(sigmoid_loss(h, 2.0, target=0.5), math.log(1 + math.exp(-0.9)), rtol=1e-6)
    # At a margin of 0 every likelihood is ln 2, whatever the smoothing.
    zero = jnp.float32(0)
    found = [sigmoid_loss(zero), sigmoid_loss(zero, label_smoothing=0.3), robust_loss(zero, label_smoothing=0.3)]
    np.testing.assert_allclose(found, math.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", PARITY)
def test_equals_what_the_shared_reference_records(name, shared):
    path = shared / "parity" / "preference_optimization_cases.json"
    if not path.is_file():
        pytest.skip("the file of recorded outputs is not beside this checkout")
    case = json.loads(path.read_text())["extra"]["dpo"]
    policy = np.subtract(case["pi_chosen"], case["pi_rejected"])
    reference = np.subtract(case["ref_chosen"], case["ref_rejected"])
    assert float(jnp.mean(PARITY[name](jnp.asarray(policy - reference), case["beta"]))) == pytest.approx(
        case[name], abs=1e-5
    )


def test_plackett_luce_equals_what_the_shared_reference_records(shared):
    path = shared / "parity" / "preference_optimization_cases.json"
    if not path.is_file():
        pytest.skip("the file of recorded outputs is not beside this checkout")
    case = json.loads(path.read_text())["extra"]["rm_kway_analytic"]
    found = plackett_luce_loss(jnp.asarray([case["scores best->worst"]]), jnp.arange(4)[None])
    assert float(found[0]) == pytest.approx(case["Plackett-Luce NLL"], abs=1e-5)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.1), (1.0, 0.4)])
def test_smoothed_and_robust_losses_against_their_definitions(beta, smoothing):
    for h in MARGINS:
        right, wrong = math.log1p(math.exp(-beta * h)), math.log1p(math.exp(beta * h))
        expected = (1 - smoothing) * right + smoothing * wrong
        np.testing.assert_allclose(sigmoid_loss(jnp.float32(h), beta, smoothing), expected, rtol=1e-5, atol=1e-6)
        expected = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        np.testing.assert_allclose(robust_loss(jnp.float32(h), beta, smoothing), expected, rtol=1e-5, atol=1e-5)


def test_robust_loss_is_unbiased_under_wrong_labels():
    h, e = jnp.asarray(MARGINS), 0.2
    expected = (1 - e) * robust_loss(h, 0.5, e) + e * robust_loss(-h, 0.5, e)
    np.testing.assert_allclose(expected, sigmoid_loss(h, 0.5), rtol=1e-5, atol=1e-6)


def test_smoothed_loss_is_least_where_the_model_is_as_sure_as_the_labels():
    best = math.log(0.9 / 0.1) / 0.1  # sigmoid(beta h) = 1 - e
    slope = jax.grad(lambda h: sigmoid_loss(h, 0.1, 0.1))
    np.testing.assert_allclose(slope(best), 0, atol=1e-6)
    assert slope(best - 1) < 0 < slope(best + 1)


@pytest.mark.parametrize("loss", [sigmoid_loss, robust_loss, ipo_loss, lambda h: sigmoid_loss(h, 2.0, 0.1, 0.5)])
def test_gradients_equal_finite_differences(loss):
    for h in (-1.5, -0.2, 0.7, 2.0):
        step = 1e-2
        numeric = (float(loss(jnp.float32(h + step))) - float(loss(jnp.float32(h - step)))) / (2 * step)
        np.testing.assert_allclose(jax.grad(loss)(h), numeric, rtol=2e-3, atol=2e-5)


def test_gradient_of_dpo_is_that_of_the_paper():
    for h in (-1.5, 0.0, 2.0):  # -beta sigmoid(-beta h)
        np.testing.assert_allclose(jax.grad(lambda x: sigmoid_loss(x, 0.3))(h), -0.3 * sigma(-0.3 * h), rtol=1e-5)


def test_extreme_margins_stay_finite():
    for loss in (sigmoid_loss, robust_loss, hinge_loss, ipo_loss):
        for h in (-1e6, 1e6):
            assert jnp.isfinite(loss(jnp.float32(h))) and jnp.isfinite(jax.grad(loss)(h))


@pytest.mark.parametrize("logprob", [-1e-3, -0.1, -0.6931472, -3.0, -40.0])
def test_log_odds_against_plain_python(logprob):
    p = math.exp(logprob)
    np.testing.assert_allclose(log_odds(jnp.float32(logprob)), math.log(p) - math.log1p(-p), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.grad(log_odds)(logprob), 1 / (1 - p), rtol=1e-3)  # d log(p/(1-p)) / d log p


def test_certain_responses_have_finite_odds():
    assert jnp.isfinite(log_odds(jnp.float32(0))) and jnp.isfinite(jax.grad(log_odds)(0.0))


def test_kto_against_plain_python():
    ratio, good, z = [0.5, -2.0, 3.0, 0.0], [True, True, False, False], 0.4
    expected = [1.5 * (1 - sigma(0.2 * (r - z))) if g else 0.7 * (1 - sigma(0.2 * (z - r))) for r, g in zip(ratio, good)]  # fmt: skip  # noqa: B905, E501
    np.testing.assert_allclose(kto_loss(jnp.asarray(ratio), jnp.asarray(good), z, 0.2, 1.5, 0.7), expected, rtol=1e-5)


def test_kto_pulls_good_responses_up_and_bad_ones_down_but_not_its_baseline():
    def total(ratio):
        baseline = kto_baseline(ratio, jnp.full(2, 0.5))
        return jnp.sum(kto_loss(ratio, jnp.asarray([True, False]), baseline, desirable_weight=2.0))

    up, down = jax.grad(total)(jnp.asarray([1.0, 2.0]))
    z = 1.5  # d/dr of 1 - sigmoid(b (r - z)) is -b s (1 - s), with z held
    s = sigma(0.1 * (1.0 - z))
    np.testing.assert_allclose([up, down], [-0.2 * s * (1 - s), 0.1 * s * (1 - s)], rtol=1e-5)


def test_kto_baseline_is_a_mean_that_is_not_negative():
    weights = jnp.asarray([0.5, 0.5, 0.0])
    assert kto_baseline(jnp.asarray([1.0, 2.0, 50.0]), weights) == 1.5
    assert kto_baseline(jnp.asarray([1.0, -2.0, 50.0]), weights) == 0


def plackett_luce(scores, ranks) -> float:
    """Choose the best of what is left until nothing is left; of ties, each among what is behind it."""
    total = 0.0
    for s, r in zip(scores, ranks, strict=True):
        if r >= 0:
            rivals = [s] + [t for t, q in zip(scores, ranks, strict=True) if q > r]
            total += math.log(sum(math.exp(t) for t in rivals)) - s
    return total


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [2, 0, 3, 1], [1, 0, 1, 2], [0, 0, 0, 0], [1, -1, 0, -1]])
def test_plackett_luce_against_plain_python(ranks):
    scores = [1.2, 0.7, -0.1, -0.4]
    found = plackett_luce_loss(jnp.asarray([scores]), jnp.asarray([ranks]))
    np.testing.assert_allclose(found, [plackett_luce(scores, ranks)], rtol=1e-5, atol=1e-6)


def test_plackett_luce_of_two_is_the_pairwise_loss():
    scores = jnp.asarray([[0.3, 1.1], [0.3, 1.1]])
    found = plackett_luce_loss(scores, jnp.asarray([[0, 1], [1, 0]]))
    np.testing.assert_allclose(found, sigmoid_loss(jnp.asarray([-0.8, 0.8]), 1.0), rtol=1e-6)


def test_what_absent_responses_scored_does_not_matter():
    ranks = jnp.asarray([[0, 1, -1]])

    def loss(scores):
        return plackett_luce_loss(scores, ranks)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray([[0.3, 0.1, jnp.nan]]))
    np.testing.assert_allclose(value, plackett_luce([0.3, 0.1], [0, 1]), rtol=1e-6)
    assert jnp.all(jnp.isfinite(gradient)) and gradient[0, 2] == 0
