"""Decoding kernels: their numbers in interpret mode, their lowering for the device, what they refuse, who is chosen."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import documents, lowering_for, pretend_a_gpu

from rlhf_jax.ops.attention import Case, Mask, Rule, Terms, alibi_slopes, decode_attention, reference
from rlhf_jax.ops.attention.decode import DECODERS, choose_decoder
from rlhf_jax.ops.kernels import decode, decode_tpu, decode_triton, hopper_decode
from rlhf_jax.types import Context

# The slots lie in random order; the last row, and one query, are padding.
CACHE = documents((20, 30, 9), (60,), (5,), (), width=70, shuffle=3)
QUERIES = Context(jnp.array([[29], [59], [4], [0]]), jnp.array([[2], [1], [1], [0]]))
KERNELS = {"triton": decode_triton, "tpu": decode_tpu}
WHOLE = Terms(scale=0.3)
BOUNDED = Terms(scale=0.3, softcap=3.0, slopes=alibi_slopes(6), sink_logits=jnp.linspace(-2.0, 1.0, 6))


def draw(heads, kv_heads, width=16, value_width=32, slots=70, dtype=jnp.float32):
    shapes = (4, heads, width), (4, kv_heads, slots, width), (4, kv_heads, slots, value_width)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_reference(q, keys, values, mask, terms):
    """In float64."""
    with jax.enable_x64(True):
        q, keys, values = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, keys, values))
        out, _ = reference.attend(q[:, None], keys.swapaxes(1, 2), values.swapaxes(1, 2), mask, terms)
        return np.asarray(out[:, 0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "terms", "options"),
    [
        (6, 2, WHOLE, {}),
        (6, 1, BOUNDED, {"window": 9, "rule": Rule(sinks=2)}),
        (6, 6, BOUNDED, {"rule": Rule(stride=3)}),
    ],
    ids=["whole", "window", "stride"],
)
def test_values_equal_the_reference(kernel, heads, kv_heads, terms, options):
    q, keys, values = draw(heads, kv_heads)
    mask = Mask.ranges(QUERIES, CACHE, **options)
    out = KERNELS[kernel].attend(q, keys, values, mask, terms, tile=16, interpret=True)
    np.testing.assert_allclose(out, by_reference(q, keys, values, mask, terms), atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cache_shorter_than_a_tile_is_served(kernel):
    q, keys, values = draw(2, 1, slots=5)
    context = documents((5,), (3,), (1,), (4,), width=5)
    mask = Mask.ranges(Context(jnp.array([[4], [2], [0], [1]]), jnp.ones((4, 1), jnp.int32)), context)
    out = KERNELS[kernel].attend(q, keys, values, mask, WHOLE, interpret=True)
    np.testing.assert_allclose(out, by_reference(q, keys, values, mask, WHOLE), atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_stays_within_its_rounding(kernel):
    q, keys, values = draw(6, 2, dtype=jnp.bfloat16)
    mask = Mask.ranges(QUERIES, CACHE)
    out = KERNELS[kernel].attend(q, keys, values, mask, WHOLE, tile=16, interpret=True)
    np.testing.assert_allclose(out.astype(jnp.float32), by_reference(q, keys, values, mask, WHOLE), atol=2e-2)


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 400])
def test_the_number_of_programs_changes_nothing(programs):
    q, keys, values = draw(6, 2)
    mask = Mask.ranges(QUERIES, CACHE, window=25)
    out = decode_triton.attend(q, keys, values, mask, BOUNDED, tile=16, programs=programs, interpret=True)
    np.testing.assert_allclose(out, by_reference(q, keys, values, mask, BOUNDED), atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_that_nobody_sees_are_never_read(kernel):
    q, keys, values = draw(2, 1, slots=70)
    mask = Mask.ranges(
        Context(jnp.full((4, 1), 39, jnp.int32), jnp.ones((4, 1), jnp.int32)),
        Context.of_lengths(jnp.full(4, 40), 70),
        window=8,
    )
    hidden = (slice(None), slice(None), np.r_[0:32, 48:70])
    # Tiles of 16: positions 32 to 39 lie in the third alone, and NaN in a tile that is read would show.
    out = KERNELS[kernel].attend(
        q, keys.at[hidden].set(jnp.nan), values.at[hidden].set(jnp.nan), mask, WHOLE, tile=16, interpret=True
    )
    np.testing.assert_allclose(out, by_reference(q, keys, values, mask, WHOLE), atol=2e-6)


INTERPRETER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 1), reason="Mosaic GPU has an interpreter from JAX 0.11.1 on"
)


@INTERPRETER
@pytest.mark.parametrize(
    ("heads", "kv_heads", "terms", "options"),
    [(4, 2, WHOLE, {}), (6, 1, BOUNDED, {"window": 90, "rule": Rule(sinks=2)})],
    ids=["whole", "window"],
)
def test_values_on_hopper_equal_the_reference(heads, kv_heads, terms, options):
    context = documents((20, 130, 9), (200,), (5,), (), width=210, shuffle=3)
    queries = Context(jnp.array([[129], [199], [4], [0]]), jnp.array([[2], [1], [1], [0]]))
    q, keys, values = draw(heads, kv_heads, width=64, value_width=64, slots=210, dtype=jnp.bfloat16)
    mask = Mask.ranges(queries, context, **options)
    out = hopper_decode.attend(q, keys, values, mask, terms, programs=2, interpret=True)
    np.testing.assert_allclose(out.astype(jnp.float32), by_reference(q, keys, values, mask, terms), atol=2e-2)


@INTERPRETER
def test_hopper_lowers_without_the_device():
    q, keys, values = draw(6, 2, width=64, value_width=128, slots=72, dtype=jnp.bfloat16)
    mask = Mask.ranges(QUERIES, documents((20, 30, 9), (60,), (5,), (), width=72), window=9)

    def step(q, keys, values):
        return hopper_decode.attend(q, keys, values, mask, BOUNDED)

    assert "mosaic_gpu" in jax.jit(step).trace(q, keys, values).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("kernel", "platform", "kind"), [("triton", "cuda", "NVIDIA H200"), ("tpu", "tpu", "TPU v5")])
def test_they_lower_for_the_device(kernel, platform, kind):
    q, keys, values = draw(6, 2, width=64, value_width=64, dtype=jnp.bfloat16)
    mask = Mask.ranges(QUERIES, CACHE, window=9)

    def step(q, keys, values):
        return KERNELS[kernel].attend(q, keys, values, mask, BOUNDED)

    with lowering_for("gpu" if platform == "cuda" else "tpu", kind):
        text = jax.jit(step).trace(q, keys, values).lower(lowering_platforms=(platform,)).as_text()
    assert "attention_decode" in text


def test_merging_leaves_out_what_is_empty():
    # One row, one key head with two query heads (the second sees nothing), two parts; by hand: weights e^0 and e^1.
    parts = jnp.array([[[[[2.0], [0.0]], [[4.0], [0.0]]]]])
    logs = jnp.array([[[[0.0, -1e30], [1.0, -1e30]]]])
    out = decode.merged(parts, logs, WHOLE, 2, jnp.float32)
    np.testing.assert_allclose(out, [[[(2 + 4 * np.e) / (1 + np.e)], [0.0]]], rtol=1e-6)
    sinks = Terms(scale=1.0, sink_logits=jnp.array([1.0, 5.0]))
    out = decode.merged(parts, logs, sinks, 2, jnp.float32)
    np.testing.assert_allclose(out, [[[(2 + 4 * np.e) / (1 + 2 * np.e)], [0.0]]], rtol=1e-6)


def test_programs_occupy_the_device():
    # 132 processors, four programs each: 528 for one row and one key head, 8.25 of each of 8 rows and 8 key heads.
    assert decode.programs_for(1, 1) == 528
    assert decode.programs_for(8, 8) == 9
    assert decode.programs_for(1024, 8) == 1


GPU = Case("gpu", "NVIDIA A100", 8, 1, 8192, 32, 8, 128, 128, "bfloat16", softcap=True, slopes=True, sink_logits=True)
TPU = replace(GPU, platform="tpu", device="TPU v5")


@pytest.mark.parametrize(
    ("kernel", "case", "change", "reason"),
    [
        ("triton", GPU, {"platform": "cpu"}, "written for GPUs, and JAX runs on 'cpu'"),
        ("triton", GPU, {"dtype": "float64"}, "bfloat16, float16 or float32, not float64"),
        ("triton", GPU, {"width": 80}, "a power of two from 16 wide, got 80"),
        ("triton", GPU, {"value_width": 512}, "at most 256 wide, got 128 and 512"),
        ("triton", GPU, {"length": 2}, "one token a row, got 2"),
        ("triton", GPU, {"slots": 1 << 19}, "at most 2147483647 entries, got 4294967296"),
        ("tpu", TPU, {"platform": "gpu"}, "written for TPUs, and JAX runs on 'gpu'"),
        ("tpu", TPU, {"dtype": "float16"}, "bfloat16 or float32, not float16"),
        ("tpu", TPU, {"width": 264}, "at most 256 wide, got 264 and 128"),
        ("tpu", TPU, {"length": 2}, "one token a row, got 2"),
        ("tpu", TPU, {"rows": 1 << 13}, "its list of 131072 tiles is longer than 65536"),
    ],
)
def test_refusals_say_why(monkeypatch, kernel, case, change, reason):
    pretend_a_gpu(monkeypatch, "8.0")
    assert KERNELS[kernel].refusal(case) is None
    assert reason in str(KERNELS[kernel].refusal(replace(case, **change)))


HOPPER = replace(GPU, device="NVIDIA H200")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 80}, "heads are 64 or 128 wide, got 80"),
        ({"value_width": 256}, "heads are 64 or 128 wide, got 256"),
        ({"slots": 1001}, "1001 slots of the cache are not a multiple"),
        ({"heads": 130, "kv_heads": 2}, "at most 64 query heads share a key head, got 65"),
        ({"length": 2}, "one token a row, got 2"),
        ({"device": "NVIDIA A100"}, "this device is 'NVIDIA A100'"),
    ],
)
def test_hopper_refuses_with_the_reason(change, reason):
    refused = hopper_decode.refusal(HOPPER)
    assert refused is None or "JAX 0.11.1 or newer" in refused
    assert reason in str(hopper_decode.refusal(replace(HOPPER, **change)))


def test_decoders_that_have_not_run_on_their_devices_are_taken_by_name_alone(monkeypatch):
    pretend_a_gpu(monkeypatch, "8.0")
    assert choose_decoder("triton", GPU) == "triton"
    assert choose_decoder("tpu", TPU) == "tpu"
    assert choose_decoder("auto", GPU) == choose_decoder("auto", TPU) == "reference"
    assert choose_decoder("auto", replace(GPU, platform="cpu")) == "reference"
    assert choose_decoder("auto", replace(GPU, width=80)) == "reference"
    assert choose_decoder("reference", GPU) == "reference"
    with pytest.raises(ValueError, match="'triton' cannot decode: it reads caches .* got 80; take another"):
        choose_decoder("triton", replace(GPU, width=80))
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        choose_decoder("flash", GPU)


def test_a_schedule_without_a_decoder_decodes_by_the_reference(monkeypatch):
    monkeypatch.setitem(
        decode_attention.__globals__["check_implementation"].__globals__["IMPLEMENTATIONS"], "new", None
    )
    assert choose_decoder("new", GPU) == "reference"


def test_decoding_on_this_device_equals_the_reference():
    q, keys, values = draw(6, 2)
    mask = Mask.ranges(QUERIES, CACHE)
    for name in ("auto", "reference"):
        out = decode_attention(q, keys, values, mask, BOUNDED, name)
        np.testing.assert_allclose(out, by_reference(q, keys, values, mask, BOUNDED), atol=2e-6)
    assert list(DECODERS)[-1] == "reference"
