"""Some rows decode at a time; a row that is finished hands its place to the next response in the queue.

All of it is one program with static shapes: prompts are read a chunk at a time, their responses are put into free
places a few at a time, and between that a loop decodes until enough places are free again. Rows stand at different
tokens but enter each new one into the same slot: the slots behind the prompt are a ring as long as a response can be,
so that a row never meets itself, and what an earlier tenant left has segment 0. Masks look at positions and segments
only, so attention, and every state that goes by positions or counts, needs nothing further. When the queue is empty,
the rows that still decode move together into fewer places.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from rlhf_jax.models import Transformer, empty_cache, split_rounds
from rlhf_jax.ops.meshes import active_mesh, constrain_rows
from rlhf_jax.sampling.pieces import (
    Drawn,
    apply,
    by_row,
    draw,
    ends,
    nothing_drawn,
    prefill,
    rollout_of,
    row_keys,
    rows_of,
    slots_of,
    token_keys,
    with_room,
)
from rlhf_jax.sampling.settings import Sampling
from rlhf_jax.types import Cache, Context, Key, PromptBatch, PyTree, Rollout

AT_ONCE = 8
"""One in so many places is free before new responses move in: waiting costs decoding, moving in costs copying."""

FEWEST = 4
"""Places that go on together at the end, when the queue is empty: fewer are not faster."""


@struct.dataclass
class _Places:
    """The rows that decode, and what was drawn for all responses.

    ``row`` is the response of each place, ``number`` the tokens that it has so far, ``token`` the last of them, ``at``
    the position of the next one; ``live`` places decode. ``clock`` counts decode steps, ``queued`` is the first
    response that has no place yet.
    """

    cache: Cache
    row: Int[Array, "P"]
    token: Int[Array, "P"]
    number: Int[Array, "P"]
    at: Int[Array, "P"]
    live: Bool[Array, "P"]
    keys: Key
    clock: Int[Array, ""]
    queued: Int[Array, ""]
    drawn: Drawn


def sample_in_slots(
    model: Transformer,
    params: PyTree,
    prompts: PromptBatch,
    sampling: Sampling,
    key: Key,
    policy_step: Int[Array, ""],
    stops: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """As ``sampling.sample``, with ``sampling.slots`` rows in the decode loop."""
    copies, params = sampling.samples_per_prompt, split_rounds(model, params)
    count, width = prompts.tokens.shape
    rows, limit = count * copies, sampling.max_new_tokens
    assert sampling.slots is not None
    places = min(sampling.slots, rows)
    few = max(1, places // AT_ONCE)
    chunk = min(places, count)
    slots = slots_of(model, width, limit)
    ring = max(slots - width, 1)
    # Prompts that only fill the last chunk: one token each, never answered.
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, -count % chunk)] + [(0, 0)] * (x.ndim - 1)), prompts)
    padded = padded.replace(lengths=jnp.maximum(padded.lengths, 1))

    def note(state: _Places, token, logprob, chosen: Bool[Array, "P"]) -> _Places:
        """One more token of the chosen places."""
        row = jnp.where(chosen, state.row, rows)
        ended, number = ends(token, stops), state.number + chosen
        drawn = replace(
            state.drawn,
            tokens=state.drawn.tokens.at[row, state.number].set(token, mode="drop"),
            logprobs=state.drawn.logprobs.at[row, state.number].set(logprob, mode="drop"),
            length=state.drawn.length.at[row].set(number, mode="drop"),
            finished=state.drawn.finished.at[row].set(ended, mode="drop"),
        )
        live = jnp.where(chosen, ~ended & (number < limit), state.live)
        return replace(state, token=jnp.where(chosen, token, state.token), number=number, live=live, drawn=drawn)

    def decode(state: _Places) -> _Places:
        context = Context(state.at[:, None], state.live.astype(jnp.int32)[:, None])
        cache = replace(state.cache, next_slot=width + state.clock % ring)
        logits, cache, aux = apply(model, params, state.token[:, None], context, cache)
        drawn = state.drawn
        if drawn.routing is not None:
            row = jnp.where(state.live, state.row, rows)
            experts = aux["moe/experts"][:, :, 0]
            drawn = replace(drawn, routing=drawn.routing.at[:, row, state.number - 1].set(experts, mode="drop"))
        state = replace(state, cache=cache, clock=state.clock + 1, at=state.at + state.live, drawn=drawn)
        token, logprob = draw(sampling, logits[:, 0], token_keys(state.keys, state.number))
        return note(state, token, logprob, state.live)

    def read_chunk(state: _Places, first: Int[Array, ""]) -> tuple[_Places, Int[Array, "layers C W k"] | None]:
        """Read a chunk of prompts, and decode until all their responses have found a place."""
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, chunk), padded)
        logits, read_cache, read = prefill(model, params, constrain_rows(own), sampling)
        end = jnp.minimum((first + chunk) * copies, rows)

        def move_in(state: _Places) -> _Places:
            free = jnp.argsort(state.live, stable=True)[:few].astype(jnp.int32)
            row = state.queued + jnp.arange(few, dtype=jnp.int32)
            fits = row < end
            prompt = jnp.minimum(row // copies - first, chunk - 1)
            place = jnp.where(fits, free, places)
            cache = _put(model, state.cache, read_cache, prompt, place)

            def enter(old, new):
                return old.at[place].set(new, mode="drop")

            keys = row_keys(key, own.index[prompt], row % copies)
            bits = enter(jax.random.key_data(state.keys), jax.random.key_data(keys))
            state = replace(
                state,
                cache=cache,
                row=enter(state.row, row),
                number=enter(state.number, 0),
                at=enter(state.at, own.lengths[prompt]),
                keys=jax.random.wrap_key_data(bits, impl=jax.random.key_impl(key)),
                queued=jnp.minimum(state.queued + few, end),
            )
            token, logprob = draw(sampling, logits[prompt], token_keys(keys, jnp.zeros((few,), jnp.int32)))
            chosen = jnp.zeros((places,), bool).at[place].set(True, mode="drop")
            token = jnp.zeros((places,), jnp.int32).at[place].set(token, mode="drop")
            logprob = jnp.zeros((places,), jnp.float32).at[place].set(logprob, mode="drop")
            return note(state, token, logprob, chosen)

        def until_free(state: _Places) -> _Places:
            return jax.lax.while_loop(lambda s: jnp.any(s.live) & (jnp.sum(~s.live) < few), decode, state)

        state = jax.lax.while_loop(lambda s: s.queued < end, lambda s: until_free(move_in(s)), state)
        return state, read

    zeros = jnp.zeros((places,), jnp.int32)
    state = _Places(
        cache=constrain_rows(empty_cache(model, places, slots)),
        row=zeros,
        token=zeros,
        number=zeros,
        at=zeros,
        live=jnp.zeros((places,), bool),
        keys=row_keys(key, zeros, zeros),
        clock=jnp.zeros((), jnp.int32),
        queued=jnp.zeros((), jnp.int32),
        drawn=nothing_drawn(rows, sampling, _routing_shape(model, params, padded, sampling, chunk)),
    )
    state, read = jax.lax.scan(read_chunk, state, jnp.arange(0, padded.lengths.shape[0], chunk))
    for size in _fewer(places):
        state = jax.lax.while_loop(lambda s, size=size: jnp.sum(s.live) > size, decode, state)
        state = _moved_together(model, state, size)
    state = jax.lax.while_loop(lambda s: jnp.any(s.live), decode, state)
    if read is not None:
        read = jnp.moveaxis(read, 0, 1).reshape(read.shape[1], -1, *read.shape[3:])[:, :count]
        read = jnp.repeat(read, copies, axis=1)
    prompts = constrain_rows(jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts))
    return rollout_of(prompts, state.drawn, policy_step, pad_id, sampling, read)


def _routing_shape(model: Transformer, params: PyTree, prompts: PromptBatch, sampling: Sampling, chunk: int):
    """The routing of a chunk of prompts as a shape; None where it is not recorded."""
    if not sampling.record_routing:
        return None
    own = jax.tree.map(lambda x: x[:chunk], prompts)
    return jax.eval_shape(lambda params, own: prefill(model, params, own, sampling)[2], params, own)


def _put(model: Transformer, cache: Cache, read: Cache, chosen: Int[Array, " few"], place: Int[Array, " few"]) -> Cache:
    """The cache with some rows of ``read`` in the given places; everything that was there is gone."""

    def put(axis: int, old: Array, new: Array) -> Array:
        return old.at[(slice(None),) * axis + (place,)].set(new.astype(old.dtype), mode="drop")

    return by_row(model, put, cache, with_room(model, rows_of(model, read, chosen), cache.positions.shape[1]))


def _fewer(places: int) -> list[int]:
    """How many places are left over, time after time, while the last responses are drawn; on a mesh all of them."""
    if active_mesh() is not None or places < 4 * FEWEST:
        return []
    return [places // 4, *_fewer(places // 4)]


def _moved_together(model: Transformer, state: _Places, size: int) -> _Places:
    """The live places, at most ``size``, and no others."""
    kept = jnp.argsort(~state.live, stable=True)[:size]
    places = ("row", "token", "number", "at", "live", "keys")
    return replace(
        state,
        cache=rows_of(model, state.cache, kept),
        **{name: getattr(state, name)[kept] for name in places},
    )
