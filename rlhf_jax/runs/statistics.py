"""Numbers over several runs of one configuration: mean and 95 % interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from rlhf_jax.runs.read import Number, Series

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Band:
    """A metric over several runs at the steps that all of them have."""

    steps: Int[np.ndarray, " R"]
    mean: Float[np.ndarray, " R"]
    low: Float[np.ndarray, " R"]
    high: Float[np.ndarray, " R"]
    runs: int


def over_seeds(numbers: Sequence[Number]) -> Number:
    r"""Mean with Student's interval :math:`\bar x \pm t_{n-1} s / \sqrt n`; a single run keeps its own interval."""
    if len(numbers) == 1:
        return numbers[0]
    values = np.array([number.value for number in numbers])
    mean, half = float(values.mean()), float(_half_width(values[:, None])[0])
    return Number(mean, mean - half, mean + half)


def band(series: Sequence[Series]) -> Band:
    """Mean and interval at each common step; without any common step the first run alone."""
    common = sorted(set.intersection(*(set(one.steps.tolist()) for one in series)))
    if not common:
        return band(series[:1])
    rows = np.stack([one.values[np.isin(one.steps, common)] for one in series])
    mean = rows.mean(axis=0)
    half = _half_width(rows) if len(rows) > 1 else np.full_like(mean, math.nan)
    return Band(np.array(common), mean, mean - half, mean + half, len(rows))


def _half_width(rows: Float[np.ndarray, "M R"]) -> Float[np.ndarray, " R"]:
    runs = len(rows)
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, runs - 1)
    return quantile * rows.std(axis=0, ddof=1) / math.sqrt(runs)
