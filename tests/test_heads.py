"""The scalar head of reward models and critics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.models import (
    Attention,
    Block,
    ScalarModel,
    SwiGLU,
    Transformer,
    abstract_params,
    boxed_abstract_params,
    init_params,
)
from rlhf_jax.types import Context

TRUNK = Transformer(17, 64, (Block(Attention(4), SwiGLU(24)),), 2, tie_embeddings=False, max_length=16)
TOKENS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
CONTEXT = Context.of_lengths(jnp.array([4, 2]), 4)


def test_trunk_takes_the_parameters_of_a_policy():
    policy, model = init_params(TRUNK, jax.random.key(0)), ScalarModel(TRUNK)
    params = init_params(model, jax.random.key(1))
    assert jax.tree.structure(params["trunk"]) == jax.tree.structure(policy)
    params = {"trunk": policy, "head": {"kernel": jnp.full((64, 1), 0.5), "bias": jnp.array([2.0])}}
    values = model.apply({"params": params}, TOKENS, CONTEXT)
    hidden, _, _ = TRUNK.apply({"params": policy}, TOKENS, CONTEXT, method="hidden")
    assert values.shape == (2, 4) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, 0.5 * hidden.sum(-1) + 2, rtol=1e-5, atol=1e-5)


def test_heads_start_as_published():
    draws = [init_params(ScalarModel(TRUNK), jax.random.key(seed))["head"]["kernel"] for seed in range(8)]
    np.testing.assert_allclose(np.std(draws), 65**-0.5, rtol=0.1)
    zero = ScalarModel(TRUNK, head_init="zero")
    params = init_params(zero, jax.random.key(0))
    assert not params["head"]["kernel"].any() and not params["head"]["bias"].any()
    assert not zero.apply({"params": params}, TOKENS, CONTEXT).any()


def test_values_are_float32_when_the_trunk_computes_in_bfloat16():
    model = ScalarModel(TRUNK.clone(dtype=jnp.bfloat16))
    params = abstract_params(model)
    assert params["head"]["kernel"].dtype == jnp.float32
    assert jax.eval_shape(lambda p: model.apply({"params": p}, TOKENS, CONTEXT), params).dtype == jnp.float32


def test_head_names_its_axes():
    assert isinstance(boxed_abstract_params(ScalarModel(TRUNK))["head"]["kernel"], nn.Partitioned)


def test_unknown_head_init_is_refused():
    with pytest.raises(ValueError, match="unknown head_init 'ones'; expected one of reward, zero"):
        ScalarModel(TRUNK, head_init="ones")
