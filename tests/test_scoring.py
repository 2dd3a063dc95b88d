"""The law of reinforcement learning here, sampler = scorer, and what else is read off a finished rollout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import FILTERED, LENGTHS, MODELS, PAD, V, draw, next_logits, params_of, prompts_of

from rlhf_jax.models import ScalarModel, init_params
from rlhf_jax.sampling import Sampling
from rlhf_jax.scoring import response_logprobs, response_values, sequence_scores

scored = jax.jit(response_logprobs, static_argnums=(0, 3), static_argnames=("entropy", "chunk"))
CRITIC = ScalarModel(MODELS["gpt2"])


@functools.cache
def critic_params():
    return init_params(CRITIC, jax.random.key(3))


@pytest.mark.parametrize("name", MODELS)
def test_scorer_equals_sampler(name):
    rollout = draw(name, prompts_of(), FILTERED)
    logprobs, entropy = scored(MODELS[name], params_of(name), rollout, FILTERED)
    assert logprobs.shape == entropy.shape == (4, 9)
    np.testing.assert_allclose(logprobs, rollout.logprobs, atol=2e-5)
    outside = ~np.asarray(rollout.response_mask)
    assert outside.any() or name != "gpt2"
    assert not np.asarray(logprobs)[outside].any()
    assert not np.asarray(entropy)[outside].any()
    assert (np.asarray(rollout.logprobs)[~outside] < 0).any()


@pytest.mark.parametrize(
    "options",
    [dict(temperature=0.7, top_p=0.8), dict(greedy=True, temperature=0.0, top_k=3),
     dict(temperature=1.5, top_k=5, min_p=0.1, samples_per_prompt=2)],
    ids=str,
)  # fmt: skip
def test_scorer_equals_sampler_for_each_option(options):
    sampling = Sampling(max_new_tokens=9, **options)
    rollout = draw("llama", prompts_of(), sampling, seed=5)
    logprobs, _ = scored(MODELS["llama"], params_of("llama"), rollout, sampling, entropy=False)
    np.testing.assert_allclose(logprobs, rollout.logprobs, atol=2e-5)


def test_numbers_are_those_of_plain_passes_whatever_the_chunk():
    rollout = draw("gpt2", prompts_of(), FILTERED)
    plain = dataclasses.replace(FILTERED, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    model, params = MODELS["gpt2"], params_of("gpt2")
    whole = scored(model, params, rollout, plain)
    for got, expected in zip(scored(model, params, rollout, plain, chunk=8), whole, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for b in range(4):
        row, start = np.asarray(rollout.tokens[b]).tolist(), LENGTHS[b]
        for j in np.flatnonzero(rollout.response_mask[b]):
            p = np.exp(next_logits("gpt2", row[: start + j]).astype(np.float64))
            p /= p.sum()
            assert whole[0][b, j] == pytest.approx(np.log(p[row[start + j]]), abs=1e-4)
            assert whole[1][b, j] == pytest.approx(-np.sum(p * np.log(p)), abs=1e-4)


def test_a_token_that_left_the_support_stays_scored():
    """Scored by a policy with other parameters under top_k=1, every token is finite, and the gradient too."""
    sampling = dataclasses.replace(FILTERED, top_k=1)
    rollout = draw("gpt2", prompts_of(), FILTERED)
    params = jax.tree.map(lambda x: -x, params_of("gpt2"))

    def total(params):
        logprobs, entropy = response_logprobs(MODELS["gpt2"], params, rollout, sampling, chunk=8)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value) and value < 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_only_the_response_is_unembedded():
    rollout = draw("gpt2", prompts_of(), FILTERED)
    program = scored.lower(MODELS["gpt2"], params_of("gpt2"), rollout, FILTERED).as_text()
    assert f"tensor<4x9x{V}xf32>" in program
    assert f"tensor<4x15x{V}xf32>" not in program


def test_values_are_read_before_each_token_and_scores_at_the_last():
    rollout = draw("gpt2", prompts_of(), FILTERED)

    @jax.jit
    def program(params):
        everywhere = CRITIC.apply({"params": params}, rollout.tokens, rollout.context)
        scores = sequence_scores(CRITIC, params, rollout.tokens, rollout.lengths)
        return everywhere, response_values(CRITIC, params, rollout), scores

    everywhere, values, scores = program(critic_params())
    for b in range(4):
        for j in range(9):
            inside = bool(rollout.response_mask[b, j])
            assert values[b, j] == pytest.approx(float(everywhere[b, LENGTHS[b] + j - 1]) if inside else 0.0, abs=1e-5)
        assert scores[b] == pytest.approx(float(everywhere[b, int(rollout.lengths[b]) - 1]), abs=1e-5)


def test_padding_does_not_change_a_score():
    tokens = np.full((2, 9), 5, np.int32)
    tokens[:, 4:] = [[7, 8, 9, 10, 11], [PAD] * 5]
    scores = jax.jit(sequence_scores, static_argnums=0)(CRITIC, critic_params(), tokens, jnp.array([4, 4]))
    assert scores[0] == pytest.approx(float(scores[1]), abs=1e-6)


def test_a_trimmed_rollout_scores_the_same():
    """Columns that are padding in every row may be cut off."""
    rollout = draw("gpt2", prompts_of(), FILTERED)
    used = int(rollout.lengths.max())
    assert used < 15
    trimmed = rollout.replace(tokens=rollout.tokens[:, :used])
    got, _ = scored(MODELS["gpt2"], params_of("gpt2"), trimmed, FILTERED, entropy=False)
    np.testing.assert_allclose(got, rollout.logprobs, atol=2e-5)


def test_dropout_needs_a_key():
    model, rollout = MODELS["gpt2"].clone(dropout=0.5), draw("gpt2", prompts_of(), FILTERED)
    noisy = [
        scored(model, params_of("gpt2"), rollout, FILTERED, entropy=False, dropout_key=jax.random.key(seed))[0]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-2
    assert np.abs(noisy[0] - rollout.logprobs).max() > 1e-2
