"""Parameters of a model as a plain nested dict: make them, count them, know their shapes without making them."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.types import Context, PyTree


def init_params(model: nn.Module, key: jax.Array, shardings: PyTree = None) -> PyTree:
    """Freshly drawn parameters, without the boxes that carry logical axes.

    Args:
        model: whose parameters they are.
        key: randomness; the numbers do not depend on the shardings.
        shardings: where each of them is to lie, each device drawing its own part; None for the default device.
    """
    if shardings is None:
        return _drawn(model, key)
    return jax.jit(functools.partial(_unboxed, model), out_shardings=shardings)(key)


def abstract_params(model: nn.Module) -> PyTree:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return nn.unbox(boxed_abstract_params(model))


def boxed_abstract_params(model: nn.Module) -> PyTree:
    """Shapes and dtypes in boxes that carry the logical axes, as ``nn.get_partition_spec`` reads them."""
    return jax.tree.map(lambda leaf: leaf, _shapes(model))  # containers of one's own


@functools.lru_cache(maxsize=64)
def _shapes(model: nn.Module) -> PyTree:
    return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


def count_params(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))


def _unboxed(model: nn.Module, key: jax.Array) -> PyTree:
    return nn.unbox(_init(model, key))


_drawn = jax.jit(_unboxed, static_argnums=0)


def _init(model: nn.Module, key: jax.Array) -> PyTree:
    one = jnp.ones((1, 1), jnp.int32)
    return model.init(key, one, Context(positions=one - 1, segments=one))["params"]
