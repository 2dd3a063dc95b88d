"""Attention by cuDNN: what is asked of it means our mask, and everything else is refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import Problem, pretend_a_gpu

from rlhf_jax.ops.attention import Case, Rule, reference
from rlhf_jax.ops.kernels import cudnn
from rlhf_jax.types import Context

# One document a row: whole, short, and none at all.
ROWS = Context.of_lengths(jnp.array([23, 9, 0]), 23)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 23, 99])
def test_the_same_question_to_xla_gives_the_reference(window):
    problem = Problem(ROWS, ROWS, heads=4, kv_heads=2, window=window)
    assert problem.mask.aligned and problem.mask.causal
    arrays = problem.arrays(jnp.float32)

    def gradients(attend, **options):
        def loss(trained):
            out, _ = attend(*trained, problem.mask, problem.terms(None), **options)
            return jnp.sum(out * arrays["out"]), out

        (_, out), found = jax.jit(jax.value_and_grad(loss, has_aux=True))((arrays["q"], arrays["k"], arrays["v"]))
        return out, *found

    for found, expected in zip(gradients(cudnn.attend, interpret=True), gradients(reference.attend), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_padding_behind_gets_zeros_and_the_log_sum_exp_is_marked_as_missing():
    problem = Problem(ROWS, ROWS)
    arrays = problem.arrays(jnp.float32)
    out, lse = cudnn.attend(arrays["q"], arrays["k"], arrays["v"], problem.mask, problem.terms(None), interpret=True)
    assert not np.asarray(out)[1, 9:].any() and not np.asarray(out)[2].any()
    assert np.isnan(lse).all()


SERVED = Case(
    "gpu", "NVIDIA H200", 2, 1001, 1001, 8, 2, 128, 128, "bfloat16", causal=True, window=77, aligned=True
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "tpu"}, "runs on NVIDIA GPUs, and JAX runs on 'tpu'"),
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"aligned": False}, "not packed rows or caches"),
        ({"causal": False}, "this one shows later tokens"),
        ({"rule": Rule(sinks=4)}, "no other sparse patterns, got Rule(sinks=4"),
        ({"rule": Rule(stride=4)}, "no other sparse patterns, got Rule(sinks=0, stride=4"),
        ({"softcap": True}, "it has no soft-caps"),
        ({"sink_logits": True}, "it has no sink logits"),
        ({"slopes": True}, "ALiBi from a dense bias"),
        ({"lse": True}, "log-sum-exp rounded to bfloat16 and without a gradient"),
        ({"value_width": 64}, "keys and values have one width, got 128 and 64"),
        ({"width": 100, "value_width": 100}, "multiples of 8 up to 256 wide on 'NVIDIA H200', got 100"),
        ({"width": 264, "value_width": 264}, "multiples of 8 up to 256 wide on 'NVIDIA H200', got 264"),
        ({"rows": 4096, "length": 1 << 14}, "beyond 2147483647 entries, and these queries have 68719476736"),
    ],
)
def test_everything_else_is_refused_with_the_reason(monkeypatch, change, reason):
    pretend_a_gpu(monkeypatch, "9.0")
    assert cudnn.refusal(SERVED) is None
    assert cudnn.refusal(replace(SERVED, window=None, dtype="float16", width=64, value_width=64)) is None
    assert reason in str(cudnn.refusal(replace(SERVED, **change)))


def test_older_gpus_serve_narrower_heads_or_nothing(monkeypatch):
    wide = replace(SERVED, width=256, value_width=256)
    pretend_a_gpu(monkeypatch, "9.0")
    assert cudnn.refusal(wide) is None
    pretend_a_gpu(monkeypatch, "8.0")
    assert cudnn.refusal(SERVED) is None
    assert "up to 128 wide" in str(cudnn.refusal(wide))
    pretend_a_gpu(monkeypatch, "7.5")
    assert "compute capability 8.0 or more" in str(cudnn.refusal(SERVED))
