"""Gated attention: one head, an elementwise score in place of the softmax, and a divisor for each query.

``out = (A v) / normaliser`` with ``A = score(scale q k' + bias)`` where the mask shows the key and 0 elsewhere: the
mask acts after the score, because a hidden key's score need not be 0. Softmax is ``ops.attention`` with one head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlhf_jax.ops import gau_blocked, gau_reference
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.partitioned import Cuts
from rlhf_jax.ops.attention.terms import CannotServe, unproven
from rlhf_jax.ops.gau_terms import GauCase, Laplace, Relu2, Score
from rlhf_jax.ops.kernels import hopper_gau, tpu_gau
from rlhf_jax.ops.meshes import active_mesh

__all__ = ["GAU_IMPLEMENTATIONS", "GauCase", "GauImplementation", "Laplace", "Relu2", "Score", "gau_attention"]


@dataclass(frozen=True)
class GauImplementation:
    """A schedule: whether it can serve a case (None) or why not, the computation, and whether it suits ``auto``."""

    refusal: Callable[[GauCase], str | None]
    attend: Callable[..., jax.Array]
    suits: Callable[[GauCase], bool] = lambda case: True


GAU_IMPLEMENTATIONS: dict[str, GauImplementation] = {
    "hopper": GauImplementation(hopper_gau.refusal, hopper_gau.attend, unproven),
    "tpu": GauImplementation(tpu_gau.refusal, tpu_gau.attend, unproven),
    "blocked": GauImplementation(gau_blocked.refusal, gau_blocked.attend, gau_blocked.suits),
    "reference": GauImplementation(gau_reference.refusal, gau_reference.attend),
}
"""In the order in which ``auto`` takes the first that serves and suits."""


def gau_attention(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S E"],
    mask: Mask,
    *,
    score: Score,
    scale: float,
    normaliser: Float[Array, "B T"] | float,
    bias: Float[Array, " R"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T E"]:
    """Gated attention's sum over the keys that the mask shows (arXiv 2202.10447).

    Summed in fp32 (float64 inputs: in float64). A query that sees nothing gets 0 and passes no gradient. On a mesh each
    device computes its own rows, queries and part of the values' width, from the keys of whole rows.

    Args:
        q: queries.
        k: keys.
        v: values, usually much wider than the keys.
        mask: who sees whom.
        score: ``Relu2`` or ``Laplace``.
        scale: factor on the products of queries and keys.
        normaliser: divisor of each query's sum, positive; not trained.
        bias: added to the logit of a key ``d`` positions before its query is entry ``min(d, R - 1)`` (0 for keys after
            it); trained. None for none.
        implementation: one of ``GAU_IMPLEMENTATIONS``, or "auto" for the best that serves here.

    Raises:
        ValueError: shapes do not fit, or the named implementation is unknown or cannot serve.
    """
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together")

    def here(q, k, v, mask: Mask, divisor, bias):
        """On one device."""
        name = choose(implementation, GauCase.of(q, k, v, score, bias, mask), GAU_IMPLEMENTATIONS)
        return GAU_IMPLEMENTATIONS[name].attend(q, k, v, mask, divisor, bias, score=score, scale=scale)

    divisor = jnp.broadcast_to(jnp.asarray(normaliser, jnp.promote_types(q.dtype, jnp.float32)), q.shape[:2])
    divisor = jax.lax.stop_gradient(divisor)
    mesh = active_mesh()
    attend = here if mesh is None else _partitioned(here, mesh, q, k, v, mask)
    return attend(q, k, v, mask, divisor, bias)


def _partitioned(here: Callable[..., jax.Array], mesh: Any, q, k, v, mask: Mask) -> Callable[..., jax.Array]:
    """``here`` on every device, for its rows, its queries and its part of the values' width; keys are gathered."""
    cuts = Cuts.of(mesh, q.shape[0], q.shape[1], k.shape[1], 1, 1, v.shape[2])

    def one_device(q, k, v, mask: Mask, divisor, bias):
        return here(q, *cuts.with_all_keys(k, v, mask), divisor, bias)

    queries, keys = P(cuts.rows, cuts.queries), P(cuts.rows, cuts.keys)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(queries, keys, P(*keys, cuts.values), cuts.mask(mask), queries, P()),
        out_specs=P(*queries, cuts.values),
        check_vma=False,
    )


def choose(implementation: str, case: GauCase, known: Mapping[str, Any]) -> str:
    """The implementation that serves this case: the named one, or with "auto" the first that serves and suits.

    Raises:
        ValueError: the name is unknown, or the named implementation cannot serve; the message says why.
    """
    check_implementation(implementation, known)
    if implementation == "auto":
        return next(name for name, each in known.items() if each.refusal(case) is None and each.suits(case))
    reason = known[implementation].refusal(case)
    if reason is not None:
        raise CannotServe(
            f"gated attention implementation {implementation!r} cannot serve: {reason}; take another, or 'auto' for "
            "the best that can"
        )
    return implementation


def check_implementation(name: str, known: Mapping[str, Any]) -> None:
    """Refuse a schedule that does not exist."""
    if name != "auto" and name not in known:
        names = ", ".join(repr(each) for each in ("auto", *known))
        raise ValueError(f"unknown gated attention implementation {name!r}; expected one of {names}")
