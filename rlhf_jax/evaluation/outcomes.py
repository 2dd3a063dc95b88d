"""Policies whose responses can be listed: the exact probability of each, and the KL of draws from it.

For experiments in a few tokens, where what is usually estimated can be known. Nothing here samples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.special import digamma

from rlhf_jax.models import Transformer
from rlhf_jax.sampling import Sampling
from rlhf_jax.scoring import response_logprobs
from rlhf_jax.types import PyTree, Rollout

MOST = 200_000
_ROWS = 4096


@dataclass(frozen=True)
class Outcomes:
    """Every response to one prompt, and how likely it is; the probabilities add up to one."""

    tokens: tuple[tuple[int, ...], ...]
    probs: Float[np.ndarray, " M"]

    def by_text(self, decode: Callable[[Sequence[int]], str]) -> dict[str, float]:
        """The probability of each text; responses that read the same (special tokens aside) are one."""
        found: dict[str, float] = {}
        for tokens, prob in zip(self.tokens, self.probs, strict=True):
            text = decode(tokens)
            found[text] = found.get(text, 0.0) + float(prob)
        return found


def every_response(
    model: Transformer, params: PyTree, prompt: Sequence[int], length: int, eos_id: int | None, temperature: float = 1.0
) -> Outcomes:
    """All responses of at most ``length`` tokens, with the probabilities that the sampler draws them with.

    A response ends behind its EOS, or at ``length``; None lets all be of ``length`` tokens.

    Raises:
        ValueError: if there are more than ``MOST``.
    """
    rest = [token for token in range(model.vocab_size) if token != eos_id]
    count = sum(len(rest) ** said for said in (range(length + 1) if eos_id is not None else (length,)))
    if count > MOST:
        raise ValueError(f"{count} responses of {length} tokens out of {model.vocab_size}; expected at most {MOST}: "
                         "shorten them, or estimate from samples")  # fmt: skip
    tokens = list(itertools.product(rest, repeat=length))
    if eos_id is not None:
        tokens += [(*said, eos_id) for before in range(length) for said in itertools.product(rest, repeat=before)]
    sampling = Sampling(max_new_tokens=length, temperature=temperature)
    parts = [tokens[start : start + _ROWS] for start in range(0, len(tokens), _ROWS)]
    logprobs = [np.asarray(_summed(model, params, _rollout(prompt, part, length), sampling)) for part in parts]
    probs = np.exp(np.concatenate(logprobs)[: len(tokens)].astype(np.float64))
    return Outcomes(tuple(tokens), probs / probs.sum())


def kl_of_draws(counts: Int[np.ndarray, " M"], probs: Float[np.ndarray, " M"]) -> float:
    r"""``KL(p || probs)`` in nats from how often each outcome was drawn from ``p``; nothing else is known of ``p``.

    .. math:: \frac1N \sum_i c_i \left(G(c_i) - \log N - \log q_i\right)

    Frequencies in the place of ``p`` would give too much, by about outcomes over twice the draws. ``G`` corrects that
    (Grassberger 2003, https://arxiv.org/abs/physics/0307138). Where most outcomes are drawn less than once the estimate
    is still too large.
    """
    counts, probs = np.asarray(counts, np.float64), np.asarray(probs, np.float64)
    if counts.ndim != 1 or counts.shape != probs.shape or counts.sum() < 1:
        raise ValueError(f"counts {counts.shape} and probabilities {probs.shape}; expected two equal vectors, a draw")
    drawn = counts > 0
    if np.any(probs[drawn] <= 0):
        raise ValueError("an outcome of probability 0 was drawn; expected the probabilities of all that can be")
    counts, probs = counts[drawn], probs[drawn]
    sign = np.where(counts % 2 == 0, 1.0, -1.0)
    log_count = digamma(counts) + sign / 2 * (digamma((counts + 1) / 2) - digamma(counts / 2))
    return float(np.sum(counts * (log_count - np.log(counts.sum()) - np.log(probs))) / counts.sum())


@functools.partial(jax.jit, static_argnums=(0, 3))
def _summed(model: Transformer, params: PyTree, rollout: Rollout, sampling: Sampling) -> jax.Array:
    return response_logprobs(model, params, rollout, sampling, entropy=False)[0].sum(axis=1)


def _rollout(prompt: Sequence[int], responses: Sequence[tuple[int, ...]], length: int) -> Rollout:
    """Responses to one prompt as if they had been sampled, filled up to ``_ROWS`` rows so that all have one shape."""
    rows = np.zeros((_ROWS, len(prompt) + length), np.int32)
    rows[:, : len(prompt)] = prompt
    said = np.ones(_ROWS, np.int32)
    for row, response in enumerate(responses):
        rows[row, len(prompt) : len(prompt) + len(response)] = response
        said[row] = len(response)
    mask = np.arange(length) < said[:, None]
    made: dict[str, Any] = {
        "tokens": rows,
        "prompt_lengths": np.full(_ROWS, len(prompt), np.int32),
        "response_mask": mask,
        "logprobs": np.zeros(mask.shape, np.float32),
        "finished": np.ones(_ROWS, bool),
        "index": np.zeros(_ROWS, np.int32),
        "policy_step": np.zeros((), np.int32),
    }
    return Rollout(**made)
