"""Advantages, returns and whitening against loops, hand numbers and upstream test cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import returns


def gae_loop(rewards, values, mask, gamma, lam):
    """The definition, by a sum over the future of each row's own tokens with the gaps deleted."""
    advantages = np.zeros_like(rewards)
    for b in range(len(rewards)):
        here = np.flatnonzero(mask[b])
        r, v = rewards[b, here], np.append(values[b, here], 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for i, t in enumerate(here):
            advantages[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_the_double_loop_with_ragged_rows_and_gaps(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 9))
    mask = rng.random((6, 9)) < 0.7
    mask[0] = False
    got, targets = jax.jit(returns.gae)(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(got, gae_loop(rewards, values, mask, gamma, lam), atol=1e-5)
    np.testing.assert_allclose(targets, (got + values) * mask, atol=1e-5)


def test_lambda_zero_is_the_one_step_error():
    # r = 5 at the end, V = 1, 2, 3: 2 - 1, 3 - 2, 5 - 3
    got, _ = returns.gae(jnp.asarray([[0.0, 0, 5]]), jnp.asarray([[1.0, 2, 3]]), jnp.ones((1, 3), bool), 1.0, 0.0)
    np.testing.assert_allclose(got, [[1, 1, 2]])


def test_lambda_one_is_the_return_less_the_value():
    got, targets = returns.gae(jnp.asarray([[0.0, 0, 1]]), jnp.full((1, 3), 0.5), jnp.ones((1, 3), bool), 1.0, 1.0)
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.5]])
    np.testing.assert_allclose(targets, [[1, 1, 1]])


def test_a_gap_is_carried_over_whatever_stands_in_it():
    mask = jnp.asarray([[True, True, False, True, True]])
    rewards = jnp.asarray([[0.0, 0, jnp.nan, 0, 1]])
    values = jnp.asarray([[0.1, 0.2, 999.0, 0.4, 0.5]])
    got, targets = returns.gae(rewards, values, mask, 0.99, 0.95)
    rewards, values = jnp.asarray([[0.0, 0, 0, 1]]), jnp.asarray([[0.1, 0.2, 0.4, 0.5]])
    short, _ = returns.gae(rewards, values, jnp.ones((1, 4), bool), 0.99, 0.95)
    np.testing.assert_allclose(got[0, jnp.asarray([0, 1, 3, 4])], short[0], rtol=1e-6)
    assert got[0, 2] == 0 and targets[0, 2] == 0


def test_padding_changes_nothing():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 2, 4))
    mask = np.arange(4) < np.array([[4], [2]])
    wide = [np.pad(x, ((0, 0), (0, 3)), constant_values=c) for x, c in ((rewards, 7), (values, -3), (mask, False))]
    for narrow, padded in zip(returns.gae(rewards, values, mask), returns.gae(*wide), strict=True):
        np.testing.assert_array_equal(narrow, padded[:, :4])
        assert not padded[:, 4:].any()


def test_one_lambda_for_each_row():
    # length-adaptive lambda 1 - 1/(alpha l), as in VAPO, with alpha 0.5 and lengths 4 and 8
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=(2, 2, 8))
    mask = np.arange(8) < np.array([[4], [8]])
    lam = jnp.asarray([0.5, 0.75])
    got, _ = returns.gae(rewards, values, mask, 1.0, lam)
    for row in (0, 1):
        alone, _ = returns.gae(rewards[row : row + 1], values[row : row + 1], mask[row : row + 1], 1.0, float(lam[row]))
        np.testing.assert_allclose(got[row : row + 1], alone, rtol=1e-6)


WHITENED = {  # mean kept; from the code of lm-human-preferences and of trl
    "biased": [0.05080678, 0.43810508, 0.82540339, 1.21270169, 1.6, 1.98729831, 2.37459661, 2.76189492, 3.14919322],
    "unbiased": [0.13940661, 0.50455496, 0.86970331, 1.23485165, 1.6, 1.96514835, 2.33029669, 2.69544504, 3.06059339],
}


@pytest.mark.parametrize("variance", WHITENED)
def test_whiten_by_published_numbers(variance):
    x = jnp.asarray([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    got = returns.whiten(x, jnp.ones((3, 3), bool), shift_mean=False, variance=variance)
    np.testing.assert_allclose(got.ravel(), WHITENED[variance], atol=1e-5)


@pytest.mark.parametrize("variance, ddof", [("biased", 0), ("unbiased", 1)])
@pytest.mark.parametrize("over", ["mask", "all"])
def test_whiten_looks_at_the_mask_or_at_padding_too(variance, ddof, over):
    rng = np.random.default_rng(3)
    x, mask = rng.normal(3.0, 2.0, size=(4, 5)), rng.random((4, 5)) < 0.6
    counted = x[mask] if over == "mask" else np.where(mask, x, 0)
    oracle = np.where(mask, (x - counted.mean()) / counted.std(ddof=ddof), 0)
    garbage = np.where(mask, x, np.nan)
    np.testing.assert_allclose(returns.whiten(garbage, mask, variance=variance, over=over), oracle, atol=1e-5)


def test_masked_statistics_of_nothing_and_of_one_are_finite():
    x = jnp.asarray([[2.0, 5.0]])
    assert returns.masked_mean(x, jnp.zeros((1, 2), bool)) == 0
    assert returns.masked_var(x, jnp.asarray([[True, False]])) == 0
    assert jnp.all(jnp.isfinite(returns.whiten(x, jnp.asarray([[True, False]]))))
    with pytest.raises(ValueError, match="'half'.*'biased' or 'unbiased'"):
        returns.masked_var(x, x > 0, "half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'rows'.*'mask' or 'all'"):
        returns.whiten(x, x > 0, over="rows")  # pyright: ignore[reportArgumentType]
