"""The reward-model objective: against a loop over pairs, its laws, and the shift of the head."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import Attention, Block, ScalarModel, SwiGLU, Transformer, init_params
from rlhf_jax.objectives.reward import RewardModel, bias_to_zero_mean, normalise_scores
from rlhf_jax.types import Context, RankingBatch

TRUNK = Transformer(vocab_size=17, d_model=16, pattern=(Block(Attention(heads=2), SwiGLU(24)),), max_length=32)
MODEL = ScalarModel(TRUNK)
PARAMS = init_params(MODEL, jax.random.key(0))
OBJECTIVE = RewardModel(MODEL)

RANKS = jnp.asarray([[1, 0, 2, 2], [0, 1, -1, -1], [1, 1, -1, -1]])  # 5 pairs, 1 pair, none
LENGTHS = jnp.asarray([[5, 8, 3, 6], [4, 4, 0, 0], [7, 2, 0, 0]])
TOKENS = jax.random.randint(jax.random.key(1), (3, 4, 8), 1, 17) * (jnp.arange(8) < LENGTHS[..., None])
BATCH = RankingBatch(TOKENS, LENGTHS, RANKS)
SCORES = jax.random.normal(jax.random.key(2), (3, 4))


@pytest.fixture(scope="module")
def value_and_grad():
    return jax.jit(jax.value_and_grad(OBJECTIVE.loss, has_aux=True))


def pair_terms(scores, ranks):
    """(loss, right, margin, square of the sum) of every pair, prompt by prompt."""
    found = []
    for s, r in zip(np.asarray(scores, float), np.asarray(ranks), strict=True):
        found.append([])
        for i, j in itertools.combinations(range(len(r)), 2):
            if r[i] != r[j] and min(r[i], r[j]) >= 0:
                w, l = (s[i], s[j]) if r[i] < r[j] else (s[j], s[i])  # noqa: E741
                found[-1].append((np.log1p(np.exp(l - w)), float(w > l), w - l, (w + l) ** 2))
    return [np.asarray(terms) for terms in found if terms]


def test_prompt_mean_equals_the_loop_over_pairs():
    loss, metrics = OBJECTIVE.loss_of_scores(SCORES, OBJECTIVE.with_weights(BATCH))
    expected = np.mean([terms.mean(axis=0) for terms in pair_terms(SCORES, RANKS)], axis=0)
    np.testing.assert_allclose([loss, metrics["rm/accuracy"], metrics["rm/margin"]], expected[:3], rtol=1e-5)
    assert metrics["rm/pairs"] == 6


def test_pair_mean_and_centring_equal_the_loop():
    objective = RewardModel(MODEL, normalise="pair", centre_coef=0.01)
    loss, metrics = objective.loss_of_scores(SCORES, objective.with_weights(BATCH))
    expected = np.concatenate(pair_terms(SCORES, RANKS)).mean(axis=0)
    np.testing.assert_allclose([loss, metrics["rm/loss"]], [expected[0] + 0.01 * expected[3], expected[0]], rtol=1e-5)


def test_centring_by_hand():
    # chosen 1, 0.2 and rejected 0.3, 0.5: 0.01 * mean(1.3^2, 0.7^2) = 0.0109
    batch = RankingBatch(jnp.zeros((2, 2, 1), jnp.int32), jnp.ones((2, 2), jnp.int32), jnp.asarray([[0, 1]] * 2))
    scores = jnp.asarray([[1.0, 0.3], [0.2, 0.5]])
    objective = RewardModel(MODEL, centre_coef=0.01)
    loss, metrics = objective.loss_of_scores(scores, objective.with_weights(batch))
    assert loss - metrics["rm/loss"] == pytest.approx(0.0109, abs=1e-6)
    assert metrics["rm/loss"] == pytest.approx(0.6287706, abs=1e-6)


def test_equal_scores_are_half_right():
    loss, metrics = OBJECTIVE.loss_of_scores(jnp.zeros((3, 4)), OBJECTIVE.with_weights(BATCH))
    assert loss == pytest.approx(np.log(2)) and metrics["rm/accuracy"] == 0.5


scored = jax.jit(OBJECTIVE.scores)


def test_score_is_the_output_at_the_last_token_alone_in_its_row():
    scores, apply = scored(PARAMS, BATCH), jax.jit(MODEL.apply)
    for b, k in [(0, 1), (1, 1)]:
        length = int(LENGTHS[b, k])
        context = Context.of_lengths(jnp.asarray([length]), length)
        alone = apply({"params": PARAMS}, TOKENS[b, k, :length][None], context)
        np.testing.assert_allclose(scores[b, k], alone[0, -1], atol=1e-5)


def test_padding_absent_responses_and_their_order_change_nothing(value_and_grad):
    (loss, _), gradient = value_and_grad(PARAMS, OBJECTIVE.with_weights(BATCH), None)
    order = jnp.asarray([2, 0, 3, 1])
    padded = jnp.pad(TOKENS, ((0, 0), (0, 0), (0, 3)), constant_values=5)
    wide = RankingBatch(padded[:, order], LENGTHS[:, order], RANKS[:, order])
    (other, _), other_gradient = value_and_grad(PARAMS, OBJECTIVE.with_weights(wide), None)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        assert jnp.all(jnp.isfinite(a))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_microbatches_add_up(value_and_grad):
    weighted = OBJECTIVE.with_weights(BATCH)
    whole = value_and_grad(PARAMS, weighted, None)
    parts = [value_and_grad(PARAMS, jax.tree.map(lambda x, b=b: x[b : b + 1], weighted), None) for b in range(3)]
    summed = jax.tree.map(lambda *xs: sum(xs), *parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_batch_without_pairs_is_zero_and_finite(value_and_grad):
    tied = OBJECTIVE.with_weights(BATCH.replace(ranks=jnp.zeros_like(RANKS)))
    (loss, _), gradient = value_and_grad(PARAMS, tied, None)
    assert loss == 0
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(gradient))


def test_head_is_moved_to_the_wanted_mean_and_deviation():
    present = RANKS >= 0
    before = scored(PARAMS, BATCH)[present]
    centred = scored(bias_to_zero_mean(PARAMS, before), BATCH)[present]
    np.testing.assert_allclose(centred, before - jnp.mean(before), atol=1e-5)
    scaled = scored(normalise_scores(PARAMS, before, mean=0.5, std=2.0), BATCH)[present]
    np.testing.assert_allclose([jnp.mean(scaled), jnp.std(scaled)], [0.5, 2.0], rtol=1e-4)
    assert PARAMS["head"]["bias"] == 0  # the parameters that were given are not written to


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="normalise is 'batch'"):
        RewardModel(MODEL, normalise="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="centre_coef is -1"):
        RewardModel(MODEL, centre_coef=-1)
