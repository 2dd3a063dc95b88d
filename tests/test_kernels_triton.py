"""The Triton attention kernel: its numbers in interpret mode, its lowering for the device, what it refuses."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import PROBLEMS, Problem, check, documents, lowering_for, pretend_a_gpu

from rlhf_jax.ops.attention import Case, Rule
from rlhf_jax.ops.kernels import triton_attention


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_equal_the_reference(name):
    check(triton_attention.attend, PROBLEMS[name], jnp.float32, 2e-6, tile=16, interpret=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_half_precision_stays_within_its_rounding(dtype, tolerance):
    check(triton_attention.attend, PROBLEMS["window"], dtype, tolerance, interpret=True)


def test_what_hides_in_invisible_tiles_is_never_read():
    context = documents((32, 16), width=48)
    problem = Problem(context, context)
    arrays = problem.arrays(jnp.float32)
    # The first document would be NaN if a weight of 0 met what lies behind it.
    k, v = (arrays[name].at[:, 32:].set(jnp.nan) for name in ("k", "v"))
    out, _ = triton_attention.attend(arrays["q"], k, v, problem.mask, problem.terms(None), tile=16, interpret=True)
    assert np.isfinite(np.asarray(out)[:, :32]).all() and np.isnan(np.asarray(out)[:, 32:]).all()


@pytest.mark.parametrize(("width", "dtype"), [(64, jnp.bfloat16), (48, jnp.float32), (256, jnp.float16)])
def test_forward_and_backward_lower_for_a_gpu_without_a_warning(width, dtype):
    context = documents((300,), width=300)
    problem = Problem(
        context,
        context,
        heads=4,
        kv_heads=2,
        width=width,
        value_width=width,
        window=90,
        rule=Rule(sinks=2),
        slopes=True,
    )
    arrays = problem.arrays(dtype)

    def loss(q, k, v):
        out, lse = triton_attention.attend(q, k, v, problem.mask, problem.terms(jnp.zeros(4)))
        return out.astype(jnp.float32).sum() + lse.sum()

    with warnings.catch_warnings(), lowering_for("gpu", "NVIDIA H200"):
        warnings.simplefilter("error")
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(arrays["q"], arrays["k"], arrays["v"])
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("attention_forward", "attention_queries_gradient", "attention_keys_gradient"):
        assert kernel in text


SERVED = Case("gpu", "NVIDIA A100", 2, 1000, 1000, 8, 2, 96, 128, "bfloat16", rule=Rule(sinks=2, stride=3), slopes=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "written for GPUs, and JAX runs on 'cpu'"),
        ({"dtype": "float64"}, "bfloat16, float16 or float32, not float64"),
        ({"value_width": 512}, "at most 256 wide, got 96 and 512"),
        ({"rows": 70000}, "at most 65535 rows and heads, got 70000 and 8"),
        ({"length": 1 << 21}, "at most 2147483647 entries, got 4294967296"),
    ],
)
def test_refusals_say_why(monkeypatch, change, reason):
    pretend_a_gpu(monkeypatch, "8.0")
    assert triton_attention.refusal(SERVED) is None
    assert reason in str(triton_attention.refusal(replace(SERVED, **change)))


def test_a_jax_without_triton_is_refused(monkeypatch):
    pretend_a_gpu(monkeypatch, "8.0")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    assert "has no Pallas:Triton any more" in str(triton_attention.refusal(SERVED))


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_an_old_or_other_gpu_is_refused(monkeypatch, capability):
    pretend_a_gpu(monkeypatch, capability)
    reason = str(triton_attention.refusal(SERVED))
    assert f"compute capability 8.0 or more, and this is 'GPU of {capability}'" in reason
