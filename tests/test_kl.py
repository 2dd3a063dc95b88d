"""KL estimators by hand and by enumeration; the coefficient's controllers by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import kl
from rlhf_jax.ops.kl import AdaptiveKL, FixedKL

POLICY = jnp.asarray([0.3, -1.0, 0.8, 0.0])
REFERENCE = jax.nn.log_softmax(jnp.asarray([-0.2, 0.4, 0.1, 0.9]))


def exact_kl(logits):
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - REFERENCE))


def expected(estimator, logits):
    """Mean of an estimator over every outcome of the categorical policy."""
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * estimator(logprobs, REFERENCE))


def test_values_by_hand():
    # log p = -1 and log q = 0, -15, -30: k1 = -1, 14, 29; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1
    logprobs, ref = jnp.full(3, -1.0), jnp.asarray([0.0, -15.0, -30.0])
    np.testing.assert_allclose(kl.k1(logprobs, ref), [-1, 14, 29])
    np.testing.assert_allclose(kl.k2(logprobs, ref), [0.5, 98, 420.5])
    np.testing.assert_allclose(kl.k3(logprobs, ref), [np.e - 2, 13 + np.exp(-14), 28], rtol=1e-6)
    np.testing.assert_allclose(kl.absolute(logprobs, ref), [1, 14, 29])


def test_clamps_by_hand():
    logprobs, ref = jnp.zeros(3), jnp.asarray([0.5, 15.0, 30.0])
    # log-ratio held within 20, then k3 = exp(x) - 1 - x held within 10
    got = kl.estimate(logprobs, ref, "k3", log_ratio_clamp=20.0, clamp=10.0)
    np.testing.assert_allclose(got, [np.exp(0.5) - 1.5, 10, 10], rtol=1e-6)
    np.testing.assert_allclose(kl.estimate(logprobs, ref, "k1", log_ratio_clamp=20.0), [-0.5, -15, -20])
    np.testing.assert_allclose(kl.estimate(logprobs, ref, "k1", clamp=10.0), [-0.5, -10, -10])


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
def test_estimate_without_clamps_is_the_named_function(name):
    by_name = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "abs": kl.absolute}
    logprobs = jax.nn.log_softmax(POLICY)
    np.testing.assert_allclose(kl.estimate(logprobs, REFERENCE, name), by_name[name](logprobs, REFERENCE), rtol=1e-6)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'k4'.*expected 'k1', 'k2', 'k3' or 'abs'"):
        kl.estimate(POLICY, REFERENCE, "k4")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator):
    np.testing.assert_allclose(expected(estimator, POLICY), exact_kl(POLICY), rtol=1e-6)


def test_k2_is_biased_as_a_value_and_unbiased_in_its_gradient():
    assert expected(kl.k2, 3 * POLICY) < 0.95 * exact_kl(3 * POLICY)

    def sampled(logits):  # samples, hence their frequencies, are constants of the loss
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * kl.k2(logprobs, REFERENCE))

    np.testing.assert_allclose(jax.grad(sampled)(POLICY), jax.grad(exact_kl)(POLICY), rtol=1e-5, atol=1e-7)


def test_k1_in_a_loss_has_a_gradient_of_mean_zero():
    def sampled(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * kl.k1(logprobs, REFERENCE))

    np.testing.assert_allclose(jax.grad(sampled)(POLICY), jnp.zeros(4), atol=1e-7)


def test_k3_is_exact_to_second_order_close_to_the_reference():
    # exp(x) - 1 - x = x^2/2 + O(x^3); a float32 exp(x) - 1 would have no digit left at x = 1e-5
    np.testing.assert_allclose(kl.k3(jnp.zeros(2), jnp.asarray([1e-3, -1e-3])), [5.0017e-7, 4.9983e-7], rtol=2e-3)


def test_adaptive_controller_by_hand():
    controller = AdaptiveKL(coef=0.15, target=6, horizon=10_000)
    coef, got = controller.init(), []
    for current in (3.0, 6.0, 7.0, 30.0):
        coef = jax.jit(controller.update, static_argnums=2)(coef, jnp.asarray(current), 512)
        got.append(float(coef))
    # errors -0.2 (clipped), 0, 1/6, 0.2 (clipped): 0.15 * (1 - 0.2 * 0.0512) = 0.148464, ...
    np.testing.assert_allclose(got, [0.148464, 0.148464, 0.14973089, 0.15126414], rtol=1e-6)


def test_fixed_controller_stays():
    controller = FixedKL(0.02)
    assert controller.update(controller.init(), jnp.asarray(50.0), 512) == jnp.float32(0.02)


def test_controllers_refuse_impossible_values():
    with pytest.raises(ValueError, match="coef is -0.1"):
        FixedKL(-0.1)
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveKL(target=0)
