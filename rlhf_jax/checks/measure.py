"""What a check found: an error beside the bound that it had to keep, or why nothing was computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Compile = Callable[..., Any]
"""``jax.jit``, or it with options."""

Verdict = Literal["passed", "failed", "refused"]

EXACT_BOUND = 5e-6
"""Largest error of fp32 arithmetic, as a part of the largest number (or of 1, if that is larger)."""


@dataclass(frozen=True)
class Measurement:
    """One comparison.

    Args:
        what: "values" or "gradients".
        case: shapes and dtype.
        error: largest absolute difference; None where the computation was refused.
        bound: what it had to keep; 0 means the same bits.
        refusal: why nothing was computed.
    """

    what: str
    case: str
    error: float | None = None
    bound: float | None = None
    refusal: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Passed within the bound (NaN is not); refused where nothing was computed."""
        if self.error is None:
            return "refused"
        return "passed" if self.bound is not None and self.error <= self.bound else "failed"

    @property
    def share(self) -> float:
        """The error as a part of its bound."""
        if self.error is None or self.bound is None:
            return 0.0
        if self.bound == 0.0:
            return 0.0 if self.error == 0.0 else math.inf
        return math.inf if math.isnan(self.error) else self.error / self.bound


def worst(found: Iterable[Measurement]) -> Measurement:
    """The measurement nearest to its bound or furthest beyond it."""
    return max(found, key=lambda each: (each.verdict == "failed", each.share, each.error is not None))


def distance(found, expected) -> float:
    """Largest absolute difference, in float64; NaN where either has one, infinite for different shapes."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return math.inf
    return float(np.abs(found - expected).max(initial=0.0))


def exact_bound(expected) -> float:
    """What fp32 arithmetic has to keep beside these numbers."""
    return EXACT_BOUND * max(1.0, float(np.abs(np.asarray(expected, np.float64)).max(initial=0.0)))
