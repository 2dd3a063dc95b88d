"""Which experts each token goes to and with which weights, and what is measured and penalised about it.

All in fp32 (float64 logits: in float64). Rows are independent of each other except where a function says otherwise:
``keep`` and ``batchwise``. Moving the tokens is the job of ``ops.experts``.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

SCORES = ("softmax", "sigmoid")
ORDERS = ("score_first", "select_first")


@dataclass(frozen=True)
class TopK:
    """Each token takes the ``k`` experts of the largest score.

    Mixtral: ``TopK(order="select_first")``. Qwen3: ``TopK()``, which gives the same weights. Switch, OLMoE and
    DeepSeekMoE: ``TopK(renormalise=False)``. DeepSeek-V3: ``TopK("sigmoid", groups=8, group_limit=4)`` with a bias.

    Args:
        score: "softmax" over all experts, or "sigmoid" of each logit.
        order: "score_first" weighs by the scores of the chosen; "select_first" by a softmax over their logits alone.
        renormalise: divide the weights of a token by their sum (plus ``eps``).
        eps: keeps that sum from 0.
        groups: experts are split into so many equal groups; 1 for no groups.
        group_limit: experts are taken from so many groups only, those with the largest sum of their two best scores.
    """

    score: str = "softmax"
    order: str = "score_first"
    renormalise: bool = True
    eps: float = 1e-20
    groups: int = 1
    group_limit: int | None = None

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r} of a router; expected one of {', '.join(SCORES)}")
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r} of a router; expected one of {', '.join(ORDERS)}")
        if self.order == "select_first" and self.score != "softmax":
            raise ValueError(f"order='select_first' is a softmax over the chosen logits; take it with score='softmax', "
                             f"not {self.score!r}")  # fmt: skip
        if self.eps < 0.0:
            raise ValueError(f"eps must not be negative, got {self.eps}")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if self.group_limit is not None and not 1 <= self.group_limit <= self.groups:
            raise ValueError(f"group_limit must be from 1 to the {self.groups} groups, got {self.group_limit}")

    def check(self, experts: int, k: int) -> None:
        """Refuse numbers of experts that this cannot serve."""
        if not 1 <= k <= experts:
            raise ValueError(f"top_k must be from 1 to the {experts} experts, got {k}")
        if experts % self.groups:
            raise ValueError(f"{experts} experts are not a multiple of {self.groups} groups")
        limit = self.groups if self.group_limit is None else self.group_limit
        if k > limit * (experts // self.groups):
            raise ValueError(f"{limit} groups of {experts // self.groups} experts do not have {k} experts to choose; "
                             "raise group_limit or lower top_k")  # fmt: skip


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the tokens of its largest scores (arXiv 2202.09368), not implemented for language models.

    Whether a token is taken depends on tokens after it, so the model would see the future, and could not sample what it
    scores. ``MoE`` refuses it with that reason.
    """


@struct.dataclass
class Routing:
    """The experts of each token, their weights (fp32), and the router's distribution over all experts.

    Weights are differentiable, experts are not. ``logits`` are those that the weights come from.
    """

    experts: Int[Array, "... k"]
    weights: Float[Array, "... k"]
    probs: Float[Array, "... X"]
    logits: Float[Array, "... X"]


def route(
    logits: Float[Array, "... X"],
    k: int,
    router: TopK = TopK(),
    bias: Float[Array, " X"] | None = None,
    experts: Int[Array, "... k"] | None = None,
) -> Routing:
    """Choose ``k`` experts for each token.

    Args:
        logits: of the router, one for each expert.
        k: experts of a token.
        router: how they are chosen and weighed.
        bias: added to the scores for the choice alone; it enters no weight and gets no gradient (arXiv 2408.15664).
        experts: take these instead of choosing; their weights come from ``logits`` as always.

    Raises:
        ValueError: ``router`` cannot serve these numbers.
    """
    router.check(logits.shape[-1], k)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    scores = jax.nn.softmax(logits) if router.score == "softmax" else jax.nn.sigmoid(logits)
    chosen = choose(scores, k, router, bias) if experts is None else experts
    if router.order == "select_first":
        weights = jax.nn.softmax(_at(logits, chosen))
    else:
        weights = _at(scores, chosen)
        if router.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + router.eps)
    probs = scores if router.score == "softmax" else scores / (scores.sum(-1, keepdims=True) + router.eps)
    return Routing(chosen, weights, probs, logits)


def choose(
    scores: Float[Array, "... X"], k: int, router: TopK, bias: Float[Array, " X"] | None = None
) -> Int[Array, "... k"]:
    """The experts of the largest ``scores + bias``, best first; of equal ones the first. No gradient."""
    scores = jax.lax.stop_gradient(scores if bias is None else scores + bias.astype(scores.dtype))
    if router.group_limit is not None and router.group_limit < router.groups:
        grouped = scores.reshape(*scores.shape[:-1], router.groups, -1)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        taken = jax.lax.top_k(best, router.group_limit)[1]
        open_ = (taken[..., None] == jnp.arange(router.groups)).any(-2)
        scores = jnp.where(open_[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, k)[1]


def _at(values: Float[Array, "... X"], chosen: Int[Array, "... k"]) -> Float[Array, "... k"]:
    """Entries of the last axis, by comparison: the gradient of a gather would be a scatter."""
    here = chosen[..., None] == jnp.arange(values.shape[-1])
    return jnp.where(here, values[..., None, :], 0.0).sum(-1)


def keep(experts: Int[Array, "n k"], real: Bool[Array, " n"], number: int, factor: float) -> Bool[Array, "n k"]:
    """The slots that fit where each expert takes ``C = ceil(factor k tokens / number)`` of them.

    All first choices come before all second choices, and so on; inside a choice earlier tokens first (GShard, arXiv
    2006.16668). An expert keeps ``min(load, C)`` slots. Whether a token is dropped depends on all other tokens.

    Args:
        experts: of each token of the whole batch.
        real: tokens that are not padding; others take no capacity and are not kept.
        number: of experts.
        factor: the capacity in shares of an even load.
    """
    n, k = experts.shape
    by_choice = jnp.where(real[:, None], experts, number).T.reshape(-1)
    place = jnp.argsort(jnp.argsort(by_choice, stable=True))
    load = (by_choice[:, None] == jnp.arange(number)).sum(0)
    first = jnp.append(jnp.cumsum(load) - load, 0)
    rank = (place - first[by_choice]).reshape(k, n).T
    return (rank < capacity(real.sum(), k, number, factor)) & real[:, None]


def capacity(tokens: Int[Array, ""] | int, k: int, number: int, factor: float) -> Int[Array, ""]:
    """Slots that one of ``number`` experts takes: ``ceil(factor k tokens / number)``."""
    share = jnp.asarray(tokens, jnp.float32) * (factor * k / number)
    return jnp.ceil(share * (1.0 - 1e-6)).astype(jnp.int32)


def loads(experts: Int[Array, "B T k"], real: Bool[Array, "B T"], number: int) -> Float[Array, "B X"]:
    """The fraction of each row's slots that goes to each expert; 0 for a row of padding."""
    hits = (experts[..., None] == jnp.arange(number)) & real[..., None, None]
    return hits.sum((1, 2), dtype=jnp.float32) / _at_least_one(real.sum(1) * experts.shape[-1])[:, None]


def mean_probs(probs: Float[Array, "B T X"], real: Bool[Array, "B T"]) -> Float[Array, "B X"]:
    """The router's distribution, averaged over each row's real tokens; 0 for a row of padding."""
    return (probs * real[..., None]).sum(1) / _at_least_one(real.sum(1))[:, None].astype(probs.dtype)


def balance_loss(load: Float[Array, "... X"], probs: Float[Array, "... X"]) -> Float[Array, "..."]:
    """``X sum_i f_i P_i``: 1 for even loads and probabilities, ``X`` when all goes to one expert.

    ``f`` is the fraction of slots (not of tokens: it is not multiplied by k), ``P`` the mean probability (Switch
    Transformer, arXiv 2101.03961). Its gradient comes through ``P``.
    """
    return load.shape[-1] * (jax.lax.stop_gradient(load) * probs).sum(-1)


def batchwise(rows: Float[Array, "B X"], real: Bool[Array, "B T"]) -> Float[Array, "B X"]:
    """Averages over all real tokens of the batch from averages over those of rows; the same in every row.

    It depends on which rows are in the batch, or in the microbatch.
    """
    shares = real.sum(1) / _at_least_one(real.sum())
    return jnp.broadcast_to((rows * shares[:, None]).sum(0), rows.shape)


def z_loss(logits: Float[Array, "B T X"], real: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over each row's real tokens of ``logsumexp(logits)²``: keeps logits small (ST-MoE, arXiv 2202.08906)."""
    return _row_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), real)


def entropy(probs: Float[Array, "B T X"], real: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over each row's real tokens of the entropy of the router's distribution, in nats."""
    return _row_mean(-jax.scipy.special.xlogy(probs, probs).sum(-1), real)


def dropped_fraction(kept: Bool[Array, "B T k"], real: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """The fraction of each row's slots that found no room."""
    return _row_mean(1.0 - kept.mean(-1, dtype=jnp.float32), real)


def max_violation(load: Float[Array, "... X"]) -> Float[Array, "..."]:
    """MaxVio: the largest load over the mean load, minus 1. 0 for even loads, ``X - 1`` for one expert."""
    mean = load.mean(-1)
    return load.max(-1) / jnp.where(mean > 0.0, mean, 1.0) - 1.0


def updated_bias(bias: Float[Array, " X"], load: Float[Array, " X"], rate: float) -> Float[Array, " X"]:
    """The selection bias after a step: up by ``rate`` for experts of less than the mean load, down for those of more.

    Loss-free balancing (arXiv 2408.15664, rate 1e-3). ``load`` is that of all tokens of the step, in any unit.
    """
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load).astype(bias.dtype)


def jittered(x: Float[Array, " ..."], amount: float, key: jax.Array) -> Float[Array, " ..."]:
    """``x`` times uniform noise from ``[1 - amount, 1 + amount]`` (Switch Transformer: on what the router reads)."""
    return x * jax.random.uniform(key, x.shape, x.dtype, 1.0 - amount, 1.0 + amount)


def _row_mean(values: Float[Array, "B T"], real: Bool[Array, "B T"]) -> Float[Array, " B"]:
    return (values * real).sum(1) / _at_least_one(real.sum(1)).astype(values.dtype)


def _at_least_one(count: Int[Array, " ..."]) -> Int[Array, " ..."]:
    return jnp.maximum(count, 1)
