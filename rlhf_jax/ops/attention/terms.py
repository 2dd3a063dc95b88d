"""What one attention computes besides the mask, and what is known about it before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask, Rule

HIDDEN = -1e30
"""Logit of a hidden key, and log-sum-exp of a query that sees none: finite, so that differences are not NaN."""


@struct.dataclass
class Terms:
    """The logits ``softcap * tanh(scale * q k / softcap) - slope * (query position - key position)``.

    Args:
        scale: factor on the products.
        softcap: bound of the scaled products; None for none.
        slopes: ALiBi's slope of each query head, not trained (arXiv 2108.12409); None for none.
        sink_logits: of each query head, a logit without a value that takes part in the softmax, so that a head can
            attend to nothing; trained. None for none.
    """

    scale: float = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False, default=None)
    slopes: Float[Array, " H"] | None = None
    sink_logits: Float[Array, " H"] | None = None

    def logits(self, products, query_positions, key_positions, slopes):
        """From unscaled products to logits; all arguments broadcast, so kernels can call it on their tiles."""
        logits = products * self.scale
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if slopes is not None:
            logits = logits - slopes * (query_positions - key_positions).astype(logits.dtype)
        return logits

    def logits_gradient(self, logits_before_slopes, cotangent):
        """The cotangent of the unscaled products, from the logits without the slopes' part."""
        if self.softcap is not None:
            cotangent = cotangent * (1.0 - jnp.square(logits_before_slopes / self.softcap))
        return cotangent * self.scale


@dataclass(frozen=True)
class Case:
    """One attention as an implementation sees it when it says whether it can serve.

    ``platform`` is "cpu", "gpu" or "tpu", ``device`` the device's own name. Lengths and widths as in ``attention``.
    """

    platform: str
    device: str
    rows: int
    length: int
    slots: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str
    rule: Rule = Rule()
    causal: bool = True
    window: int | None = None
    aligned: bool = False
    softcap: bool = False
    slopes: bool = False
    sink_logits: bool = False
    dropout: bool = False
    lse: bool = False

    @classmethod
    def of(cls, q, k, v, mask: Mask, terms: Terms, *, dropout: bool = False, lse: bool = False) -> Case:
        """The case of these arguments on the device that JAX runs on by default."""
        platform, device = this_device()
        return cls(
            platform, device, q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
            jnp.dtype(q.dtype).name, mask.rule, mask.causal, mask.window, mask.aligned, terms.softcap is not None,
            terms.slopes is not None, terms.sink_logits is not None, dropout, lse,
        )  # fmt: skip


class CannotServe(ValueError):
    """An implementation was named that refuses the case; the message says why."""


def unproven(case: Any) -> bool:
    """That ``auto`` leaves alone what has not been run on its own device yet; it serves where it is named."""
    return False


def this_device() -> tuple[str, str]:
    """The platform ("cpu", "gpu" or "tpu") and the device's name that a program is traced for.

    Those of the mesh, whose devices need not be there; without one, of what JAX runs on by default.
    """
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None:
        return named.platform, named.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind
