"""Losses per element by hand and by loop, and the weights that aggregate them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import losses


def mean_policy_loss(advantages, old, new, **kwargs):
    ratio = losses.importance_ratio(jnp.asarray(new), jnp.asarray(old))
    return jnp.mean(losses.clipped_policy_loss(ratio, jnp.asarray(advantages), **kwargs))


def test_clipped_policy_loss_by_hand():
    # ratios 0.5, 1, 1.5 and A = 1, -1, 2: -min(0.5, 0.8), +1, -min(3, 2.4) -> -0.5, 1, -2.4
    ratio, advantages = jnp.asarray([0.5, 1.0, 1.5]), jnp.asarray([1.0, -1.0, 2.0])
    np.testing.assert_allclose(losses.clipped_policy_loss(ratio, advantages), [-0.5, 1.0, -2.4], rtol=1e-6)


def test_clipped_policy_loss_of_nemo_rl():
    got = mean_policy_loss([1.0, -1.0, 2.0], [-1.0, -1.0, -1.0], [-1.69315, -1.0, -0.59453])
    np.testing.assert_allclose(got, -0.6333, atol=1e-4)


def test_dual_clip_of_nemo_rl():
    advantages, old, new = [1.0, -1.0, -4.0], [-1.0, -1.0, -3.0], [-1.69315, -1.0, -0.69741]
    np.testing.assert_allclose(mean_policy_loss(advantages, old, new, dual_clip=3.0), 4.1667, atol=1e-4)
    # without the bound the last ratio, 10, costs 40 instead of 12
    np.testing.assert_allclose(mean_policy_loss(advantages, old, new), (-0.5 + 1 + 40) / 3, atol=1e-2)


def test_upper_clip_may_differ():
    ratio = jnp.asarray([1.25, 1.5, 0.5])
    up, down = (losses.clipped_policy_loss(ratio, sign * jnp.ones(3), 0.2, 0.28) for sign in (1, -1))
    np.testing.assert_allclose(up, [-1.25, -1.28, -0.5], rtol=1e-6)
    np.testing.assert_allclose(down, [1.25, 1.5, 0.8], rtol=1e-6)


def test_gradient_stops_exactly_where_the_clip_decides():
    ratio, advantages = jnp.asarray([0.5, 0.5, 1.0, 1.5, 1.5]), jnp.asarray([1.0, -1.0, 1.0, 1.0, -1.0])
    gradient = jax.grad(lambda r: jnp.sum(losses.clipped_policy_loss(r, advantages)))(ratio)
    np.testing.assert_allclose(gradient, [-1, 0, -1, 0, 1])
    clipped = losses.policy_is_clipped(ratio, advantages)
    np.testing.assert_array_equal(clipped, [False, True, False, True, False])


def test_ratio_clamp():
    ratio = losses.importance_ratio(jnp.asarray([0.0, 50.0, -50.0]), jnp.zeros(3), clamp=20.0)
    np.testing.assert_allclose(ratio, np.exp([0.0, 20, -20]), rtol=1e-6)


def test_clipped_value_loss_by_hand():
    # V_old = 0, R = 1. V = 0.5: (0.5)^2 against clipped 0.2: (0.8)^2. V = -1: 4 against (1.2)^2. V = 0.1: inside.
    values, old, target = jnp.asarray([0.5, -1.0, 0.1]), jnp.zeros(3), jnp.ones(3)
    np.testing.assert_allclose(losses.clipped_value_loss(values, old, target, 0.2), [0.32, 2.0, 0.405], rtol=1e-6)
    np.testing.assert_allclose(losses.clipped_value_loss(values, old, target, None), [0.125, 2.0, 0.405], rtol=1e-6)


def test_pairwise_loss_by_hand():
    chosen, rejected = jnp.asarray([1.0, 0.2]), jnp.asarray([0.3, 0.5])
    # log(1 + e^-0.7) = 0.403186, log(1 + e^0.3) = 0.854355
    np.testing.assert_allclose(losses.pairwise_loss(chosen, rejected), [0.403186, 0.854355], atol=1e-6)
    with_margin = jnp.mean(losses.pairwise_loss(chosen, rejected, jnp.asarray([0.0, 0.5])))
    assert with_margin == pytest.approx(0.7871434, abs=1e-6)
    far = losses.pairwise_loss(jnp.asarray([-200.0]), jnp.asarray([200.0]))
    assert far == pytest.approx(400.0)


def ranking_loop(scores, ranks):
    out = []
    for s, r in zip(scores, ranks, strict=True):
        terms = []
        for i, j in itertools.combinations(range(len(s)), 2):
            if r[i] < 0 or r[j] < 0 or r[i] == r[j]:
                continue
            better, worse = (s[i], s[j]) if r[i] < r[j] else (s[j], s[i])
            terms.append(np.log1p(np.exp(worse - better)))
        out.append(np.mean(terms) if terms else 0.0)
    return out


def test_ranking_loss_equals_the_loop_over_pairs():
    rng = np.random.default_rng(0)
    scores, ranks = rng.normal(size=(8, 5)), rng.integers(-1, 4, size=(8, 5))
    ranks[0], ranks[1] = 2, -1
    np.testing.assert_allclose(losses.ranking_loss(scores, ranks), ranking_loop(scores, ranks), atol=1e-6)


def test_ranking_loss_by_hand_entered_numbers():
    scores = jnp.asarray([[1.2, 0.7, -0.1, -0.4]] * 2)
    got = losses.ranking_loss(scores, jnp.asarray([[0, 1, 2, 3], [0, 1, 1, 2]]))
    np.testing.assert_allclose(got, [0.3519629, 0.34813535], atol=1e-6)


def test_ranking_loss_does_not_see_absent_responses_or_the_order():
    scores, ranks = jnp.asarray([[0.5, -0.2, 0.1]]), jnp.asarray([[0, 2, 1]])
    wide_scores, wide_ranks = jnp.asarray([[jnp.nan, 0.1, 0.5, -0.2]]), jnp.asarray([[-1, 1, 0, 2]])
    narrow, wide = losses.ranking_loss(scores, ranks), losses.ranking_loss(wide_scores, wide_ranks)
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)
    gradient = jax.grad(lambda s: jnp.sum(losses.ranking_loss(s, wide_ranks)))(wide_scores)
    assert gradient[0, 0] == 0 and jnp.all(jnp.isfinite(gradient))


MASK = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
LOSS = jnp.asarray([[1.0, 2, 3, 99], [7, 99, 99, 99], [99, 99, 99, 99]])


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token-mean", 13 / 4),
        ("seq-mean-token-mean", (2 + 7) / 2),
        ("seq-mean-token-sum", (6 + 7) / 2),
        ("seq-mean-token-sum-norm", 13 / 4),  # over the width 4, not over rows
    ],
)
def test_aggregation_weights_by_hand(mode, expected):
    weights = losses.aggregation_weights(MASK, mode)
    assert jnp.sum(weights * LOSS) == pytest.approx(expected)
    if mode in ("token-mean", "seq-mean-token-mean"):
        assert jnp.sum(weights) == pytest.approx(1.0)
    assert not losses.aggregation_weights(jnp.zeros((2, 3), bool), mode).any()


def test_constant_length_by_hand():
    # three rows of 3, 2 and 1 tokens, each token over 3 rows times 10
    mask = jnp.arange(3) < jnp.asarray([[3], [2], [1]])
    weights = losses.aggregation_weights(mask, "seq-mean-token-sum-length", 10)
    np.testing.assert_allclose(weights, np.asarray(mask) / 30, rtol=1e-6)
    wider = losses.aggregation_weights(jnp.pad(mask, ((0, 0), (0, 4))), "seq-mean-token-sum-length", 10)
    np.testing.assert_array_equal(wider[:, :3], weights)
    with pytest.raises(ValueError, match="without a length"):
        losses.aggregation_weights(mask, "seq-mean-token-sum-length")


def test_aggregation_cases_of_openrlhf():
    # a fully masked row is left out: [[1, 3], [5, 7]] with row 1 masked -> 2
    weights = losses.aggregation_weights(jnp.asarray([[True, True], [False, False]]), "token-mean")
    assert jnp.sum(weights * jnp.asarray([[1.0, 3], [5, 7]])) == 2
    # microbatches [1, 2] and [[3, 4, 5], [6, 7]]: 28/7, not the mean of their means
    mask = jnp.asarray([[1, 1, 0], [1, 1, 1], [1, 1, 0]], bool)
    loss = jnp.asarray([[1.0, 2, 0], [3, 4, 5], [6, 7, 0]])
    weights = losses.aggregation_weights(mask, "token-mean")
    assert jnp.sum(weights[:1] * loss[:1]) + jnp.sum(weights[1:] * loss[1:]) == pytest.approx(28 / 7)


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="'mean'.*'token-mean'"):
        losses.aggregation_weights(MASK, "mean")  # pyright: ignore[reportArgumentType]
