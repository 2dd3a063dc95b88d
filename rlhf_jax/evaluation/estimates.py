"""A number with its interval: the bootstrap over independent units, and Wilson's interval of a proportion.

What counts as a unit is the caller's choice and the point of an honest interval: responses to one prompt, pairs of one
ranking or tokens of one text are not independent of each other, prompts are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

CONFIDENCE = 0.95
RESAMPLES = 4000
_DRAWS_AT_A_TIME = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value, its confidence interval, and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON: a number that does not exist (of nothing, or not finite) is None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: x if math.isfinite(x) else None for name, x in numbers.items()}, "n": self.n}

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)
"""The estimate of something that was never observed."""


def mean(values: Float[np.ndarray, " G"], *, confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Mean of independent values with a bootstrap interval."""
    values = np.asarray(values, dtype=float)
    return ratio(values, np.ones_like(values), confidence=confidence, seed=seed)


def ratio(
    totals: Float[np.ndarray, " G"],
    sizes: Float[np.ndarray, " G"],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    r"""Mean over members of independent units of different sizes, :math:`\sum_g t_g / \sum_g s_g`.

    Whole units are resampled: with the summed loss and the number of tokens of each row this is the loss per token.
    The interval is bias-corrected and accelerated (BCa; Efron 1987, https://doi.org/10.2307/2289144), so that it may be
    skewed as the data are. Units of size 0 count for nothing; fewer than two units give no interval.
    """
    totals, sizes = np.asarray(totals, dtype=float), np.asarray(sizes, dtype=float)
    if totals.ndim != 1 or totals.shape != sizes.shape:
        raise ValueError(f"totals {totals.shape} and sizes {sizes.shape} must be vectors of one length")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    totals, sizes = totals[sizes > 0], sizes[sizes > 0]
    n = len(totals)
    if n == 0:
        return NOTHING
    value = float(totals.sum() / sizes.sum())
    if n == 1 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, n)
    left_out = (totals.sum() - totals) / (sizes.sum() - sizes)
    if np.ptp(left_out) <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, value, value, n)
    drawn = _resample(totals, sizes, resamples, seed)
    low, high = np.quantile(drawn, _bca_levels(value, drawn, left_out, confidence))
    return Estimate(value, float(low), float(high), n)


def proportion(successes: float, n: int, *, confidence: float = CONFIDENCE) -> Estimate:
    """Share of ``n`` independent trials with Wilson's interval, which stays inside [0, 1] and is never a point.

    ``successes`` may be fractional: a tie is half of one.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return NOTHING
    z = norm.ppf(0.5 + confidence / 2)
    share, spread = successes / n, z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At the ends the formula gives the share itself but for rounding.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return Estimate(share, float(low), float(high), n)


def summarise(estimates: Mapping[str, Estimate | float | int]) -> dict[str, dict[str, float | int | None]]:
    """Estimates as JSON-able entries ``{"value", "low", "high", "n"}``; a bare number has no interval."""
    return {
        name: (found if isinstance(found, Estimate) else Estimate(float(found), math.nan, math.nan, 1)).as_dict()
        for name, found in estimates.items()
    }


def _resample(totals: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The ratio in ``resamples`` draws of as many units with replacement."""
    rng, n = np.random.default_rng(seed), len(totals)
    step = max(1, _DRAWS_AT_A_TIME // n)
    parts = []
    for start in range(0, resamples, step):
        units = rng.integers(n, size=(min(step, resamples - start), n))
        parts.append(totals[units].sum(axis=1) / sizes[units].sum(axis=1))
    return np.concatenate(parts)


def _bca_levels(value: float, drawn: np.ndarray, left_out: np.ndarray, confidence: float) -> np.ndarray:
    """Which quantiles of the draws are the ends of the interval."""
    below = np.mean(drawn < value) + 0.5 * np.mean(drawn == value)
    bias = norm.ppf(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn)))
    pull = left_out.mean() - left_out
    acceleration = np.sum(pull**3) / (6 * np.sum(pull**2) ** 1.5)
    z = bias + norm.ppf([0.5 - confidence / 2, 0.5 + confidence / 2])
    return norm.cdf(bias + z / (1 - acceleration * z))
