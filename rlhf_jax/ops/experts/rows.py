"""Tokens sorted by expert, and back: where each slot goes, as gathers in both directions.

A slot is one choice of one token, number ``token * k + choice``; rows are slots sorted by expert. Taking tokens into
rows and adding rows up into tokens are the transposes of each other, so the gradient of each is the other: a gather.
Left to differentiation, both would be sums by scattering, which take longer than the experts themselves on a GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Sorting:
    """Which slot lies in each row, and in which row each slot lies.

    ``sizes`` are the rows of each expert; rows behind their sum hold slots of no expert. With ``holes`` some rows hold
    no slot (``slots`` is then n k) and some slots have no row (``rows`` is then R).
    """

    slots: Int[Array, " R"]
    rows: Int[Array, "n k"]
    sizes: Int[Array, " X"]
    holes: bool = struct.field(pytree_node=False, default=False)


def sort(experts: Int[Array, "n k"], number: int) -> Sorting:
    """Slots sorted by expert, in the order of tokens inside an expert; R = n k rows.

    Args:
        experts: of each token; ``number`` for none, whose rows come last.
        number: of experts.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    return Sorting(order, jnp.argsort(order).reshape(experts.shape), counts(flat, number))


def counts(experts: Int[Array, " M"], number: int) -> Int[Array, " X"]:
    """How often each expert occurs; by comparison, since counting by scattering is slow."""
    return (experts[:, None] == jnp.arange(number)).sum(0, dtype=jnp.int32)


@jax.custom_vjp
def dispatch(x: Float[Array, "n d"], sorting: Sorting) -> Float[Array, "R d"]:
    """The token of each row; 0 in rows without a slot."""
    return _take(x, sorting.slots // sorting.rows.shape[1], sorting.holes)


def _dispatch_forward(x, sorting):
    return dispatch(x, sorting), sorting


def _dispatch_backward(sorting, cotangent):
    return _sum(cotangent, sorting, None).astype(cotangent.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "R d"], weights: Float[Array, "n k"], sorting: Sorting) -> Float[Array, "n d"]:
    """The sum over a token's slots of weight times row, in the dtype of the weights (fp32)."""
    return _sum(rows, sorting, weights)


def _combine_forward(rows, weights, sorting):
    return combine(rows, weights, sorting), (rows, weights, sorting)


def _combine_backward(kept, cotangent):
    rows, weights, sorting = kept
    k = weights.shape[1]
    scales = _take(weights.reshape(-1), sorting.slots, sorting.holes)
    to_rows = scales[:, None] * _take(cotangent, sorting.slots // k, sorting.holes)
    to_weights = [
        (_take(rows, sorting.rows[:, choice], sorting.holes).astype(weights.dtype) * cotangent).sum(-1)
        for choice in range(k)
    ]
    return to_rows.astype(rows.dtype), jnp.stack(to_weights, axis=1).astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


def _sum(rows, sorting: Sorting, weights):
    """Over a token's slots, in fp32 at least."""
    wide = jnp.promote_types(rows.dtype, jnp.float32) if weights is None else weights.dtype
    parts = [
        _take(rows, sorting.rows[:, choice], sorting.holes).astype(wide) for choice in range(sorting.rows.shape[1])
    ]
    if weights is not None:
        parts = [weights[:, choice, None] * part for choice, part in enumerate(parts)]
    return functools.reduce(jnp.add, parts)


def _take(x: jax.Array, index: jax.Array, holes: bool) -> jax.Array:
    if holes:
        return x.at[index].get(mode="fill", fill_value=0)
    return x.at[index].get(mode="promise_in_bounds")
