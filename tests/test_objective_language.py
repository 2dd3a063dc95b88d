"""The language-model objective: against a loop over tokens, and its laws (padding, packing, microbatches)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import Attention, Block, SwiGLU, Transformer, init_params
from rlhf_jax.objectives.language import LanguageModel, predictable
from rlhf_jax.types import Context, TokenBatch

MODEL = Transformer(vocab_size=17, d_model=16, pattern=(Block(Attention(heads=2), SwiGLU(24)),), max_length=32)
PARAMS = init_params(MODEL, jax.random.key(0))
OBJECTIVE = LanguageModel(MODEL, name="sft", entropy=True, chunk=8)


GRADIENT = jax.jit(jax.value_and_grad(OBJECTIVE.loss, has_aux=True))


def loss(weighted):
    return GRADIENT(PARAMS, weighted, None)[0]


def batch_of(documents, masks, width) -> TokenBatch:
    """One document a row, right-padded."""
    tokens, loss_mask = np.zeros((2, len(documents), width), np.int32)
    for b, (document, mask) in enumerate(zip(documents, masks, strict=True)):
        tokens[b, : len(document)], loss_mask[b, : len(mask)] = document, mask
    context = Context.of_lengths(jnp.asarray([len(d) for d in documents]), width)
    return TokenBatch(jnp.asarray(tokens), context.positions, context.segments, jnp.asarray(loss_mask, jnp.float32))


DOCUMENTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8]]
MASKS = [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 0]]
BATCH = batch_of(DOCUMENTS, MASKS, 10)


@functools.cache
def loop():
    """Negative log-probability and entropy of each target, one document after the other, from whole logits."""
    found = []
    for document, mask in zip(DOCUMENTS, MASKS, strict=True):
        tokens = jnp.asarray([document])
        logits, _, _ = jax.jit(MODEL.apply)(
            {"params": PARAMS}, tokens, Context.of_lengths(jnp.asarray([len(document)]), len(document))
        )
        logprobs = np.asarray(jax.nn.log_softmax(logits[0]))
        targets = [t for t in range(1, len(document)) if mask[t]]
        found.append(
            [(-logprobs[t - 1, document[t]], -np.sum(np.exp(logprobs[t - 1]) * logprobs[t - 1])) for t in targets]
        )
    return found


def test_token_mean_equals_the_loop():
    flat = np.asarray([pair for document in loop() for pair in document])
    value, metrics = loss(OBJECTIVE.with_weights(BATCH))
    np.testing.assert_allclose([value, metrics["sft/entropy"]], flat.mean(axis=0), rtol=1e-5)
    assert metrics["sft/tokens"] == len(flat) == 5 + 3 + 1
    assert metrics["sft/loss"] == value


def test_sequence_mean_equals_the_loop_also_when_packed():
    objective = dataclasses.replace(OBJECTIVE, mean="sequence")
    expected = np.mean([np.mean(document, axis=0)[0] for document in loop()])
    np.testing.assert_allclose(loss(objective.with_weights(BATCH))[0], expected, rtol=1e-5)
    np.testing.assert_allclose(loss(objective.with_weights(packed()))[0], expected, rtol=1e-5)


def packed() -> TokenBatch:
    """The first two documents in one row, the third in another."""
    rows = [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2] + [0, 0, 0]]
    segments = [[1] * 7 + [2] * 4, [1] * 8 + [0] * 3]
    positions = [[*range(7), *range(4)], [*range(8), 0, 0, 0]]
    masks = [MASKS[0] + MASKS[1], MASKS[2] + [0, 0, 0]]
    return TokenBatch(*map(jnp.asarray, (rows, positions, segments)), jnp.asarray(masks, jnp.float32))


def test_packing_and_padding_change_neither_loss_nor_gradient():
    expected = GRADIENT(PARAMS, OBJECTIVE.with_weights(BATCH), None)
    wide = batch_of(DOCUMENTS, MASKS, 14)
    wide = wide.replace(tokens=jnp.where(wide.segments == 0, 16, wide.tokens))
    for other in (packed(), wide):
        got = GRADIENT(PARAMS, OBJECTIVE.with_weights(other), None)
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_first_token_of_a_document_is_no_target():
    np.testing.assert_array_equal(predictable(packed())[0], [False] + [True] * 6 + [False] + [True] * 3)
    weights = OBJECTIVE.with_weights(packed()).weights
    assert weights[0, 7] == 0 and jnp.sum(weights) == pytest.approx(1.0)


def test_microbatches_add_up():
    weighted = OBJECTIVE.with_weights(BATCH)
    whole = GRADIENT(PARAMS, weighted, None)
    parts = [GRADIENT(PARAMS, jax.tree.map(lambda x, b=b: x[b : b + 1], weighted), None) for b in range(3)]
    summed = jax.tree.map(lambda *xs: sum(xs), *parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_batch_without_targets_is_zero_and_finite():
    nothing = OBJECTIVE.with_weights(BATCH.replace(loss_mask=jnp.zeros_like(BATCH.loss_mask)))
    (value, _), gradient = GRADIENT(PARAMS, nothing, None)
    assert value == 0
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(gradient))


def test_dropout_needs_a_key_and_follows_it():
    objective = LanguageModel(MODEL.clone(dropout=0.3))
    dropping, weighted = jax.jit(objective.loss), objective.with_weights(BATCH)
    one, same, two = (dropping(PARAMS, weighted, jax.random.key(k))[0] for k in (1, 1, 2))
    still = dropping(PARAMS, weighted, None)[0]
    assert one == same and one != two and one != still
    np.testing.assert_allclose(still, loss(weighted)[0], rtol=1e-5)


def test_unknown_mean_is_named():
    with pytest.raises(ValueError, match="mean is 'row'"):
        LanguageModel(MODEL, mean="row")  # pyright: ignore[reportArgumentType]
