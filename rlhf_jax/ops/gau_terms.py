"""What gated attention computes besides the mask: the score of a logit, and what is known before computing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import Mask, Rule
from rlhf_jax.ops.attention.terms import this_device

LAPLACE_MEAN = math.sqrt(0.5)
LAPLACE_STD = math.sqrt(0.25 / math.pi)


@dataclass(frozen=True)
class Relu2:
    """``relu(x)²`` (GAU, arXiv 2202.10447)."""

    def value(self, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The score; elementwise, so that kernels can call it on their tiles."""
        return jnp.square(jnp.maximum(logits, 0.0))

    def gradient(self, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The derivative of the score."""
        return 2.0 * jnp.maximum(logits, 0.0)


@dataclass(frozen=True)
class Laplace:
    """``(1 + erf((x - m) / (s sqrt(2)))) / 2`` with ``m = sqrt(1/2)``, ``s = sqrt(1/(4 pi))`` (MEGA, arXiv 2209.10655).

    A bounded stand-in for ``relu(x)²``: with these constants both have the value 1/2 and the slope sqrt(2) at ``m``.
    """

    def value(self, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The score; elementwise, so that kernels can call it on their tiles."""
        return 0.5 * (1.0 + jax.lax.erf((logits - LAPLACE_MEAN) * (math.sqrt(0.5) / LAPLACE_STD)))

    def gradient(self, logits: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The derivative of the score: a normal density."""
        away = (logits - LAPLACE_MEAN) / LAPLACE_STD
        return jnp.exp(-0.5 * away * away) * (1.0 / (LAPLACE_STD * math.sqrt(2.0 * math.pi)))


Score = Relu2 | Laplace


def biased(
    logits: Float[Array, " ..."], bias: Float[Array, " R"] | None, distance: Int[Array, " ..."]
) -> Float[Array, " ..."]:
    """The logits with the bias of their distance added; distances beyond the table take its last entry."""
    if bias is None:
        return logits
    return logits + jnp.take(bias, jnp.clip(distance, 0, bias.shape[0] - 1)).astype(logits.dtype)


@dataclass(frozen=True)
class GauCase:
    """One gated attention as an implementation sees it when it says whether it can serve.

    ``platform`` is "cpu", "gpu" or "tpu", ``device`` the device's own name. ``chunk`` is None for the quadratic form;
    of the chunked one it is the length of a chunk, ``packed`` says that documents may begin anywhere in a row, and
    ``state`` that tokens before the row count.
    """

    platform: str
    device: str
    rows: int
    length: int
    slots: int
    width: int
    value_width: int
    dtype: str
    score: Score
    bias: bool = False
    rule: Rule = Rule()
    causal: bool = True
    aligned: bool = False
    chunk: int | None = None
    packed: bool = False
    state: bool = False

    @classmethod
    def of(cls, q, k, v, score: Score, bias, mask: Mask | None = None, **more: Any) -> GauCase:
        """The case of these arguments on the device that JAX runs on by default."""
        platform, device = this_device()
        if mask is not None:
            more = {"rule": mask.rule, "causal": mask.causal, "aligned": mask.aligned} | more
        return cls(
            platform, device, q.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2], jnp.dtype(q.dtype).name,
            score, bias is not None, **more,
        )  # fmt: skip
