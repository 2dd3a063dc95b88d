"""All rows decode together, until the last of them is finished.

With ``Sampling.regroup`` the cache is no longer than what was drawn so far needs, and rows that are finished leave:
at each of these points the cache grows, and rows that still decode move together into the fewest places of a ladder
that hold them. All of it is one program; each point has a loop for each rung.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.models import Transformer, split_rounds
from rlhf_jax.ops.meshes import active_mesh, constrain_rows
from rlhf_jax.sampling.pieces import (
    Drawn,
    apply,
    by_row,
    draw,
    ends,
    nothing_drawn,
    prefill,
    resized,
    rollout_of,
    row_keys,
    rows_of,
    slots_of,
    token_keys,
    with_room,
)
from rlhf_jax.sampling.settings import Sampling
from rlhf_jax.types import Cache, Context, Key, PromptBatch, PyTree, Rollout

RUNGS, FEWEST = 4, 4
"""How often the number of places is halved at most, and the fewest places: less is hardly faster."""


@struct.dataclass
class _Decoding:
    """What one decode step hands to the next; ``drawn.length`` counts the tokens of each response so far."""

    cache: Cache
    step: Int[Array, ""]
    token: Int[Array, "B"]
    lengths: Int[Array, "B"]
    """Of the prompts."""
    keys: Key
    drawn: Drawn


def sample_together(
    model: Transformer,
    params: PyTree,
    prompts: PromptBatch,
    sampling: Sampling,
    key: Key,
    policy_step: Int[Array, ""],
    stops: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """One prefill, then a decode loop on the device; as ``sampling.sample``."""
    copies, params = sampling.samples_per_prompt, split_rounds(model, params)
    logits, cache, read = prefill(model, params, prompts, sampling)
    logits = jnp.repeat(logits, copies, axis=0)
    read = None if read is None else jnp.repeat(read, copies, axis=1)
    prompts = constrain_rows(jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts))
    rows, width = prompts.tokens.shape
    keys = row_keys(key, prompts.index, jnp.arange(rows) % copies)

    def append(state: _Decoding, logits: Float[Array, "B V"]) -> _Decoding:
        token, logprob = draw(sampling, logits, token_keys(state.keys, state.step))
        drawn = state.drawn
        drawn = replace(
            drawn,
            length=drawn.length + ~drawn.finished,
            finished=drawn.finished | ends(token, stops),
            tokens=jax.lax.dynamic_update_index_in_dim(drawn.tokens, token, state.step, axis=1),
            logprobs=jax.lax.dynamic_update_index_in_dim(drawn.logprobs, logprob, state.step, axis=1),
        )
        return replace(state, step=state.step + 1, token=token, drawn=drawn)

    def decode(state: _Decoding) -> _Decoding:
        drawn = state.drawn
        context = Context((state.lengths + state.step - 1)[:, None], (~drawn.finished).astype(jnp.int32)[:, None])
        logits, cache, aux = apply(model, params, state.token[:, None], context, state.cache)
        if drawn.routing is not None:
            routing = jax.lax.dynamic_update_slice_in_dim(drawn.routing, aux["moe/experts"], state.step - 1, axis=2)
            drawn = replace(drawn, routing=routing)
        return append(replace(state, cache=cache, drawn=drawn), logits[:, 0])

    def until(limit: int) -> Callable[[_Decoding], _Decoding]:
        """Decode until each row is finished or has so many tokens."""

        def going(state: _Decoding) -> Array:
            return (state.step < limit) & ~jnp.all(state.drawn.finished)

        return lambda state: jax.lax.while_loop(going, decode, state)

    points = (*(n for n in sampling.regroup if n < sampling.max_new_tokens), sampling.max_new_tokens)
    cache = resized(model, cache, rows, slots_of(model, width, points[0]))
    start = jnp.zeros((), jnp.int32), jnp.zeros((rows,), jnp.int32)
    state = _Decoding(cache, *start, prompts.lengths, keys, nothing_drawn(rows, sampling, read))
    state = until(points[0])(append(state, logits))
    for limit in points[1:]:
        grown = with_room(model, state.cache, slots_of(model, width, limit))
        state = _in_few_places(model, replace(state, cache=constrain_rows(grown)), until(limit))
    return rollout_of(prompts, state.drawn, policy_step, pad_id, sampling, read)


def _in_few_places(model: Transformer, state: _Decoding, run: Callable[[_Decoding], _Decoding]) -> _Decoding:
    """``run`` on the rows that still decode, and few others; on a mesh, whose devices keep their rows, on all."""
    rows, live = state.token.shape[0], ~state.drawn.finished
    rungs = [rows]
    while active_mesh() is None and len(rungs) <= RUNGS and rungs[-1] // 2 >= FEWEST:
        rungs.append(rungs[-1] // 2)
    order = jnp.argsort(~live, stable=True)

    def on(places: int) -> Callable[[_Decoding], _Decoding]:
        chosen = order[:places]

        def moved(state: _Decoding) -> _Decoding:
            ended = run(_rows(model, state, chosen))

            def back(axis: int, old: Array, new: Array) -> Array:
                return old.at[(slice(None),) * axis + (chosen,)].set(new)

            cache = replace(by_row(model, back, state.cache, ended.cache), next_slot=ended.cache.next_slot)
            drawn = jax.tree.map(lambda old, new: old.at[chosen].set(new), *map(_plain, (state.drawn, ended.drawn)))
            routing = state.drawn.routing
            if routing is not None:
                routing = routing.at[:, chosen].set(ended.drawn.routing)
            token = state.token.at[chosen].set(ended.token)
            return replace(state, cache=cache, step=ended.step, token=token, drawn=replace(drawn, routing=routing))

        return run if places == rows else moved

    enough = sum((live.sum() <= places).astype(jnp.int32) for places in rungs[1:])
    return jax.lax.switch(enough, [on(places) for places in rungs], state)


def _rows(model: Transformer, state: _Decoding, chosen: Int[Array, "P"]) -> _Decoding:
    """These rows alone."""
    drawn, routing = jax.tree.map(lambda x: x[chosen], _plain(state.drawn)), state.drawn.routing
    return replace(
        state,
        cache=rows_of(model, state.cache, chosen),
        token=state.token[chosen],
        lengths=state.lengths[chosen],
        keys=state.keys[chosen],
        drawn=replace(drawn, routing=None if routing is None else routing[:, chosen]),
    )


def _plain(drawn: Drawn) -> Drawn:
    """Without routing, whose rows are not in front."""
    return replace(drawn, routing=None)
