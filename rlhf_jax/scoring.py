"""Log-probabilities, values and scores of finished sequences.

The counterpart of ``rlhf_jax.sampling``: what the sampler drew token by token is scored here in one forward pass, under
the same temperature and filters. Only the states of the response are unembedded; prompts cost no vocabulary product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.models import Aux, ScalarModel, Transformer
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.sampling import Sampling
from rlhf_jax.sampling.pieces import read, rows_of, with_room
from rlhf_jax.types import Cache, Context, Key, PyTree, Rollout

LOGITS_AT_A_TIME = 2**26
"""Elements of the largest logits array (256 MiB in fp32) unless the caller chooses a chunk."""


@struct.dataclass
class ReadPrompts:
    """Prompts that were read once, for any number of responses to follow: see ``read_prompts``.

    ``last`` is the state that chooses the first token of a response, ``cache`` what later tokens look back at.
    """

    last: Float[Array, "B E"]
    cache: Cache

    def rows(self, model: Transformer, chosen: Int[Array, "R"]) -> ReadPrompts:
        """Those of these rows alone; one may be there several times."""
        return ReadPrompts(self.last[chosen], rows_of(model, self.cache, chosen))


class ScoredResponses(NamedTuple):
    """What a forward pass says about responses: as ``response_logprobs``, and the layers' reports."""

    logprobs: Float[Array, "B N"]
    entropy: Float[Array, "B N"] | None
    aux: Aux


def score_responses(
    model: Transformer,
    params: PyTree,
    rollout: Rollout,
    sampling: Sampling,
    *,
    entropy: bool = True,
    chunk: int | None = None,
    dropout_key: Key | None = None,
    replay: bool = False,
    prompts: ReadPrompts | None = None,
) -> ScoredResponses:
    """``response_logprobs`` with what the layers report.

    Args:
        replay: send each token to the experts that the rollout recorded, instead of choosing them again.
        prompts: of the rollout's rows, read before by the same model and parameters; only responses are then read, and
            layers report of them alone. None reads both. Without dropout and replay.

    The other arguments are those of ``response_logprobs``.
    """
    if prompts is None:
        hidden, aux = response_states(model, params, rollout, dropout_key=dropout_key, replay=replay)
    else:
        assert dropout_key is None and not replay
        hidden, aux = states_behind(model, params, rollout, prompts)
    logprobs, entropies = token_logprobs(
        hidden,
        lambda states: _apply(model, params, states, method="unembed"),
        response_tokens(rollout),
        chunk=max(1, LOGITS_AT_A_TIME // model.vocab_size) if chunk is None else chunk,
        entropy=entropy,
        transform=sampling.filter,
    )
    mask = rollout.response_mask
    entropies = None if entropies is None else jnp.where(mask, entropies, 0.0)
    return ScoredResponses(jnp.where(mask, logprobs, 0.0), entropies, aux)


def response_states(
    model: Transformer, params: PyTree, rollout: Rollout, *, dropout_key: Key | None = None, replay: bool = False
) -> tuple[Float[Array, "B N E"], Aux]:
    """The hidden state that chooses each response token, and the layers' reports; arguments as above."""
    routing = recorded_routing(rollout) if replay else None
    hidden, _, aux = _apply(
        model, params, rollout.tokens, rollout.context, dropout_key=dropout_key, method="hidden", routing=routing
    )
    return jnp.take_along_axis(hidden, (_response_slots(rollout) - 1)[:, :, None], axis=1), aux


def read_prompts(
    model: Transformer, params: PyTree, tokens: Int[Array, "B P"], lengths: Int[Array, "B"]
) -> ReadPrompts:
    """Read prompts, so that several responses to one need not read it again each. Differentiable in ``params``.

    Args:
        model: the policy, or the reference policy.
        params: its parameters.
        tokens: prompts, right-padded; P is the width of a rollout's rows less that of its responses.
        lengths: tokens of each prompt.
    """
    last, cache, _ = read(model, params, tokens, lengths)
    return ReadPrompts(last, cache)


def states_behind(
    model: Transformer, params: PyTree, rollout: Rollout, prompts: ReadPrompts
) -> tuple[Float[Array, "B N E"], Aux]:
    """As ``response_states``, from prompts that were read before (full = prefill, then decode)."""
    tokens = response_tokens(rollout)[:, :-1]
    if tokens.shape[1] == 0:
        return prompts.last[:, None], {}
    number = jnp.arange(tokens.shape[1])
    segments = (number < rollout.response_lengths[:, None]).astype(jnp.int32)
    context = Context((rollout.prompt_lengths[:, None] + number) * segments, segments)
    cache = with_room(model, prompts.cache, prompts.cache.positions.shape[1] + tokens.shape[1])
    hidden, _, aux = _apply(model, params, tokens, context, cache, method="hidden")
    return jnp.concatenate([prompts.last[:, None], hidden], axis=1), aux


def response_tokens(rollout: Rollout) -> Int[Array, "B N"]:
    """The tokens of each response; behind its end any."""
    return jnp.take_along_axis(rollout.tokens, _response_slots(rollout), axis=1)


def response_logprobs(
    model: Transformer,
    params: PyTree,
    rollout: Rollout,
    sampling: Sampling,
    *,
    entropy: bool = True,
    chunk: int | None = None,
    dropout_key: Key | None = None,
    prompts: ReadPrompts | None = None,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
    """Log-probability of each response token under ``sampling``'s distribution, and the entropy of that in nats.

    Both are 0 outside ``rollout.response_mask``. A token that has left the support of top-k, top-p or min-p since it
    was sampled counts as part of it. With filters on, a probability within rounding of a cut-off may fall on either
    side in sampler and scorer, which then normalise by slightly different supports.

    Args:
        model: the policy, or the reference policy.
        params: its parameters; differentiable.
        rollout: what was sampled.
        sampling: how; temperature and filters are read.
        entropy: False leaves it out, and returns None in its place.
        chunk: positions to unembed at a time, see ``ops.logprobs``; None for as many as ``LOGITS_AT_A_TIME`` allows.
        dropout_key: switches dropout on.
        prompts: see ``score_responses``.
    """
    scored = score_responses(
        model, params, rollout, sampling, entropy=entropy, chunk=chunk, dropout_key=dropout_key, prompts=prompts
    )
    return scored.logprobs, scored.entropy


def response_values(
    model: ScalarModel, params: PyTree, rollout: Rollout, *, dropout_key: Key | None = None
) -> Float[Array, "B N"]:
    """The value of the state before each response token (read at the token before it); 0 outside the response."""
    return report_values(model, params, rollout, dropout_key=dropout_key)[0]


def report_values(
    model: ScalarModel, params: PyTree, rollout: Rollout, *, dropout_key: Key | None = None
) -> tuple[Float[Array, "B N"], Aux]:
    """``response_values``, and what the layers report."""
    values, aux = _apply(model, params, rollout.tokens, rollout.context, dropout_key=dropout_key, method="report")
    before = jnp.take_along_axis(values, _response_slots(rollout) - 1, axis=1)
    return jnp.where(rollout.response_mask, before, 0.0), aux


def sequence_scores(
    model: ScalarModel,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    dropout_key: Key | None = None,
) -> Float[Array, "B"]:
    """One scalar for each right-padded sequence, read at its last token."""
    values = _apply(model, params, tokens, Context.of_lengths(lengths, tokens.shape[1]), dropout_key=dropout_key)
    return jnp.take_along_axis(values, (lengths - 1)[:, None], axis=1)[:, 0]


def token_scores(model: ScalarModel, params: PyTree, rollout: Rollout) -> Float[Array, "B N"]:
    """The scalar read at each response token itself; 0 outside the response."""
    values = _apply(model, params, rollout.tokens, rollout.context)
    return jnp.where(rollout.response_mask, jnp.take_along_axis(values, _response_slots(rollout), axis=1), 0.0)


class Continuations(NamedTuple):
    """What a language model says of sequences behind their prompts."""

    logprobs: Float[Array, "B"]
    """Summed over the tokens behind the prompt."""
    tokens: Int[Array, "B"]
    """How many these are."""
    aux: Aux


def continuation_logprobs(
    model: Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    prompt_lengths: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    chunk: int | None = None,
    dropout_key: Key | None = None,
) -> Continuations:
    """The log-probability in nats of what follows each prompt, its EOS included, at temperature 1.

    Args:
        model: a language model.
        params: its parameters; differentiable.
        tokens: prompt, then what follows, then padding.
        prompt_lengths: tokens of the prompt. Where it is 0, the first token is given nevertheless.
        lengths: tokens that are no padding; 0 for an empty row, which counts 0 tokens.
        chunk: positions to unembed at a time, see ``ops.logprobs``; None for as many as ``LOGITS_AT_A_TIME`` allows.
        dropout_key: switches dropout on.
    """
    context = Context.of_lengths(lengths, tokens.shape[1])
    hidden, _, aux = _apply(model, params, tokens, context, dropout_key=dropout_key, method="hidden")
    # Each state predicts the token behind it; the last state meets the first token, which is never counted.
    logprobs, _ = token_logprobs(
        hidden,
        lambda states: _apply(model, params, states, method="unembed"),
        jnp.roll(tokens, -1, axis=1),
        chunk=max(1, LOGITS_AT_A_TIME // model.vocab_size) if chunk is None else chunk,
        entropy=False,
    )
    slots = jnp.arange(tokens.shape[1])
    behind = (slots >= jnp.maximum(prompt_lengths, 1)[:, None]) & (slots < lengths[:, None])
    summed = jnp.sum(jnp.where(jnp.roll(behind, -1, axis=1), logprobs, 0.0), axis=1)
    return Continuations(summed, jnp.sum(behind, axis=1), aux)


def _apply(
    model: Any,
    params: PyTree,
    *inputs: Any,
    method: str = "__call__",
    dropout_key: Key | None = None,
    routing: Int[Array, "layers B T k"] | None = None,
) -> Any:
    named: dict[str, Any] = {} if routing is None else {"routing": routing}
    if dropout_key is not None:
        named |= {"deterministic": False, "rngs": {"dropout": dropout_key}}
    return model.apply({"params": params}, *inputs, method=method, **named)


def recorded_routing(rollout: Rollout) -> Int[Array, "layers B T k"]:
    """The experts that a rollout's tokens were sent to, as models take them."""
    if rollout.routing is None:
        raise ValueError("there is no routing to replay in this rollout; sample with Sampling(record_routing=True)")
    return jnp.swapaxes(rollout.routing, 0, 1)


def _response_slots(rollout: Rollout) -> Int[Array, "B N"]:
    """Where the response's tokens stand, held inside the row for those that do not exist."""
    slots = rollout.prompt_lengths[:, None] + jnp.arange(rollout.response_mask.shape[1])
    return jnp.minimum(slots, rollout.tokens.shape[1] - 1)
