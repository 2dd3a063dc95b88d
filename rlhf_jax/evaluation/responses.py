"""What responses are like, whatever they are worth: length, repetition, entropy, distance from the reference.

Arrays are aligned to the response (``[B, N]``); ``groups`` says which prompt each row answers, and rows of one prompt
stay together when intervals are drawn. Without it every row is its own group.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.evaluation import estimates
from rlhf_jax.evaluation.estimates import Estimate
from rlhf_jax.types import Rollout

Groups = Int[np.ndarray, " B"] | None


def describe(
    rollout: Rollout,
    *,
    ref_logprobs: Float[np.ndarray, "B N"] | None = None,
    entropies: Float[np.ndarray, "B N"] | None = None,
) -> dict[str, Estimate]:
    """All of this module's numbers for one rollout, by name; samples of one prompt stay together.

    KL and entropy are left out where their arrays are not given. KL reads ``rollout.logprobs``, so it is the policy's
    own distance only for rollouts sampled at temperature 1 without filters.
    """
    tokens, mask = response_tokens(rollout), np.asarray(rollout.response_mask)
    logprobs, groups = np.asarray(rollout.logprobs), np.asarray(rollout.index)
    found = {
        "length": length(mask, groups),
        "finished": finished(np.asarray(rollout.finished), groups),
        "repetition": repetition(tokens, mask, groups=groups),
    }
    if entropies is not None:
        found["entropy"] = entropy(entropies, mask, groups)
    if ref_logprobs is not None:
        found["kl_per_sequence"] = kl_per_sequence(logprobs, ref_logprobs, mask, groups)
        found["kl_per_token"] = kl_per_token(logprobs, ref_logprobs, mask, groups)
    return found


def response_tokens(rollout: Rollout) -> Int[np.ndarray, "B N"]:
    """The response's tokens, aligned to it; what lies outside ``response_mask`` means nothing."""
    tokens, width = np.asarray(rollout.tokens), rollout.response_mask.shape[1]
    slots = np.asarray(rollout.prompt_lengths)[:, None] + np.arange(width)
    return np.take_along_axis(tokens, np.minimum(slots, tokens.shape[1] - 1), axis=1)


def length(mask: Bool[np.ndarray, "B N"], groups: Groups = None) -> Estimate:
    """Tokens of a response, end of sequence included."""
    return _ratio(np.asarray(mask, dtype=float).sum(axis=1), None, groups)


def finished(ended: Bool[np.ndarray, " B"], groups: Groups = None) -> Estimate:
    """Share of responses that ended by themselves."""
    return _ratio(np.asarray(ended, dtype=float), None, groups)


def entropy(entropies: Float[np.ndarray, "B N"], mask: Bool[np.ndarray, "B N"], groups: Groups = None) -> Estimate:
    """Nats of the policy's choice of a token, over all tokens."""
    return _per_token(entropies, mask, groups)


def kl_per_sequence(
    logprobs: Float[np.ndarray, "B N"],
    ref_logprobs: Float[np.ndarray, "B N"],
    mask: Bool[np.ndarray, "B N"],
    groups: Groups = None,
) -> Estimate:
    """KL(policy || reference) in nats a response: the mean of the summed log ratio of sampled tokens (k1, unbiased).

    Unbiased for responses that were sampled from the policy at temperature 1 without truncation.
    """
    ratio = np.where(mask, np.asarray(logprobs, dtype=float) - np.asarray(ref_logprobs, dtype=float), 0.0)
    return _ratio(ratio.sum(axis=1), None, groups)


def kl_per_token(
    logprobs: Float[np.ndarray, "B N"],
    ref_logprobs: Float[np.ndarray, "B N"],
    mask: Bool[np.ndarray, "B N"],
    groups: Groups = None,
) -> Estimate:
    """As :func:`kl_per_sequence`, in nats a token over all tokens."""
    return _per_token(np.asarray(logprobs, dtype=float) - np.asarray(ref_logprobs, dtype=float), mask, groups)


def repetition(
    tokens: Int[np.ndarray, "B N"], mask: Bool[np.ndarray, "B N"], n: int = 3, groups: Groups = None
) -> Estimate:
    """Share of a response's ``n``-grams that it has already said; responses shorter than ``n`` have none."""
    repeated, total = repeated_ngrams(tokens, mask, n)
    return _ratio(repeated, total, groups)


def repeated_ngrams(
    tokens: Int[np.ndarray, "B N"], mask: Bool[np.ndarray, "B N"], n: int
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """For each response the ``n``-grams that occurred earlier in it, and all its ``n``-grams."""
    grams = _ngrams(tokens, mask, n)
    total = np.array([len(row) for row in grams])
    return total - np.array([len(set(row)) for row in grams]), total


def distinct(tokens: Int[np.ndarray, "B N"], mask: Bool[np.ndarray, "B N"], n: int = 2) -> float:
    """Different ``n``-grams over all ``n``-grams of all responses together (distinct-n, Li et al. 2016,
    https://arxiv.org/abs/1510.03055): low when responses resemble each other. It falls as responses are added, so
    compare equal numbers; nan where there is no ``n``-gram."""
    grams = [gram for row in _ngrams(tokens, mask, n) for gram in row]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _ngrams(tokens: np.ndarray, mask: np.ndarray, n: int) -> list[list[tuple[int, ...]]]:
    if n < 1:
        raise ValueError(f"n-grams of {n} tokens; expected at least 1")
    tokens, mask = np.asarray(tokens), np.asarray(mask, dtype=bool)
    if tokens.shape != mask.shape:
        raise ValueError(f"tokens {tokens.shape} and mask {mask.shape} differ in shape")
    rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    return [[tuple(row[start : start + n]) for start in range(len(row) - n + 1)] for row in rows]


def _per_token(values: np.ndarray, mask: np.ndarray, groups: Groups) -> Estimate:
    mask = np.asarray(mask, dtype=bool)
    return _ratio(np.where(mask, values, 0.0).sum(axis=1), mask.sum(axis=1), groups)


def _ratio(totals: np.ndarray, sizes: np.ndarray | None, groups: Groups) -> Estimate:
    """Sum over sum with an interval over groups of rows."""
    sizes = np.ones(len(totals)) if sizes is None else sizes
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (len(totals),):
            raise ValueError(f"groups {groups.shape} do not name one prompt for each of {len(totals)} responses")
        _, groups = np.unique(groups, return_inverse=True)
        totals, sizes = np.bincount(groups, weights=totals), np.bincount(groups, weights=sizes)
    return estimates.ratio(totals, sizes)
