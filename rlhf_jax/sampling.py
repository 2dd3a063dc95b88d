"""Sample responses to a batch of prompts: one prefill, then a decode loop on the device.

The program knows tokens only; text, rewards and losses live elsewhere. ``rlhf_jax.scoring`` computes the same
log-probabilities from the finished rollout; that both agree is the law which reinforcement learning rests on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer, empty_cache, split_rounds
from rlhf_jax.ops.filters import filter_logits
from rlhf_jax.ops.meshes import constrain_rows
from rlhf_jax.types import Cache, Context, Key, PromptBatch, PyTree, Rollout


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: a response ends here at the latest.
        temperature: logits are divided by it.
        top_k: 0 for all tokens; see ``ops.filters`` for the exact meaning of the filters and their order.
        top_p: 1 for all tokens.
        min_p: 0 for all tokens.
        greedy: take the most probable token (the first of equals) instead. Temperature and filters are then ignored,
            and log-probabilities are those of the unmodified distribution.
        stop_tokens: tokens that end a response as EOS does; like EOS they are part of it.
        samples_per_prompt: responses to each prompt, which share its prefill.
        record_routing: keep the experts that each token was sent to, for ``PolicyOptimization(replay=True)``.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    stop_tokens: tuple[int, ...] = ()
    samples_per_prompt: int = 1
    record_routing: bool = False

    def __post_init__(self):
        self._require("max_new_tokens", self.max_new_tokens >= 1, "an integer of at least 1", integer=True)
        self._require("samples_per_prompt", self.samples_per_prompt >= 1, "an integer of at least 1", integer=True)
        self._require("top_k", self.top_k >= 0, "an integer of at least 0 (0 keeps all tokens)", integer=True)
        self._require("top_p", 0 < self.top_p <= 1, "a number in (0, 1] (1 keeps all tokens)")
        self._require("min_p", 0 <= self.min_p < 1, "a number in [0, 1) (0 keeps all tokens)")
        warm = 0 < self.temperature < math.inf
        self._require("temperature", self.greedy or warm, "a positive number (greedy=True takes the likeliest token)")
        if not isinstance(self.stop_tokens, tuple):
            raise UserError(f"{self.stop_tokens!r}", at="Sampling.stop_tokens", expected="a tuple of token ids")

    def _require(self, name: str, fine: bool, expected: str, integer: bool = False) -> None:
        value = getattr(self, name)
        if not fine or (integer and not isinstance(value, int)):
            raise UserError(f"{value!r}", at=f"Sampling.{name}", expected=expected)

    def filter(
        self, logits: Float[Array, "*rows V"], keep: Int[Array, "*rows"] | None = None
    ) -> Float[Array, "*rows V"]:
        """Logits of the distribution that responses are drawn from; ``keep`` as in ``ops.filters``."""
        if self.greedy:
            return logits
        return filter_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, keep=keep
        )


@struct.dataclass
class _Decoding:
    """What one decode step hands to the next. ``length`` counts the tokens of each response so far."""

    cache: Cache
    step: Int[Array, ""]
    token: Int[Array, "B"]
    finished: Bool[Array, "B"]
    length: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    routing: Int[Array, "layers B N k"] | None


def sample(
    model: Transformer,
    params: PyTree,
    prompts: PromptBatch,
    sampling: Sampling,
    key: Key,
    policy_step: Int[Array, ""] | int = 0,
    *,
    eos_id: int | None,
    pad_id: int,
) -> Rollout:
    """Responses to each prompt, with the log-probabilities that they were drawn with.

    Rows are prompt-major: ``samples_per_prompt`` neighbours answer one prompt. The random key of a token derives from
    ``key``, the prompt's index, the sample's number and the token's number, so a response does not depend on the rest
    of the batch. One program is compiled for each pair of values (model, sampling) and shape of the prompts.

    Args:
        model: the policy.
        params: its parameters.
        prompts: right-padded to a common width, at least one token each.
        sampling: how to draw.
        key: randomness of this call.
        policy_step: noted in the rollout.
        eos_id: the token that ends a response and is part of it; None if only stop tokens and the length do.
        pad_id: fills the rows after the response.
    """
    _check(model, prompts, sampling, eos_id, pad_id)
    stops = sampling.stop_tokens if eos_id is None else (eos_id, *sampling.stop_tokens)
    return _sample(model, params, prompts, sampling, key, jnp.asarray(policy_step, jnp.int32), stops, pad_id)


def _check(model: Transformer, prompts: PromptBatch, sampling: Sampling, eos_id: int | None, pad_id: int) -> None:
    """Refuse what would otherwise be clamped or read out of bounds without a word."""
    width, new = prompts.tokens.shape[1], sampling.max_new_tokens
    if width + new > model.max_length:
        raise UserError(
            f"{width} prompt tokens and {new} new tokens do not fit",
            at="sampling",
            expected=f"at most max_length={model.max_length} together",
            fix="shorten the prompts, lower max_new_tokens, or build the model with a larger max_length",
        )
    named = {"eos_id": eos_id, "pad_id": pad_id} | {f"stop_tokens[{i}]": t for i, t in enumerate(sampling.stop_tokens)}
    for name, token in named.items():
        if token is not None and not 0 <= token < model.vocab_size:
            raise UserError(
                f"{name}={token}", at="sampling", expected=f"a token id below vocab_size={model.vocab_size}",
                fix="use the tokenizer that the model was built for",
            )  # fmt: skip
    if sampling.record_routing and model.routed_layers == 0:
        raise UserError("record_routing=True", at="sampling", expected="a model with mixtures of experts",
                        fix="leave it out: there is no routing to record")  # fmt: skip
    lengths = prompts.lengths
    if isinstance(lengths, np.ndarray) and lengths.size and not 1 <= lengths.min() <= lengths.max() <= width:
        row = int(np.argmax((lengths < 1) | (lengths > width)))
        raise UserError(
            f"prompt {row} has {lengths[row]} tokens", at="sampling", expected=f"1 to {width} (the width of the batch)"
        )


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stops", "pad_id"))
def _sample(
    model: Transformer,
    params: PyTree,
    prompts: PromptBatch,
    sampling: Sampling,
    key: Key,
    policy_step: Int[Array, ""],
    stops: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    copies, params = sampling.samples_per_prompt, split_rounds(model, params)
    logits, cache, read = _prefill(model, params, prompts, sampling)
    logits = jnp.repeat(logits, copies, axis=0)
    read = None if read is None else jnp.repeat(read, copies, axis=1)
    prompts = constrain_rows(jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts))
    rows = prompts.tokens.shape[0]
    keys = jax.vmap(lambda index, number: jax.random.fold_in(jax.random.fold_in(key, index), number))(
        prompts.index, jnp.arange(rows) % copies
    )

    def append(state: _Decoding, logits: Float[Array, "B V"]) -> _Decoding:
        token, logprob = _draw(sampling, logits, jax.vmap(jax.random.fold_in, (0, None))(keys, state.step))
        return replace(
            state,
            step=state.step + 1,
            token=token,
            length=state.length + ~state.finished,
            finished=state.finished | jnp.any(token[:, None] == jnp.array(stops, jnp.int32), axis=1),
            tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, axis=1),
            logprobs=jax.lax.dynamic_update_index_in_dim(state.logprobs, logprob, state.step, axis=1),
        )

    def decode(state: _Decoding) -> _Decoding:
        context = Context((prompts.lengths + state.step - 1)[:, None], (~state.finished).astype(jnp.int32)[:, None])
        logits, cache, aux = _apply(model, params, state.token[:, None], context, state.cache)
        routing = state.routing
        if routing is not None:
            routing = jax.lax.dynamic_update_slice_in_dim(routing, aux["moe/experts"], state.step - 1, axis=2)
        return append(replace(state, cache=cache, routing=routing), logits[:, 0])

    width = prompts.tokens.shape[1]
    # Whole eights of slots, as decode kernels copy them.
    slots = min(-(-(width + sampling.max_new_tokens - 1) // 8) * 8, model.max_length)
    state = append(_start(_resized(model, cache, rows, slots), rows, sampling, read), logits)
    state = jax.lax.while_loop(
        lambda state: (state.step < sampling.max_new_tokens) & ~jnp.all(state.finished), decode, state
    )
    return _rollout(prompts, state, policy_step, pad_id, 1.0 if sampling.greedy else sampling.temperature, read)


def _prefill(
    model: Transformer, params: PyTree, prompts: PromptBatch, sampling: Sampling
) -> tuple[Float[Array, "B V"], Cache, Int[Array, "layers B P k"] | None]:
    """Read each prompt once: the logits after its last token, a cache of just the prompts' width, and the routing."""
    rows, width = prompts.tokens.shape
    context = Context.of_lengths(prompts.lengths, width)
    cache = constrain_rows(empty_cache(model, rows, width))
    hidden, cache, aux = _apply(model, params, prompts.tokens, context, cache, method="hidden")
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = _apply(model, params, last, method="unembed")
    return logits, cache, aux["moe/experts"] if sampling.record_routing else None


def _apply(model: Transformer, params: PyTree, *inputs: Any, method: str = "__call__") -> Any:
    return model.apply({"params": params}, *inputs, method=method)


def _resized(model: Transformer, cache: Cache, rows: int, slots: int) -> Cache:
    """The same cache with each row repeated to make ``rows``, and room for ``slots`` tokens.

    Which axis holds the rows is found by comparing shapes, because mixers lay out their state as they please.
    """
    old_rows, old_slots = cache.positions.shape
    twice = jax.eval_shape(lambda: empty_cache(model, 2 * old_rows, old_slots))

    def fit(old: Array, doubled: jax.ShapeDtypeStruct, empty: Array) -> Array:
        for axis, (before, after) in enumerate(zip(old.shape, doubled.shape, strict=True)):
            if before != after:
                old = jnp.repeat(old, rows // old_rows, axis=axis)
        return old if old.shape == empty.shape else jax.lax.dynamic_update_slice(empty, old, (0,) * old.ndim)

    return constrain_rows(jax.tree.map(fit, cache, twice, empty_cache(model, rows, slots)))


def _start(cache: Cache, rows: int, sampling: Sampling, read: Int[Array, "layers B P k"] | None) -> _Decoding:
    routing = None
    if read is not None:
        # The last token of a response is never read, so its experts are never chosen: any will do.
        layers, _, _, k = read.shape
        shape = (layers, rows, sampling.max_new_tokens, k)
        routing = jnp.broadcast_to(jnp.arange(k, dtype=read.dtype), shape)
    zeros = jnp.zeros((rows,), jnp.int32)
    return _Decoding(
        cache=cache,
        step=jnp.zeros((), jnp.int32),
        token=zeros,
        finished=jnp.zeros((rows,), bool),
        length=zeros,
        tokens=jnp.zeros((rows, sampling.max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((rows, sampling.max_new_tokens), jnp.float32),
        routing=routing,
    )


def _draw(sampling: Sampling, logits: Float[Array, "B V"], keys: Key) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
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
        block = _invert(by_block, uniform[:, 0])
        inside = jnp.cumsum(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], axis=1)
        token = block * 128 + _invert(inside, uniform[:, 1])
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
    return token.astype(jnp.int32), (chosen - top)[:, 0] - jnp.log(by_block[:, -1])


def _invert(cumulative: Float[Array, "B M"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first entry that exceeds ``uniform`` times the total; never one without weight, as ``uniform < 1``."""
    return jnp.sum(cumulative <= (uniform * cumulative[:, -1])[:, None], axis=1)


def _rollout(
    prompts: PromptBatch,
    state: _Decoding,
    policy_step: Int[Array, ""],
    pad_id: int,
    temperature: float,
    read: Int[Array, "layers B P k"] | None,
) -> Rollout:
    """Close the gap between each prompt and its response."""
    width, new = prompts.tokens.shape[1], state.tokens.shape[1]
    slots = jnp.arange(width + new)[None, :]
    number = slots - prompts.lengths[:, None]
    source = jnp.where(number < 0, slots, jnp.minimum(width + number, width + new - 1))
    tokens = jnp.take_along_axis(jnp.concatenate([prompts.tokens, state.tokens], axis=1), source, axis=1)
    mask = jnp.arange(new)[None, :] < state.length[:, None]
    routing = None
    if read is not None and state.routing is not None:
        parts = jnp.concatenate([read, state.routing], axis=2)
        routing = jnp.take_along_axis(parts, source[None, :, :, None], axis=2).swapaxes(0, 1)
    return Rollout(
        tokens=jnp.where(number < state.length[:, None], tokens, pad_id).astype(jnp.int32),
        prompt_lengths=prompts.lengths,
        response_mask=mask,
        logprobs=jnp.where(mask, state.logprobs, 0.0),
        finished=state.finished,
        index=prompts.index,
        policy_step=policy_step,
        routing=routing,
        temperature=temperature,
    )
