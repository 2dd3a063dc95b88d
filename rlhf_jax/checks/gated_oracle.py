"""Gated attention and FLASH with their gradients in numpy, float64, dense: what implementations are held against.

Nothing here is shared with what is checked; see ``oracle`` for ``rounding``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import erf

from rlhf_jax.checks.oracle import Rounding


@dataclass(frozen=True)
class GatedProblem:
    """One gated attention in float64, with a linear part where ``earlier`` is given.

    ``seen`` keys count by their score, ``earlier`` ones by the plain product of the global queries and keys. ``back``
    is how far a key lies before its query; ``bias`` of that distance, the last entry for all that are further.
    """

    q: Float[np.ndarray, "B T D"]
    k: Float[np.ndarray, "B S D"]
    v: Float[np.ndarray, "B S E"]
    seen: Bool[np.ndarray, "B T S"]
    back: Float[np.ndarray, "B T S"]
    normaliser: Float[np.ndarray, "B T"]
    scale: float
    laplace: bool = False
    bias: Float[np.ndarray, " R"] | None = None
    q_global: Float[np.ndarray, "B T D"] | None = None
    k_global: Float[np.ndarray, "B S D"] | None = None
    earlier: Bool[np.ndarray, "B T S"] | None = None


def solve_gated(
    problem: GatedProblem, cotangent: Float[np.ndarray, "B T E"], rounding: Rounding = lambda x: x
) -> dict[str, np.ndarray]:
    """``out``, ``dq``, ``dk`` and ``dv``, and where there are such ``dbias``, ``dq_global`` and ``dk_global``."""
    p = problem
    logits = p.scale * np.einsum("btd,bsd->bts", p.q, p.k)
    entry = np.zeros(p.back.shape, int)
    if p.bias is not None:
        entry = np.clip(p.back, 0, len(p.bias) - 1).astype(int)
        logits = logits + p.bias[entry]
    mean, deviation = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
    if p.laplace:
        away = (logits - mean) / deviation
        score = (1.0 + erf(away / math.sqrt(2.0))) / 2.0
        slope = np.exp(-(away**2) / 2.0) / (deviation * math.sqrt(2.0 * math.pi))
    else:
        score, slope = np.where(logits > 0.0, logits, 0.0) ** 2, 2.0 * np.where(logits > 0.0, logits, 0.0)
    # A program may divide before or after its products; what is rounded is the larger of the two.
    weights = rounding(np.where(p.seen, score, 0.0))
    divided = weights / p.normaliser[..., None]
    cotangent_divided = rounding(cotangent / p.normaliser[..., None])
    down = rounding(np.einsum("bte,bse->bts", cotangent_divided, p.v))
    dlogits = np.where(p.seen, down * slope, 0.0)
    dproducts = rounding(p.scale * dlogits)
    solved = {
        "dq": rounding(np.einsum("bts,bsd->btd", dproducts, p.k)),
        "dk": rounding(np.einsum("bts,btd->bsd", dproducts, p.q)),
    }
    if p.bias is not None:
        solved["dbias"] = np.array([dlogits[entry == i].sum() for i in range(len(p.bias))])
    if p.q_global is not None and p.k_global is not None and p.earlier is not None:
        linear = rounding(np.where(p.earlier, np.einsum("btd,bsd->bts", p.q_global, p.k_global), 0.0))
        divided = divided + linear
        pulled = rounding(np.where(p.earlier, np.einsum("bte,bse->bts", cotangent, p.v), 0.0))
        solved["dq_global"] = rounding(np.einsum("bts,bsd->btd", pulled, p.k_global))
        solved["dk_global"] = rounding(np.einsum("bts,btd->bsd", pulled, p.q_global))
    solved["out"] = rounding(np.einsum("bts,bse->bte", divided, p.v))
    solved["dv"] = rounding(np.einsum("bts,bte->bse", divided, cotangent))
    return solved
