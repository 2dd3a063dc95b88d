"""The kernels of gated attention for TPUs and Hopper GPUs: their numbers, their lowering, and what they refuse."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import lowering_for
from test_gau import LAST, PACKED, SCORES, STORED, WHOLE, draw, packed, quick

from rlhf_jax.ops import gau_reference
from rlhf_jax.ops.attention import Mask, Rule
from rlhf_jax.ops.gau_terms import GauCase, Laplace, Relu2
from rlhf_jax.ops.kernels import gau_tiles, hopper_gau, tpu_gau
from rlhf_jax.ops.kernels.hopper_gau_mix import mosaic
from rlhf_jax.types import Context

HOPPER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the kernels for Hopper are written for JAX 0.11.2 and newer"
)
LAST_TWO = Context(jnp.array([[2, 3], [5, 6]]), jnp.array([[1, 1], [1, 1]]))
CASES = {
    "packed": (PACKED, PACKED, {}),
    "prefix": (WHOLE, WHOLE, {"window": 3, "prefix": 3}),
    "sinks": (WHOLE, WHOLE, {"window": 4, "rule": Rule(sinks=2)}),
    "stride": (WHOLE, WHOLE, {"rule": Rule(stride=3)}),
    "columns": (PACKED, PACKED, {"window": 2, "rule": Rule(block=4, columns=1)}),
    "cache": (LAST_TWO, STORED, {}),
}
LONG = packed((130, 50, 3), width=200)
H200 = GauCase("gpu", "NVIDIA H200", 2, 512, 512, 128, 512, "bfloat16", Relu2())
TPU = GauCase("tpu", "TPU v5p", 2, 512, 512, 128, 512, "bfloat16", Relu2())


def as_it_is(function):
    return function


def value_and_gradients(attend, tokens, cotangent, queries, mask, score, dtype, run=quick, **more):
    """The output and the gradients of queries, keys and values."""

    def mixed(tokens, cotangent):
        tokens = [x.astype(dtype) for x in tokens]
        attended = functools.partial(
            attend, mask=mask, normaliser=queries.positions + 2.0, bias=None, score=score, **more
        )
        out, pull_back = jax.vjp(attended, *tokens)
        return out, *pull_back(cotangent.astype(dtype))

    return run(mixed)(tokens, cotangent)


def exact(tokens, cotangent, queries, mask, score, scale):
    """In float64, by automatic differentiation of the dense form."""
    with jax.enable_x64(True):
        tokens, cotangent = jax.tree.map(lambda x: np.asarray(x, np.float64), (tokens, cotangent))
        return value_and_gradients(
            gau_reference.attend, tokens, cotangent, queries, mask, score, jnp.float64, scale=scale
        )


def assert_close(results, expected, tolerance):
    for result, wanted in zip(results, expected, strict=True):
        error = np.abs(np.asarray(result, np.float64) - np.asarray(wanted)).max()
        assert error <= tolerance * np.abs(wanted).max(), (error, np.abs(wanted).max())


@pytest.mark.parametrize(("score", "case"), list(zip(["relu2", "laplace"] * 3, CASES, strict=True)))
def test_on_tpus_values_and_gradients_equal_the_dense_form(score, case):
    queries, keys, fields = CASES[case]
    rows, length, slots = *queries.positions.shape, keys.positions.shape[1]
    *tokens, cotangent = draw(0, (rows, length, 4), (rows, slots, 4), (rows, slots, 6), (rows, length, 6))
    mask = Mask.ranges(queries, keys, **fields)
    results = value_and_gradients(
        tpu_gau.attend, tokens, cotangent, queries, mask, SCORES[score], jnp.float32,
        scale=0.7, tile=4, interpret=True,
    )  # fmt: skip
    assert_close(results, exact(tokens, cotangent, queries, mask, SCORES[score], 0.7), 2e-6)


def test_several_tiles_of_values_are_one():
    """256 and 128 wide tiles of 384 values, two slices of the wide product."""
    *tokens, cotangent = draw(1, (1, 16, 4), (1, 16, 4), (1, 16, 384), (1, 16, 384))
    context = packed((10, 5), width=16)
    mask = Mask.ranges(context, context)
    results = value_and_gradients(
        tpu_gau.attend, tokens, cotangent, context, mask, Relu2(), jnp.float32, scale=0.3, tile=8, interpret=True
    )
    assert_close(results, exact(tokens, cotangent, context, mask, Relu2(), 0.3), 2e-6)


def test_a_walk_visits_what_is_seen_from_either_side():
    context = packed((8, 4), width=16)

    def walks():
        mask = Mask.ranges(context, context, window=6)
        return mask.dense(), *(gau_tiles.walk(mask, 4, 2, by_query=side) for side in (True, False))

    seen, by_query, by_key = jax.tree.map(np.asarray, quick(walks)())
    for walk, dense in ((by_query, seen[0]), (by_key, seen[0].T)):
        tiles = dense.reshape(4, 4, 8, 2).swapaxes(1, 2)
        for row in range(4):
            partial, total = walk.partial[0, row], walk.total[0, row]
            order = walk.order[0, row, :total].tolist()
            assert {tile for tile in range(8) if tiles[row, tile].any()} <= set(order)
            assert all(tiles[row, tile].all() for tile in order[partial:])
            assert len(order) == len(set(order))
    # By hand: queries 4..7 see keys 0..7, of which those of slots 2 and 3 are in the window of all four.
    assert by_query.order[0, 1, :4].tolist() == [0, 2, 3, 1]
    assert (by_query.partial[0, 1], by_query.total[0, 1]) == (3, 4)


def test_what_hides_in_invisible_tiles_is_never_read():
    *tokens, cotangent = draw(2, (1, 24, 4), (1, 24, 4), (1, 24, 6), (1, 24, 6))
    context = packed((16, 8), width=24)
    mask = Mask.ranges(context, context)
    tokens = [np.where(np.arange(24)[None, :, None] < 16, x, np.nan).astype(np.float32) for x in tokens]
    results = value_and_gradients(
        tpu_gau.attend, tokens, cotangent, context, mask, Laplace(), jnp.float32, scale=0.7, tile=8, interpret=True
    )
    assert all(np.isfinite(np.asarray(x)[:, :16]).all() for x in results)


def test_the_kernels_error_function_is_close():
    logits = jnp.linspace(-4.0, 4.0, 4001)
    np.testing.assert_allclose(gau_tiles.value(Laplace(), logits), Laplace().value(logits), atol=3e-7)


@pytest.mark.parametrize("attend", [hopper_gau.attend, tpu_gau.attend])
def test_a_single_query_needs_no_kernel(attend):
    *tokens, cotangent = draw(4, (2, 1, 128), (2, 7, 128), (2, 7, 128), (2, 1, 128))
    mask = Mask.ranges(LAST, STORED)
    results = value_and_gradients(attend, tokens, cotangent, LAST, mask, Relu2(), jnp.float32, scale=0.1)
    assert_close(results, exact(tokens, cotangent, LAST, mask, Relu2(), 0.1), 2e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "cpu"),
        ({"device": "NVIDIA A100"}, "this is a NVIDIA A100"),
        ({"dtype": "float32"}, "bfloat16, not float32"),
        ({"width": 64}, "128 wide, not 64"),
        ({"value_width": 320}, "multiple of 128, got 320"),
        ({"bias": True}, "relative bias"),
        ({"chunk": 256}, "chunked"),
    ],
)
def test_hopper_refuses_with_a_reason(monkeypatch, change, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert hopper_gau.refusal(H200) is None
    assert reason in str(hopper_gau.refusal(replace(H200, **change)))


def test_hopper_refuses_an_old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "0.11.2" in str(hopper_gau.refusal(H200))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "gpu"}, "gpu"),
        ({"dtype": "float16"}, "not float16"),
        ({"width": 320}, "got 320"),
        ({"value_width": 192}, "multiple of 128, got 192"),
        ({"bias": True}, "relative bias"),
        ({"chunk": 256}, "chunked"),
        ({"length": 1 << 18, "slots": 1 << 18}, "list of 524288 tiles"),
    ],
)
def test_tpus_refuse_with_a_reason(change, reason):
    assert tpu_gau.refusal(TPU) is None
    assert reason in str(tpu_gau.refusal(replace(TPU, **change)))


def lowered(attend, platform: str, kind: str) -> str:
    shapes = [jax.ShapeDtypeStruct((2, 512, width), jnp.bfloat16) for width in (128, 128, 512, 512)]

    def both(q, k, v, cotangent):
        context = Context.of_lengths(jnp.array([512, 300]), 512)
        mask = Mask.ranges(context, context)
        return value_and_gradients(
            attend, (q, k, v), cotangent, context, mask, Laplace(), jnp.bfloat16, as_it_is, scale=0.1
        )

    with lowering_for(platform, kind):
        return jax.jit(both).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_forward_and_backward_lower_for_a_tpu():
    assert lowered(tpu_gau.attend, "tpu", "TPU v5p").count("tpu_custom_call") == 4


@HOPPER
def test_forward_and_backward_lower_for_a_hopper_gpu():
    assert lowered(hopper_gau.attend, "cuda", "NVIDIA H200").count("mosaic_gpu") >= 4


@HOPPER
@pytest.mark.parametrize("score", SCORES)
def test_on_hopper_values_and_gradients_equal_the_dense_form(score):
    """In the interpreter, which watches for races; the bound is a few roundings to bfloat16."""
    _, plgpu = mosaic()
    *tokens, cotangent = draw(3, (1, 200, 128), (1, 200, 128), (1, 200, 256), (1, 200, 256))
    tokens = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in tokens]
    cotangent = np.asarray(jnp.asarray(cotangent, jnp.bfloat16), np.float32)
    mask = Mask.ranges(LONG, LONG, window=150)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        results = jax.block_until_ready(
            value_and_gradients(
                hopper_gau.attend,
                tokens,
                cotangent,
                LONG,
                mask,
                SCORES[score],
                jnp.bfloat16,
                scale=0.05,
                interpret=True,
            )
        )
    assert_close(results, exact(tokens, cotangent, LONG, mask, SCORES[score], 0.05), 1e-2)
