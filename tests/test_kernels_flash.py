"""The kernels of the chunked gated unit (not FlashAttention): their numbers, their lowering, and what they refuse."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import lowering_for
from test_gau import SCORES, draw, packed, quick
from test_kernels_gau import H200, HOPPER, TPU, as_it_is, assert_close

from rlhf_jax.ops import flash_reference
from rlhf_jax.ops.gau_terms import Laplace, Relu2
from rlhf_jax.ops.kernels import hopper_flash, tpu_flash
from rlhf_jax.ops.kernels.gau_tiles import documents
from rlhf_jax.ops.kernels.hopper_flash_states import states
from rlhf_jax.ops.kernels.hopper_gau_mix import mosaic
from rlhf_jax.types import Context

DIVISOR = 3.0


def of_chunks(implementation, tokens, state, cotangents, lengths, dtype, run=quick, **more):
    """Output, state and all gradients of ``chunks``."""

    def mixed(tokens, state, cotangents):
        tokens = [x.astype(dtype) for x in tokens]
        divisor = jnp.full(tokens[4].shape[:2], DIVISOR, state.dtype)

        def attended(*arguments):
            *tokens, state = arguments
            return implementation.chunks(*tokens, lengths, divisor, None, state, **more)

        out, pull_back = jax.vjp(attended, *tokens, state)
        return *out, *pull_back((cotangents[0].astype(dtype), cotangents[1]))

    return run(mixed)(tokens, state, cotangents)


def of_packed(attend, tokens, cotangent, context, dtype, run=quick, **more):
    """Output and all gradients of ``packed``."""

    def mixed(tokens, cotangent):
        tokens = [x.astype(dtype) for x in tokens]
        divisor = jnp.full(tokens[4].shape[:2], DIVISOR, jnp.promote_types(dtype, jnp.float32))
        attended = functools.partial(attend, context=context, normaliser=divisor, bias=None, **more)
        out, pull_back = jax.vjp(attended, *tokens)
        return out, *pull_back(cotangent.astype(dtype))

    return run(mixed)(tokens, cotangent)


def in_float64(function, *arguments, **more):
    """The same by the dense form."""

    def widened(x):
        return np.asarray(x, np.float64) if getattr(x, "dtype", None) == np.float32 else x

    with jax.enable_x64(True):
        arguments = jax.tree.map(widened, arguments)
        return function(*arguments, jnp.float64, **more)


def tokens_of(seed: int, rows: int, length: int, width: int, value_width: int):
    """Local and global queries and keys, values, and a cotangent of the output."""
    *tokens, cotangent = draw(seed, *((rows, length, width),) * 4, *((rows, length, value_width),) * 2)
    return tokens, cotangent


def rounded(tree):
    """The nearest numbers of bfloat16."""
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), tree)


@pytest.mark.parametrize(("lengths", "score"), [((7, 9), "relu2"), ((8, 0), "relu2"), ((16, 13), "laplace")])
def test_on_tpus_chunks_equal_the_dense_form(lengths, score):
    tokens, cotangent = tokens_of(0, 2, 16, 4, 6)
    state, last = draw(1, (2, 4, 6), (2, 4, 6))
    settings = {"chunk": 4, "score": SCORES[score], "scale": 0.7}
    lengths = np.array(lengths)
    results = of_chunks(tpu_flash, tokens, state, (cotangent, last), lengths, jnp.float32, interpret=True, **settings)
    expected = in_float64(of_chunks, flash_reference, tokens, state, (cotangent, last), lengths, **settings)
    assert_close(results, expected, 2e-6)


PACKED = {
    "long": packed((1, 12, 3), (-3, 13), width=16),
    "short": packed((1,) * 16, (3,) * 5, width=16),
    "gaps": packed((-1, 4, -2, 9), (5, -1, 2, 8), width=16),
}


@pytest.mark.parametrize("case", ["long", "gaps"])
def test_on_tpus_packed_rows_equal_the_dense_form(case):
    tokens, cotangent = tokens_of(2, 2, 16, 4, 6)
    settings = {"chunk": 4, "score": Relu2(), "scale": 0.7}
    context = PACKED[case]
    results = of_packed(tpu_flash.packed, tokens, cotangent, context, jnp.float32, interpret=True, **settings)
    assert_close(results, in_float64(of_packed, flash_reference.attend, tokens, cotangent, context, **settings), 2e-6)


@pytest.mark.parametrize("case", PACKED)
def test_each_pair_of_a_document_meets_once(case):
    """Directly in a chunk, directly in another one nearby, or through the state."""
    context, chunk = PACKED[case], 4

    def places():
        place = documents(context, chunk)
        return place.here.dense(), place.near.dense(), place.readable, place.kept, place.keep

    here, near, readable, kept, keep = (np.asarray(x) for x in quick(places)())
    position, segment = np.asarray(context.positions), np.asarray(context.segments)
    for b, t, s in np.ndindex(here.shape):
        same = segment[b, t] == segment[b, s] != 0 and s <= t
        together = position[b, t] // chunk == position[b, s] // chunk
        # Through the state: taken up in tile s, carried on to the tile before t's own, and not begun anew between.
        through = kept[b, s] and readable[b, t] and s // chunk <= t // chunk - 2
        through = through and keep[b, s // chunk + 1 : t // chunk - 1].all()
        assert here[b, t, s] == (same and together), (b, t, s)
        assert int(near[b, t, s]) + int(through) == (same and not together), (b, t, s)


@pytest.mark.parametrize(
    ("implementation", "case", "change", "reason"),
    [
        (hopper_flash, H200, {"chunk": None}, "quadratic"),
        (hopper_flash, H200, {"chunk": 64}, "multiple of 128, got 64"),
        (hopper_flash, H200, {"dtype": "float32"}, "bfloat16"),
        (tpu_flash, TPU, {"chunk": None}, "quadratic"),
        (tpu_flash, TPU, {"chunk": 200}, "multiple of 128, got 200"),
        (tpu_flash, TPU, {"value_width": 100}, "multiple of 128, got 100"),
    ],
)
def test_refuses_with_a_reason(monkeypatch, implementation, case, change, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    case = replace(case, chunk=256)
    assert implementation.refusal(case) is None
    assert reason in str(implementation.refusal(replace(case, **change)))


def lowered(implementation, platform: str, kind: str) -> list[str]:
    """The programs of whole and of packed rows, forward and backward."""
    wide, narrow = (jax.ShapeDtypeStruct((2, 512, width), jnp.bfloat16) for width in (512, 128))
    state = jax.ShapeDtypeStruct((2, 128, 512), jnp.float32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    settings = {"chunk": 256, "score": Laplace(), "scale": 0.1}
    tokens = (narrow,) * 4 + (wide,)

    def whole(tokens, state, cotangents, lengths):
        return of_chunks(implementation, tokens, state, cotangents, lengths, jnp.bfloat16, as_it_is, **settings)

    def rows(tokens, cotangent, positions, segments):
        context = Context(positions, segments)
        return of_packed(implementation.packed, tokens, cotangent, context, jnp.bfloat16, as_it_is, **settings)

    places = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    with lowering_for(platform, kind):
        one = jax.jit(whole).trace(tokens, state, (wide, state), lengths)
        other = jax.jit(rows).trace(tokens, wide, places, places)
        return [traced.lower(lowering_platforms=(platform,)).as_text() for traced in (one, other)]


def test_forward_and_backward_lower_for_a_tpu():
    whole, rows = lowered(tpu_flash, "tpu", "TPU v5p")
    # Two walks of the state; the products of two sums are four each, of which the kernels may be shared.
    assert whole.count("tpu_custom_call") >= 6 and rows.count("tpu_custom_call") >= 6


@HOPPER
def test_forward_and_backward_lower_for_a_hopper_gpu():
    whole, rows = lowered(hopper_flash, "cuda", "NVIDIA H200")
    assert whole.count("mosaic_gpu") >= 6 and rows.count("mosaic_gpu") >= 6


@HOPPER
def test_on_hopper_chunks_equal_the_dense_form():
    """In the interpreter, which watches for races; the bound is a few roundings to bfloat16."""
    _, plgpu = mosaic()
    tokens, cotangent = rounded(tokens_of(3, 1, 384, 128, 128))
    tokens[2] = rounded(tokens[2] * 0.05)
    state, last = draw(4, (1, 128, 128), (1, 128, 128))
    settings = {"chunk": 128, "score": Relu2(), "scale": 0.05}
    lengths = np.array([300])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        results = of_chunks(
            hopper_flash, tokens, state, (cotangent, last), lengths, jnp.bfloat16, as_it_is, interpret=True, **settings
        )
        jax.block_until_ready(results)
    expected = in_float64(of_chunks, flash_reference, tokens, state, (cotangent, last), lengths, **settings)
    assert_close(results, expected, 1e-2)


@HOPPER
def test_on_hopper_packed_rows_equal_the_dense_form():
    _, plgpu = mosaic()
    tokens, cotangent = rounded(tokens_of(5, 1, 384, 128, 128))
    tokens[2] = rounded(tokens[2] * 0.05)
    context = packed((40, 300, 30), width=384)
    settings = {"chunk": 128, "score": Laplace(), "scale": 0.05}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        results = of_packed(
            hopper_flash.packed, tokens, cotangent, context, jnp.bfloat16, as_it_is, interpret=True, **settings
        )
        jax.block_until_ready(results)
    expected = in_float64(of_packed, flash_reference.attend, tokens, cotangent, context, **settings)
    assert_close(results, expected, 1e-2)


@HOPPER
@pytest.mark.parametrize("reverse", [False, True])
def test_on_hopper_the_state_begins_anew_where_it_is_not_kept(reverse):
    _, plgpu = mosaic()
    keys, values, first = draw(6, (1, 384, 128), (1, 384, 128), (1, 128, 128))
    keys, values = rounded([keys, values])
    keep = np.array([[1.0, 0.0, 1.0]], np.float32)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        stored = [jnp.asarray(x, jnp.bfloat16) for x in (keys, values)]
        met, last = states(stored[0], stored[1], jnp.asarray(keep), jnp.asarray(first), reverse, True)
        jax.block_until_ready((met, last))
    state, expected = first.astype(np.float64), {}
    for chunk in (2, 1, 0) if reverse else (0, 1, 2):
        expected[chunk] = state
        there = slice(chunk * 128, chunk * 128 + 128)
        state = keep[0, chunk] * state + keys[:, there].swapaxes(1, 2).astype(np.float64) @ values[:, there]
    assert_close([last], [state], 1e-6)
    assert_close([met], [np.stack([expected[chunk] for chunk in range(3)], axis=1)], 4e-3)
