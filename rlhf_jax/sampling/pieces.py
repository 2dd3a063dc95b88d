"""What both ways of sampling are made of: the prefill, a draw, and how responses become a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import Aux, Transformer, empty_cache
from rlhf_jax.ops.meshes import constrain_rows
from rlhf_jax.sampling.settings import Sampling
from rlhf_jax.types import Cache, Context, Key, PromptBatch, PyTree, Rollout


def prefill(
    model: Transformer, params: PyTree, prompts: PromptBatch, sampling: Sampling
) -> tuple[Float[Array, "B V"], Cache, Int[Array, "layers B P k"] | None]:
    """Read each prompt once: the logits after its last token, a cache of just the prompts' width, and the routing."""
    last, cache, aux = read(model, params, prompts.tokens, prompts.lengths)
    logits = apply(model, params, last, method="unembed")
    return logits, cache, aux["moe/experts"] if sampling.record_routing else None


def read(
    model: Transformer, params: PyTree, tokens: Int[Array, "B P"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B E"], Cache, Aux]:
    """The hidden state of the last token of each right-padded row, a cache of all tokens, and the layers' reports."""
    rows, width = tokens.shape
    cache = constrain_rows(empty_cache(model, rows, width))
    hidden, cache, aux = apply(model, params, tokens, Context.of_lengths(lengths, width), cache, method="hidden")
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache, aux


def apply(model: Transformer, params: PyTree, *inputs: Any, method: str = "__call__") -> Any:
    return model.apply({"params": params}, *inputs, method=method)


def by_row(model: Transformer, change: Callable[..., Array], cache: Cache, *others: Cache) -> Cache:
    """The cache with ``change(axis of its rows, part, the same part of others)`` in place of each part that has rows.

    Which axis that is is found by comparing shapes, because mixers lay out their state as they please.
    """
    rows, slots = cache.positions.shape
    twice = jax.eval_shape(lambda: empty_cache(model, 2 * rows, slots))

    def changed(doubled: jax.ShapeDtypeStruct, part: Array, *same: Array) -> Array:
        pairs = zip(part.shape, doubled.shape, strict=True)
        axis = next((axis for axis, (one, two) in enumerate(pairs) if one != two), None)
        return part if axis is None else change(axis, part, *same)

    return jax.tree.map(changed, twice, cache, *others)


def rows_of(model: Transformer, cache: Cache, chosen: Int[Array, "R"]) -> Cache:
    """The cache of these rows alone; one may be there several times."""
    return by_row(model, lambda axis, part: jnp.take(part, chosen, axis=axis), cache)


def with_room(model: Transformer, cache: Cache, slots: int) -> Cache:
    """The same cache with room for ``slots`` tokens of each row."""

    def fit(old: Array, empty: Array) -> Array:
        return old if old.shape == empty.shape else jax.lax.dynamic_update_slice(empty, old, (0,) * old.ndim)

    return jax.tree.map(fit, cache, empty_cache(model, cache.positions.shape[0], slots))


def resized(model: Transformer, cache: Cache, rows: int, slots: int) -> Cache:
    """The same cache with each row repeated to make ``rows``, and room for ``slots`` tokens."""
    times = rows // cache.positions.shape[0]
    repeated = by_row(model, lambda axis, part: jnp.repeat(part, times, axis=axis), cache)
    return constrain_rows(with_room(model, repeated, slots))


def draw(sampling: Sampling, logits: Float[Array, "B V"], keys: Key) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token of each row, and its log-probability.

    By inversion in two stages, the first of which picks a block of the vocabulary: two uniform numbers a row instead of
    one Gumbel variate per logit, which took 20 times as long on CPU, and sums short enough to stay exact in fp32.
    """
    logits = sampling.filter(logits)
    vocab = logits.shape[1]
    blocks = -(-vocab // 128)
    top = jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.exp(logits - top)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * 128 - vocab))).reshape(-1, blocks, 128)
    by_block = jnp.cumsum(jnp.sum(weights, axis=2), axis=1)
    if sampling.greedy:
        token = jnp.argmax(logits, axis=1)
    else:
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
        block = invert(by_block, uniform[:, 0])
        inside = jnp.cumsum(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], axis=1)
        token = block * 128 + invert(inside, uniform[:, 1])
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
    return token.astype(jnp.int32), (chosen - top)[:, 0] - jnp.log(by_block[:, -1])


def invert(cumulative: Float[Array, "B M"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first entry that exceeds ``uniform`` times the total; never one without weight, as ``uniform < 1``."""
    return jnp.sum(cumulative <= (uniform * cumulative[:, -1])[:, None], axis=1)


def row_keys(key: Key, index: Int[Array, "B"], number: Int[Array, "B"]) -> Key:
    """The randomness of each response, which derives from its prompt's index and its number among the samples."""
    return jax.vmap(lambda index, number: jax.random.fold_in(jax.random.fold_in(key, index), number))(index, number)


def token_keys(keys: Key, number: Int[Array, ""] | Int[Array, "B"]) -> Key:
    """The randomness of the token of that number in each response."""
    return jax.vmap(jax.random.fold_in, (0, 0 if number.ndim else None))(keys, number)


def ends(token: Int[Array, "B"], stops: tuple[int, ...]) -> Bool[Array, "B"]:
    """Whether each token ends its response."""
    return jnp.any(token[:, None] == jnp.array(stops, jnp.int32), axis=1)


def slots_of(model: Transformer, width: int, new: int) -> int:
    """Slots of a cache for prompts of this width and so many new tokens: whole eights, as decode kernels copy them."""
    return min(-(-(width + new - 1) // 8) * 8, model.max_length)


@struct.dataclass
class Drawn:
    """The responses of all rows; what lies behind ``length`` means nothing."""

    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    length: Int[Array, "B"]
    finished: Bool[Array, "B"]
    routing: Int[Array, "layers B N k"] | None


def nothing_drawn(rows: int, sampling: Sampling, read: Int[Array, "layers B P k"] | None) -> Drawn:
    """Room for the responses of all rows; ``read`` is the routing of prompts, of which the shape is looked at."""
    routing = None
    if read is not None:
        # The last token of a response is never read, so its experts are never chosen: any will do.
        layers, _, _, k = read.shape
        shape = (layers, rows, sampling.max_new_tokens, k)
        routing = jnp.broadcast_to(jnp.arange(k, dtype=read.dtype), shape)
    return Drawn(
        tokens=jnp.zeros((rows, sampling.max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((rows, sampling.max_new_tokens), jnp.float32),
        length=jnp.zeros((rows,), jnp.int32),
        finished=jnp.zeros((rows,), bool),
        routing=routing,
    )


def rollout_of(
    prompts: PromptBatch,
    drawn: Drawn,
    policy_step: Int[Array, ""],
    pad_id: int,
    sampling: Sampling,
    read: Int[Array, "layers B P k"] | None,
) -> Rollout:
    """Close the gap between each prompt and its response."""
    width, new = prompts.tokens.shape[1], drawn.tokens.shape[1]
    slots = jnp.arange(width + new)[None, :]
    number = slots - prompts.lengths[:, None]
    source = jnp.where(number < 0, slots, jnp.minimum(width + number, width + new - 1))
    tokens = jnp.take_along_axis(jnp.concatenate([prompts.tokens, drawn.tokens], axis=1), source, axis=1)
    mask = jnp.arange(new)[None, :] < drawn.length[:, None]
    routing = None
    if read is not None and drawn.routing is not None:
        parts = jnp.concatenate([read, drawn.routing], axis=2)
        routing = jnp.take_along_axis(parts, source[None, :, :, None], axis=2).swapaxes(0, 1)
    return Rollout(
        tokens=jnp.where(number < drawn.length[:, None], tokens, pad_id).astype(jnp.int32),
        prompt_lengths=prompts.lengths,
        response_mask=mask,
        logprobs=jnp.where(mask, drawn.logprobs, 0.0),
        finished=drawn.finished,
        index=prompts.index,
        policy_step=policy_step,
        routing=routing,
        temperature=1.0 if sampling.greedy else sampling.temperature,
    )
