"""Attention and its gradients in numpy, float64, dense, by the textbook: what implementations are held against.

Nothing here is shared with what is checked. With ``rounding`` every array that a plain program would write in a
narrow type is rounded to it, which gives the error that such a program makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

NOTHING_SEEN = -1e30
"""Log-sum-exp of a query that sees nothing."""

Rounding = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Problem:
    """One attention in float64; ``distance[b, t, s]`` is query position minus key position."""

    q: Float[np.ndarray, "B T H D"]
    k: Float[np.ndarray, "B S K D"]
    v: Float[np.ndarray, "B S K Dv"]
    seen: Bool[np.ndarray, "B T S"]
    distance: Float[np.ndarray, "B T S"]
    scale: float
    softcap: float | None = None
    slopes: Float[np.ndarray, " H"] | None = None
    sink_logits: Float[np.ndarray, " H"] | None = None


def solve(
    problem: Problem,
    out_cotangent: Float[np.ndarray, "B T H Dv"],
    lse_cotangent: Float[np.ndarray, "B T H"],
    rounding: Rounding = lambda x: x,
) -> dict[str, np.ndarray]:
    """``out``, ``lse`` and the gradients ``dq``, ``dk``, ``dv`` and, with sink logits, ``dsinks``."""
    per_group = problem.q.shape[2] // problem.k.shape[2]
    k, v = (np.repeat(x, per_group, axis=2) for x in (problem.k, problem.v))
    scaled = problem.scale * np.einsum("bthd,bshd->bhts", problem.q, k)
    bent = scaled if problem.softcap is None else problem.softcap * np.tanh(scaled / problem.softcap)
    logits = rounding(bent)
    if problem.slopes is not None:
        logits = rounding(logits - problem.slopes[None, :, None, None] * problem.distance[:, None])
    seen = problem.seen[:, None]
    logits = np.where(seen, logits, -np.inf)
    sinks = np.full(problem.q.shape[2], -np.inf) if problem.sink_logits is None else problem.sink_logits
    sinks = sinks[None, :, None, None]
    top = np.maximum(logits.max(axis=-1, keepdims=True), sinks)
    top = np.where(np.isfinite(top), top, 0.0)
    total = np.exp(logits - top).sum(axis=-1, keepdims=True) + np.exp(sinks - top)
    divisor = np.where(total > 0.0, total, 1.0)
    weights = rounding(np.exp(logits - top) / divisor)
    out = rounding(np.einsum("bhts,bshd->bthd", weights, v))
    lse = np.where(total > 0.0, top + np.log(divisor), NOTHING_SEEN)[..., 0]

    down = rounding(np.einsum("bthd,bshd->bhts", out_cotangent, v))
    # From the output, which was rounded otherwise than ``down``: a program's two roundings do not cancel either.
    mean = np.einsum("bthd,bthd->bht", out_cotangent, out)[..., None]
    inner = mean - lse_cotangent.transpose(0, 2, 1)[..., None]
    slope = rounding(weights * (down - inner))
    slope = slope if problem.softcap is None else slope * (1.0 - np.square(bent / problem.softcap))
    slope = slope * problem.scale
    solved = {
        "out": out,
        "lse": lse.transpose(0, 2, 1),
        "dq": rounding(np.einsum("bhts,bshd->bthd", slope, k)),
        "dk": rounding(_by_group(np.einsum("bhts,bthd->bshd", slope, problem.q), per_group)),
        "dv": rounding(_by_group(np.einsum("bhts,bthd->bshd", weights, out_cotangent), per_group)),
    }
    if problem.sink_logits is not None:
        solved["dsinks"] = rounding((-np.exp(sinks - top) / divisor * inner).sum(axis=(0, 2, 3)))
    return solved


def _by_group(x: Float[np.ndarray, "B S H D"], per_group: int) -> Float[np.ndarray, "B S K D"]:
    """The sum over the query heads that read one key/value head."""
    rows, slots, heads, width = x.shape
    return x.reshape(rows, slots, heads // per_group, per_group, width).sum(axis=3)


def rounded(dtype: str) -> Rounding:
    """Round to this type and back."""
    return lambda x: x.astype(jnp.dtype(dtype)).astype(np.float64)


def wide(x: Array) -> np.ndarray:
    """Any array in float64."""
    return np.asarray(x).astype(np.float64)
