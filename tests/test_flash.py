"""The chunked gated attention (which is not FlashAttention) against plain Python loops, whole and in pieces."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gau import SCORES, draw, packed, quick, score_by_hand

from rlhf_jax.ops.attention import Mask
from rlhf_jax.ops.flash import FLASH_IMPLEMENTATIONS, flash_attention, flash_attention_chunks
from rlhf_jax.ops.flash_state import FlashState, extend
from rlhf_jax.ops.gau import Laplace, Relu2, gau_attention
from rlhf_jax.types import Context

XLA = ("reference", "blocked")
T, D, E = 23, 4, 6
TOKENS = ((2, T, D),) * 4 + ((2, T, E),)
CONTEXTS = {
    "whole": Context.of_lengths(jnp.array([23, 14]), T),
    "packed": packed((9, 1, 5, 3), (10, 13), width=T),
    "gaps": packed((-1, 4, -2, 12), (-9, 8), width=T),
    "small": packed((1,) * 23, (3,) * 7, width=T),
}


def by_loop(tokens, context, chunk, score, scale, normaliser, bias=None):
    """float64, one pair after another."""
    q_local, k_local, q_global, k_global, v = (np.asarray(x, np.float64) for x in tokens)
    positions, segments = np.asarray(context.positions), np.asarray(context.segments)
    out = np.zeros(v.shape)
    for b, t in np.ndindex(v.shape[:2]):
        for s in range(v.shape[1]):
            at, key = int(positions[b, t]), int(positions[b, s])
            if segments[b, t] == 0 or segments[b, t] != segments[b, s]:
                continue
            if at // chunk == key // chunk and key <= at:
                logit = scale * sum(q_local[b, t, i] * k_local[b, s, i] for i in range(D))
                logit += 0.0 if bias is None else float(bias[min(at - key, len(bias) - 1)])
                out[b, t] += score_by_hand(score, logit) / float(normaliser[b, t]) * v[b, s]
            elif at // chunk > key // chunk:
                out[b, t] += sum(q_global[b, t, i] * k_global[b, s, i] for i in range(D)) * v[b, s]
    return out


@pytest.mark.parametrize("case", CONTEXTS)
@pytest.mark.parametrize(("chunk", "score", "biased"), [(1, "relu2", False), (4, "laplace", True), (40, "relu2", True)])
@pytest.mark.parametrize("implementation", XLA)
def test_values_equal_a_loop(implementation, chunk, score, biased, case):
    context = CONTEXTS[case]
    *tokens, bias = draw(0, *TOKENS, (3,), dtype=np.float64)
    divisor = np.asarray(context.positions + 2.0, np.float64)

    def mixed(tokens, bias):
        return flash_attention(
            *tokens, context, chunk=chunk, score=SCORES[score], scale=0.7, normaliser=divisor,
            bias=bias if biased else None, implementation=implementation,
        )  # fmt: skip

    with jax.enable_x64(True):
        out = quick(mixed)(tokens, bias)
    expected = by_loop(tokens, context, chunk, score, 0.7, divisor, bias if biased else None)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, atol=1e-11)


@pytest.mark.parametrize("case", ["whole", "packed"])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_equal_those_of_the_dense_form(score, case):
    """In float64, where the dense form's gradients come from automatic differentiation."""
    context = CONTEXTS[case]
    *tokens, cotangent, bias = draw(1, *TOKENS, (2, T, E), (3,), dtype=np.float64)

    def gradients(implementation):
        def loss(tokens, bias):
            out = flash_attention(
                *tokens, context, chunk=4, score=SCORES[score], scale=0.7, normaliser=3.0, bias=bias,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(out * cotangent)

        return quick(jax.value_and_grad(loss, argnums=(0, 1)))(tokens, bias)

    with jax.enable_x64(True):
        one, other = gradients("reference"), gradients("blocked")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-11), one, other)
    assert all(np.abs(np.asarray(grad)).max() > 1e-2 for grad in jax.tree.leaves(one))


@pytest.mark.parametrize("implementation", XLA)
def test_the_state_is_the_sum_over_complete_chunks(implementation):
    """Rows of 9 and 12 of 12 slots in chunks of 4: two and three chunks are complete."""
    *tokens, state = draw(2, *(((2, 12, D),) * 4), (2, 12, E), (2, D, E), dtype=np.float64)

    def run(tokens, state):
        return flash_attention_chunks(
            *tokens, jnp.array([9, 12]), state, chunk=4, score=Relu2(), scale=1.0, normaliser=1.0,
            implementation=implementation,
        )  # fmt: skip

    with jax.enable_x64(True):
        out, later = quick(run)(tokens, state)
    k_global, v = tokens[3], tokens[4]
    for row, complete in enumerate((8, 12)):
        expected = state[row] + sum(np.outer(k_global[row, s], v[row, s]) for s in range(complete))
        np.testing.assert_allclose(later[row], expected, atol=1e-12)
    context = Context.of_lengths(np.array([9, 12]), 12)
    expected = by_loop(tokens, context, 4, "relu2", 1.0, np.ones((2, 12)))
    real = np.asarray(context.segments)[..., None] != 0
    np.testing.assert_allclose(out, expected + real * (tokens[2] @ state), atol=1e-11)


def test_gradients_pass_through_the_state():
    *tokens, state, cotangent, last = draw(
        3, *(((2, 12, D),) * 4), (2, 12, E), (2, D, E), (2, 12, E), (2, D, E), dtype=np.float64
    )

    def gradients(implementation):
        def loss(tokens, state):
            out, later = flash_attention_chunks(
                *tokens, jnp.array([9, 12]), state, chunk=4, score=Laplace(), scale=1.0, normaliser=1.0,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(out * cotangent) + jnp.sum(later * last)

        return quick(jax.grad(loss, argnums=(0, 1)))(tokens, state)

    with jax.enable_x64(True):
        one, other = gradients("reference"), gradients("blocked")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-11), one, other)


@pytest.mark.parametrize("implementation", XLA)
def test_rows_within_one_chunk_are_quadratic_attention(implementation):
    context = CONTEXTS["whole"]
    tokens = draw(4, *TOKENS)
    settings = {"score": Relu2(), "scale": 0.5, "normaliser": context.positions + 1.0}

    def both(tokens):
        chunked = flash_attention(*tokens, context, chunk=T, implementation=implementation, **settings)
        whole = gau_attention(tokens[0], tokens[1], tokens[4], Mask.ranges(context, context), **settings)
        return chunked, whole

    np.testing.assert_allclose(*quick(both)(tokens), atol=1e-6)


@pytest.mark.parametrize("case", ["whole", "packed"])
def test_the_past_does_not_see_the_future(case):
    """Bit for bit, at the edges of chunks of 4: a chunk's own tokens are not in its state."""
    context, tokens = CONTEXTS[case], draw(5, *TOKENS)

    @quick
    def mixed(*tokens):
        return flash_attention(*tokens, context, chunk=4, score=Laplace(), scale=1.0, normaliser=1.0)

    before = mixed(*tokens)
    for at in (3, 4, 5, 8, 12):
        changed = [np.concatenate([x[:, :at], x[:, at:] + np.float32(1.0)], axis=1) for x in tokens]
        after = mixed(*changed)
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
        assert np.abs(before[0, at] - after[0, at]).max() > 1e-3


def test_contents_of_padding_do_not_matter():
    context, tokens = CONTEXTS["gaps"], draw(6, *TOKENS)
    real = np.asarray(context.segments != 0)[..., None]
    changed = [np.where(real, x, np.float32(300.0)) for x in tokens]

    @quick
    def run(tokens):
        def loss(tokens):
            out = flash_attention(*tokens, context, chunk=4, score=Relu2(), scale=1.0, normaliser=1.0)
            return jnp.sum(jnp.where(real, out, 0.0) ** 2), out

        return jax.grad(loss, has_aux=True)(tokens)

    (grads, out), (other_grads, other) = run(tokens), run(changed)
    np.testing.assert_array_equal(out, other)
    for one, two in zip(grads, other_grads, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(np.where(real, 0.0, one), 0.0)


CHUNK = 4
SPLITS = {
    "decode": (1,) * 11,
    "before the edge": (3, 1, 1, 1, 5),
    "at the edge": (4, 1, 6),
    "behind the edge": (5, 1, 5),
    "later": (11,),
}


@functools.cache
def extending(width: int, chunk: int):
    """One compiled piece for each width."""

    def step(state, tokens, real, divisor, bias):
        return extend(
            state, *tokens, real, chunk=chunk, score=Laplace(), scale=0.7, normaliser=divisor, bias=bias
        )  # fmt: skip

    return quick(step)


def in_pieces(tokens, lengths, splits, chunk, slots, bias):
    """Ragged rows, read piece by piece with padding behind each row's share of the piece."""
    rows, length = tokens[0].shape[:2]
    out = np.zeros(tokens[4].shape)
    state = FlashState.empty(rows, min(chunk, slots), D, E, jnp.float32)
    at = np.zeros(rows, int)
    for width in splits:
        count = np.minimum(np.maximum(np.asarray(lengths) - at, 0), [width, max(width - 1, 1), max(width - 3, 0)])
        places = np.minimum(at[:, None] + np.arange(width), length - 1)
        real = np.arange(width) < count[:, None]
        piece = [np.where(real[..., None], x[np.arange(rows)[:, None], places], np.float32(50.0)) for x in tokens]
        mixed, state = extending(width, chunk)(state, piece, real, places + 1.0, bias)
        assert (np.asarray(mixed)[~real] == 0.0).all()
        for b in range(rows):
            out[b, at[b] : at[b] + count[b]] = mixed[b, : count[b]]
        at += count
    return out, at, state


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_pieces_equal_the_whole(splits):
    """Three rows that get on at different speeds, over edges of chunks at different times."""
    *tokens, bias = draw(7, *(((3, 11, D),) * 4), (3, 11, E), (3,))
    out, read, state = in_pieces(tokens, (11, 9, 4), splits, CHUNK, 16, bias)
    context = Context.of_lengths(jnp.array(read), 11)
    divisor = np.tile(np.arange(11) + 1.0, (3, 1))
    expected = by_loop(tokens, context, CHUNK, "laplace", 0.7, divisor, bias)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_array_equal(state.count, read)
    assert read.max() == sum(splits)


def test_the_state_does_not_grow():
    sizes = {
        slots: sum(leaf.nbytes for leaf in jax.tree.leaves(FlashState.empty(1, min(4, slots), D, E, jnp.bfloat16)))
        for slots in (4, 64, 4096)
    }
    # The matrix in fp32, one chunk of two keys and a value in bf16, and a counter.
    assert set(sizes.values()) == {4 * D * E + 2 * 4 * (2 * D + E) + 4}


def operations(jaxpr, times=1) -> int:
    """Multiplications and additions of all matrix products, those inside loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * times * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        assert name != "while", "a loop whose length is not known"
        turns = times * params.get("length", 1) if name == "scan" else times
        for inner in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            total += operations(inner, turns) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("is_packed", [False, True])
def test_operations_and_memory_are_linear_in_the_length(is_packed):
    def gradient(length, implementation="blocked"):
        def loss(tokens):
            context = Context.of_lengths(jnp.full(1, length), length).replace(packed=is_packed)
            return flash_attention(
                *tokens, context, chunk=32, score=Relu2(), scale=1.0, normaliser=1.0, implementation=implementation
            ).sum()

        tokens = [jax.ShapeDtypeStruct((1, length, width), jnp.float32) for width in (8, 8, 8, 8, 64)]
        return jax.jit(jax.grad(loss)).trace(tokens)

    assert operations(gradient(2048).jaxpr) == 2 * operations(gradient(1024).jaxpr)
    assert operations(gradient(1024, "reference").jaxpr) > 3.5 * operations(gradient(512, "reference").jaxpr)
    size = [gradient(n).lower().compile().memory_analysis().temp_size_in_bytes for n in (2048, 4096)]
    assert size[1] < 2.1 * size[0] < 2**24


@pytest.mark.parametrize("implementation", XLA)
def test_bfloat16_stays_near_float64(implementation):
    tokens = [jnp.asarray(x, jnp.bfloat16) for x in draw(8, *TOKENS)]
    tokens[2] = tokens[2] * 0.25
    context = CONTEXTS["packed"]

    @quick
    def mixed(tokens):
        return flash_attention(
            *tokens, context, chunk=4, score=Laplace(), scale=0.5, normaliser=2.0, implementation=implementation
        )

    out = mixed(tokens)
    error = np.abs(np.asarray(out, np.float64) - by_loop(tokens, context, 4, "laplace", 0.5, np.full((2, T), 2.0)))
    assert out.dtype == jnp.bfloat16
    assert error.max() < 6e-2 and math.sqrt((error**2).mean()) < 1e-2


def test_what_cannot_be_served_is_named():
    tokens, context = draw(9, *TOKENS), CONTEXTS["whole"]
    settings = {"score": Relu2(), "scale": 1.0, "normaliser": 1.0}
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        flash_attention(*tokens, context, chunk=0, **settings)
    with pytest.raises(ValueError, match="do not fit together"):
        flash_attention(*tokens[:4], tokens[4][:, :-1], context, chunk=4, **settings)
    with pytest.raises(ValueError, match="23 slots are not a multiple of the chunk 4; pad the rows"):
        flash_attention_chunks(*tokens, jnp.array([23, 3]), jnp.zeros((2, D, E)), chunk=4, **settings)
    with pytest.raises(ValueError, match="unknown gated attention implementation 'fast'"):
        flash_attention(*tokens, context, chunk=4, implementation="fast", **settings)
    assert next(iter(FLASH_IMPLEMENTATIONS)) != "reference"
