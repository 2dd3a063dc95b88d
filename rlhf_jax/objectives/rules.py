"""What can be learned from a preference, each loss as a value of its choices; the formulas are in ``ops.preferences``.

A rule turns what the policy and the reference say of responses into a *statistic* of each response; ``beta`` times it
is the reward that the policy implies. Rules for pairs judge the difference of two statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.preferences import hinge_loss, ipo_loss, log_odds, plackett_luce_loss, robust_loss, sigmoid_loss


@struct.dataclass
class Responses:
    """Summed log-probabilities of responses under policy and reference, and the number of tokens of each."""

    logprobs: Float[Array, "B K"]
    ref_logprobs: Float[Array, "B K"]
    tokens: Int[Array, "B K"]

    def ratios(self, average: bool) -> Float[Array, "B K"]:
        """``log p - log q``, summed over a response's tokens or averaged."""
        ratios = self.logprobs - self.ref_logprobs
        return ratios / jnp.maximum(self.tokens, 1) if average else ratios

    def means(self) -> Float[Array, "B K"]:
        """Mean log-probability of a response's tokens under the policy."""
        return self.logprobs / jnp.maximum(self.tokens, 1)


@dataclass(frozen=True)
class DPO:
    """Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, and its conservative form for noisy labels (cDPO).

    Args:
        beta: strength of the tie to the reference.
        label_smoothing: the probability that a label is wrong; below 1/2.
        average: mean log-ratios instead of sums (Lambert et al. 2024, Tülu 3, https://arxiv.org/abs/2411.15124), with a
            beta of 5 or so.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    average: bool = False
    needs_reference: ClassVar[bool] = True
    sft_coef: ClassVar[float] = 0.0

    def __post_init__(self):
        _check(self, label_smoothing=(0.0, 0.5))

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.ratios(self.average)

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return sigmoid_loss(margin, self.beta, self.label_smoothing)


@dataclass(frozen=True)
class RobustDPO:
    """DPO without the bias of wrong labels: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409.

    Args:
        beta: strength of the tie to the reference.
        label_smoothing: the probability that a label is wrong; below 1/2.
    """

    beta: float = 0.1
    label_smoothing: float = 0.1
    needs_reference: ClassVar[bool] = True
    sft_coef: ClassVar[float] = 0.0

    def __post_init__(self):
        _check(self, label_smoothing=(0.0, 0.5))

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.ratios(average=False)

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return robust_loss(margin, self.beta, self.label_smoothing)


@dataclass(frozen=True)
class Hinge:
    """The hinge of SLiC-HF on DPO's margin: Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657.

    Args:
        beta: the margin of ``1 / beta`` nats is enough.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    sft_coef: ClassVar[float] = 0.0

    def __post_init__(self):
        _check(self)

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.ratios(average=False)

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return hinge_loss(margin, self.beta)


@dataclass(frozen=True)
class IPO:
    """Azar et al. 2023, https://arxiv.org/abs/2310.12036: the margin is drawn to ``1 / (2 beta)`` nats.

    Args:
        beta: tau of the paper.
        average: mean log-ratios instead of sums. TRL takes means; the paper, the code of DPO's authors and OpenRLHF
            take sums.
    """

    beta: float = 0.1
    average: bool = False
    needs_reference: ClassVar[bool] = True
    sft_coef: ClassVar[float] = 0.0

    def __post_init__(self):
        _check(self)

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.ratios(self.average)

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return ipo_loss(margin, self.beta)


@dataclass(frozen=True)
class SimPO:
    """Meng et al. 2024, https://arxiv.org/abs/2405.14734: mean log-probabilities, a target margin, and no reference.

    Args:
        beta: scale of the reward.
        gamma: the reward by which the better response is to win (the paper: 0.3 to 1.6).
    """

    beta: float = 2.0
    gamma: float = 0.5
    needs_reference: ClassVar[bool] = False
    sft_coef: ClassVar[float] = 0.0

    def __post_init__(self):
        _check(self, gamma=(0.0, math.inf))

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.means()

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return sigmoid_loss(margin, self.beta, target=self.gamma)


@dataclass(frozen=True)
class CPO:
    """Xu et al. 2024, https://arxiv.org/abs/2401.08417: DPO under a uniform reference, beside likelihood of the best.

    Args:
        beta: scale of the reward.
        label_smoothing: the probability that a label is wrong; below 1/2.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = False
    sft_coef: ClassVar[float] = 1.0

    def __post_init__(self):
        _check(self, label_smoothing=(0.0, 0.5))

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.logprobs

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return sigmoid_loss(margin, self.beta, self.label_smoothing)


@dataclass(frozen=True)
class ORPO:
    """Hong et al. 2024, https://arxiv.org/abs/2403.07691: likelihood of the best and the odds ratio; no reference.

    Args:
        coef: lambda, the weight of the odds ratio term.
    """

    coef: float = 0.1
    beta: ClassVar[float] = 1.0
    needs_reference: ClassVar[bool] = False
    sft_coef: ClassVar[float] = 1.0

    def __post_init__(self):
        _check(self)

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return log_odds(responses.means())

    def pair(self, margin: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.coef * sigmoid_loss(margin, self.beta)


@dataclass(frozen=True)
class PlackettLuce:
    """DPO on whole rankings: Rafailov et al. 2023, appendix A.3, https://arxiv.org/abs/2305.18290.

    Args:
        beta: strength of the tie to the reference.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    sft_coef: ClassVar[float] = 0.0

    def __post_init__(self):
        _check(self)

    def statistic(self, responses: Responses) -> Float[Array, "B K"]:
        return responses.ratios(average=False)

    def ranking(self, statistic: Float[Array, "B K"], ranks: Int[Array, "B K"]) -> Float[Array, "B"]:
        """The loss of each prompt's ranking."""
        return plackett_luce_loss(self.beta * statistic, ranks)


@dataclass(frozen=True)
class KTO:
    """Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: responses that are good or bad, unpaired.

    Args:
        beta: how soon gains and losses saturate.
        desirable_weight: of good responses; with more bad ones than good the paper raises it.
        undesirable_weight: of bad ones.
        baseline: ``mismatched`` is the paper's, the mean log-ratio of other prompts' responses, which are read as well;
            ``batch`` the mean log-ratio of the batch's own; ``none`` is 0 (in TRL ``apo_zero_unpaired``).
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    baseline: Literal["mismatched", "batch", "none"] = "mismatched"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self):
        _check(self, desirable_weight=(0.0, math.inf), undesirable_weight=(0.0, math.inf))
        if self.baseline not in ("mismatched", "batch", "none"):
            raise ValueError(f"baseline is {self.baseline!r}; expected 'mismatched', 'batch' or 'none'")


PairRule = DPO | RobustDPO | Hinge | IPO | SimPO | CPO | ORPO
RankingRule = PairRule | PlackettLuce


def _check(rule: RankingRule | KTO, **ranges: tuple[float, float]) -> None:
    for name in ("beta", "coef"):
        if hasattr(rule, name) and not 0 < getattr(rule, name) < math.inf:
            raise ValueError(f"{name} is {getattr(rule, name)}; expected a number above 0")
    for name, (low, high) in ranges.items():
        value = getattr(rule, name)
        if not low <= value < high:
            bound = "0 or more" if high == math.inf else f"at least {low:g} and below {high:g}"
            raise ValueError(f"{name} is {value}; expected {bound}")
