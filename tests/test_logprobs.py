"""Chunked log-probabilities against float64 numpy, and their gradients against the dense form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.filters import filter_logits
from rlhf_jax.ops.logprobs import token_logprobs

B, T, E, V = 3, 7, 8, 29
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, E)).astype(np.float32)
MATRIX = RNG.normal(size=(E, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, size=(B, T))
CHUNKS = [1, 4, 9, 10, 20, B * T, 1000]


def by_numpy(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Double precision, one position at a time."""
    logprobs, entropies = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            p = np.exp(logits[b, t].astype(np.float64))
            p /= p.sum()
            logprobs[b, t] = np.log(p[TARGETS[b, t]])
            entropies[b, t] = -sum(x * np.log(x) for x in p if x > 0)
    return logprobs, entropies


def chunked(hidden, matrix, chunk, **options):
    return token_logprobs(hidden, lambda h: h @ matrix, jnp.asarray(TARGETS), chunk=chunk, **options)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_equal_numpy_in_double_precision(chunk):
    logprobs, entropies = jax.jit(chunked, static_argnums=2)(HIDDEN, MATRIX, chunk)
    expected = by_numpy(HIDDEN @ MATRIX)
    np.testing.assert_allclose(logprobs, expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(entropies, expected[1], rtol=2e-5, atol=2e-5)


def test_transform_sees_the_targets_and_excluded_tokens_add_nothing():
    def transform(logits, targets):
        return filter_logits(logits, temperature=0.7, top_k=4, keep=targets)

    expected = by_numpy(np.asarray(transform(jnp.asarray(HIDDEN @ MATRIX), jnp.asarray(TARGETS))))
    for chunk in (4, 1000):
        logprobs, entropies = chunked(HIDDEN, MATRIX, chunk, transform=transform)
        np.testing.assert_allclose(logprobs, expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(entropies, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [4, 9, 1000])
def test_gradients_equal_the_dense_form(chunk):
    weights = jnp.asarray(RNG.normal(size=(2, B, T)))

    def loss(hidden, matrix):
        logprobs, entropies = chunked(hidden, matrix, chunk)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropies)

    def dense(hidden, matrix):
        p = jax.nn.log_softmax(hidden @ matrix)
        logprobs = jnp.take_along_axis(p, jnp.asarray(TARGETS)[..., None], -1)[..., 0]
        return jnp.sum(weights[0] * logprobs - weights[1] * jnp.sum(jnp.exp(p) * p, -1))

    grads = [jax.grad(f, (0, 1))(HIDDEN, MATRIX) for f in (loss, dense)]
    for got, expected in zip(*grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_gradients_stay_finite_beside_excluded_tokens():
    def loss(hidden):
        keep = lambda logits, targets: filter_logits(logits, top_k=2, keep=targets)  # noqa: E731
        logprobs, entropies = chunked(hidden, MATRIX, 4, transform=keep)
        return jnp.sum(logprobs) + jnp.sum(entropies)

    assert np.isfinite(jax.grad(loss)(HIDDEN)).all()


def test_entropy_is_left_out_on_request():
    logprobs, entropies = chunked(HIDDEN, MATRIX, 4, entropy=False)
    assert entropies is None
    np.testing.assert_allclose(logprobs, by_numpy(HIDDEN @ MATRIX)[0], rtol=2e-5, atol=2e-5)


def test_logits_of_the_whole_batch_exist_only_in_one_chunk():
    def largest(chunk: int) -> int:
        program = jax.jit(jax.grad(lambda h, m: chunked(h, m, chunk)[0].sum(), (0, 1)))
        return program.lower(HIDDEN, MATRIX).as_text().count(f"tensor<{B}x{T}x{V}xf32>")

    assert largest(1000) > 0
    assert largest(9) == 0


def test_a_useless_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk = 0"):
        chunked(HIDDEN, MATRIX, 0)
