"""Gated attention, quadratic and chunked, from three kernels that each device brings, with its gradient.

Forward is one weighted sum, backward three passes without atomics: the same sum by key for the values, and one pass
each for queries and keys. Memory is linear in the length: no score is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.gau_terms import Score
from rlhf_jax.ops.kernels.gau_tiles import Linear, chunk_mask, documents, walk
from rlhf_jax.types import Context


@dataclass(frozen=True)
class Kernels:
    """What a device brings.

    Args:
        mix: ``(rows, columns, values, walk, score, scale, far, interpret) -> score(scale rows columns') values``, plus
            row ``t`` of ``far[0]`` times matrix ``t // (R / G)`` of the ``G`` matrices ``far[1]`` unless it is None.
        pull: ``(rows, columns, row_values, column_values, walk, score, scale, interpret) -> dS columns`` with
            ``dS = scale score'(scale rows columns') * (row_values column_values')``.
        states: ``(keys, values, keep, first, reverse, interpret) -> (met, last)``: the state of ``first`` and
            ``S <- keep_g S + keys_g' values_g`` that each chunk meets, and the last one.
        mix_tiles: rows and columns of a tile of ``mix``.
        pull_tiles: rows and columns of a tile of ``pull``.
    """

    mix: Callable[..., Array]
    pull: Callable[..., Array]
    states: Callable[..., tuple[Array, Array]]
    mix_tiles: tuple[int, int]
    pull_tiles: tuple[int, int]

    @property
    def tile(self) -> int:
        """Lengths are multiples of this; every tile divides it."""
        return max(*self.mix_tiles, *self.pull_tiles)


@dataclass(frozen=True)
class Plan:
    """The static facts of one call."""

    kernels: Kernels
    score: Score | Linear
    scale: float
    interpret: bool = False


def attend(
    plan: Plan,
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S E"],
    mask: Mask,
    normaliser: Float[Array, "B T"],
) -> Float[Array, "B T E"]:
    """``gau_attention`` without a bias; sums in fp32, what enters a product in the dtype of the values."""
    length, tile = q.shape[1], plan.kernels.tile

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0)))

    sums = weighted_sum(plan, padded(q), padded(k), padded(v), mask.padded(tile, tile))[:, :length]
    return (sums / normaliser[..., None]).astype(q.dtype)


def chunks(
    plan: Plan,
    chunk: int,
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    lengths: Int[Array, " B"],
    normaliser: Float[Array, "B T"],
    state: Float[Array, "B D E"],
) -> tuple[Float[Array, "B T E"], Float[Array, "B D E"]]:
    """``flash_attention_chunks`` without a bias; sums and the state in fp32."""
    slots = jnp.arange(v.shape[1])
    context = Context.of_lengths(lengths, v.shape[1])
    # Only complete chunks enter the state, so that it ends where the row's own last chunk begins.
    complete = slots < (lengths // chunk * chunk)[:, None]
    k_global = jnp.where(complete[..., None], k_global, 0)
    # The sum is divided at its end, so that both of its parts can be added in one kernel.
    far = (q_global * normaliser[..., None]).astype(q_global.dtype)
    far = jnp.where((slots < lengths[:, None])[..., None], far, 0)
    keep = jnp.ones((v.shape[0], v.shape[1] // chunk), jnp.float32)
    mask = chunk_mask(context.positions, context.segments, chunk)
    sums, state = mixed_sum(plan, q_local, k_local, far, k_global, v, keep, state, mask)
    return (sums / normaliser[..., None]).astype(v.dtype), state


def packed(
    plan: Plan,
    chunk: int,
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    context: Context,
    normaliser: Float[Array, "B T"],
) -> Float[Array, "B T E"]:
    """``flash_attention`` without a bias where documents may begin anywhere in a row of whole tiles of ``chunk``.

    The chunks of a document do not fit the tiles then. Tokens of a chunk meet by the score, those of the document's
    earlier chunks in the tile and the one before it by the plain product, all before these through the state.
    """
    place = documents(context, chunk)
    length = v.shape[1]
    linear = Plan(plan.kernels, Linear(), 1.0, plan.interpret)
    here = weighted_sum(plan, q_local, k_local, v, place.here)
    near = weighted_sum(linear, q_global, k_global, v, place.near)
    # The state that a tile reads is the one that the tile before it meets: queries stand one tile ahead.
    ahead = jnp.where(place.readable[..., None], q_global, 0)[:, chunk:]
    ahead = jnp.pad(ahead, ((0, 0), (0, chunk), (0, 0)))
    kept = jnp.where(place.kept[..., None], k_global, 0)
    far = recalled(plan, ahead, kept, v, place.keep)[:, : length - chunk]
    far = jnp.pad(far, ((0, 0), (chunk, 0), (0, 0)))
    wide = normaliser.dtype
    return (here / normaliser[..., None] + near.astype(wide) + far.astype(wide)).astype(v.dtype)


def _weighted_sum(plan: Plan, q, k, v, mask: Mask):
    return plan.kernels.mix(
        q, k, v, walk(mask, *plan.kernels.mix_tiles, by_query=True), plan.score, plan.scale, None, plan.interpret
    )


def _weighted_sum_backward(plan: Plan, residuals, cotangent):
    q, k, v, mask = residuals
    return *_gradients(plan, q, k, v, mask, cotangent, None), None


weighted_sum = jax.custom_vjp(_weighted_sum, nondiff_argnums=(0,))
"""``(plan, q, k, v, mask) -> A v``: gated attention without its normaliser."""
weighted_sum.defvjp(lambda plan, *arguments: (_weighted_sum(plan, *arguments), arguments), _weighted_sum_backward)


def _gradients(plan: Plan, q, k, v, mask: Mask, cotangent, far):
    """Of queries, keys and values; ``far`` as in ``mix``, added to those of the values."""
    kernels, terms = plan.kernels, (plan.score, plan.scale)
    by_query, by_key = (walk(mask, *kernels.pull_tiles, by_query=side) for side in (True, False))
    dq = kernels.pull(q, k, cotangent, v, by_query, *terms, plan.interpret)
    dk = kernels.pull(k, q, v, cotangent, by_key, *terms, plan.interpret)
    by_key = walk(mask, *kernels.mix_tiles, by_query=False)
    return dq, dk, kernels.mix(k, q, cotangent, by_key, *terms, far, plan.interpret)


def _mixed_sum(plan: Plan, q, k, q_far, k_far, v, keep, first, mask: Mask):
    return _mixed_sum_forward(plan, q, k, q_far, k_far, v, keep, first, mask)[0]


def _mixed_sum_forward(plan: Plan, q, k, q_far, k_far, v, keep, first, mask: Mask):
    met, last = plan.kernels.states(k_far, v, keep, first, False, plan.interpret)
    by_query = walk(mask, *plan.kernels.mix_tiles, by_query=True)
    out = plan.kernels.mix(q, k, v, by_query, plan.score, plan.scale, (q_far, met), plan.interpret)
    return (out, last), (q, k, q_far, k_far, v, keep, mask, met)


def _mixed_sum_backward(plan: Plan, residuals, cotangents):
    q, k, q_far, k_far, v, keep, mask, met = residuals
    d_out, d_last = cotangents
    d_states, d_first = plan.kernels.states(q_far, d_out, keep, d_last, True, plan.interpret)
    dq, dk, dv = _gradients(plan, q, k, v, mask, d_out, (k_far, d_states))
    return dq, dk, _towards(d_out, met), _towards(v, d_states), dv, None, d_first, None


mixed_sum = jax.custom_vjp(_mixed_sum, nondiff_argnums=(0,))
"""``(plan, q, k, q_far, k_far, v, keep, first, mask) -> (A v + q_far S, last S)`` over the chunks of ``keep``."""
mixed_sum.defvjp(_mixed_sum_forward, _mixed_sum_backward)


def _recalled(plan: Plan, q, k, v, keep):
    return _recalled_forward(plan, q, k, v, keep)[0]


def _recalled_forward(plan: Plan, q, k, v, keep):
    met, _ = plan.kernels.states(k, v, keep, _nothing(q, v), False, plan.interpret)
    return _times(q, met), (q, k, v, keep, met)


def _recalled_backward(plan: Plan, residuals, cotangent):
    q, k, v, keep, met = residuals
    d_states, _ = plan.kernels.states(q, cotangent, keep, _nothing(q, v), True, plan.interpret)
    return _towards(cotangent, met), _towards(v, d_states), _times(k, d_states), None


recalled = jax.custom_vjp(_recalled, nondiff_argnums=(0,))
"""``(plan, q, k, v, keep) -> q S`` with the state that each chunk meets."""
recalled.defvjp(_recalled_forward, _recalled_backward)


def _nothing(q, v) -> Float[Array, "B D E"]:
    return jnp.zeros((q.shape[0], q.shape[2], v.shape[2]), jnp.float32)


def _times(x: Float[Array, "B T D"], matrices: Float[Array, "B G D E"]) -> Float[Array, "B T E"]:
    """Each chunk times its matrix."""
    tiles = x.reshape(*matrices.shape[:2], -1, x.shape[2])
    out = jnp.einsum("bgcd,bgde->bgce", tiles, matrices, preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:2], -1).astype(x.dtype)


def _towards(x: Float[Array, "B T E"], matrices: Float[Array, "B G D E"]) -> Float[Array, "B T D"]:
    """Each chunk times its matrix transposed."""
    return _times(x, matrices.swapaxes(2, 3))
