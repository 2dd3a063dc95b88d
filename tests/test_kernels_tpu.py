"""The attention kernel for TPUs: its numbers in interpret mode, its lowering for the device, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import PROBLEMS, Problem, check, documents

from rlhf_jax.ops.attention import Case, Rule, Terms
from rlhf_jax.ops.kernels import tiles, tpu_attention


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_equal_the_reference(name):
    check(tpu_attention.attend, PROBLEMS[name], jnp.float32, 2e-6, tile=16, interpret=True)


def test_bfloat16_stays_within_its_rounding():
    check(tpu_attention.attend, PROBLEMS["window"], jnp.bfloat16, 2e-2, interpret=True)


def test_only_visible_tiles_are_visited():
    context = documents((40,), (16, 16), width=64)
    problem = Problem(context, context, window=8)
    visits = tiles.visits(problem.mask.blocks(16, 16))
    # Row 0 by hand: a tile of 16 queries and a window of 8 meet the tile itself and the one before, both partly.
    np.testing.assert_array_equal(visits.total[0], [1, 2, 2, 0])
    np.testing.assert_array_equal(visits.partial[0], [1, 2, 2, 0])
    np.testing.assert_array_equal(visits.order[0, 1, :2], [0, 1])
    np.testing.assert_array_equal(visits.total[1], [1, 1, 0, 0])
    whole = tiles.visits(Problem(context, context).mask.blocks(16, 16))
    # The third tile of row 0: its own, half padding, needs a mask and so do those before, as its padding sees nothing.
    np.testing.assert_array_equal(whole.total[0], [1, 2, 3, 0])
    np.testing.assert_array_equal(whole.partial[0], [1, 1, 3, 0])
    np.testing.assert_array_equal(whole.order[0, 1, :2], [1, 0])


def test_what_hides_in_invisible_tiles_is_never_read():
    context = documents((16, 8), width=24)
    problem = Problem(context, context)
    arrays = problem.arrays(jnp.float32)
    # The first document would be NaN if a weight of 0 met what lies behind it.
    k, v = (arrays[name].at[:, 16:].set(jnp.nan) for name in ("k", "v"))
    out, _ = tpu_attention.attend(arrays["q"], k, v, problem.mask, problem.terms(None), tile=8, interpret=True)
    assert np.isfinite(np.asarray(out)[:, :16]).all() and np.isnan(np.asarray(out)[:, 16:]).all()


def test_forward_and_backward_lower_for_a_tpu():
    context = documents((300,), width=300)
    problem = Problem(context, context, heads=4, kv_heads=2, width=64, value_width=64, window=90, softcap=9.0)
    arrays = problem.arrays(jnp.bfloat16)

    def loss(q, k, v):
        out, lse = tpu_attention.attend(q, k, v, problem.mask, problem.terms(None))
        return out.astype(jnp.float32).sum() + lse.sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(arrays["q"], arrays["k"], arrays["v"])
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("attention_forward", "attention_queries_gradient", "attention_keys_gradient"):
        assert kernel in text


SERVED = Case("tpu", "TPU v5", 2, 1024, 1024, 8, 2, 128, 128, "bfloat16", rule=Rule(sinks=2, stride=3), slopes=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "written for TPUs, and JAX runs on 'cpu'"),
        ({"dtype": "float16"}, "bfloat16 or float32, not float16"),
        ({"width": 264}, "at most 256 wide, got 264 and 128"),
        ({"rows": 64, "length": 1 << 16, "slots": 1 << 16}, "its list of 1048576 tiles is longer than 65536"),
    ],
)
def test_refusals_say_why(change, reason):
    assert tpu_attention.refusal(SERVED) is None
    assert reason in str(tpu_attention.refusal(replace(SERVED, **change)))


def test_without_sinks_the_sink_weighs_nothing():
    assert float(jnp.exp(tiles.sinks_of(Terms(scale=1.0), 2) - 0.0).max()) == 0.0
