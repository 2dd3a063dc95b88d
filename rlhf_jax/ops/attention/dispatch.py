"""Attention with a choice of schedules, which changes speed and memory and never the meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention import blocked, partitioned, reference
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, CannotServe, Case, Terms, unproven
from rlhf_jax.ops.kernels import cudnn, hopper_attention, tpu_attention, triton_attention
from rlhf_jax.ops.meshes import active_mesh


@dataclass(frozen=True)
class Implementation:
    """A schedule: whether it can serve a case (None) or why not, the computation, and whether it suits ``auto``."""

    refusal: Callable[[Case], str | None]
    attend: Callable[..., tuple[jax.Array, jax.Array]]
    suits: Callable[[Case], bool] = lambda case: True


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": Implementation(cudnn.refusal, cudnn.attend),
    "hopper": Implementation(hopper_attention.refusal, hopper_attention.attend, unproven),
    "tpu": Implementation(tpu_attention.refusal, tpu_attention.attend, unproven),
    "triton": Implementation(triton_attention.refusal, triton_attention.attend, unproven),
    "blocked": Implementation(blocked.refusal, blocked.attend, blocked.suits),
    "reference": Implementation(reference.refusal, reference.attend),
}
"""In the order in which ``auto`` takes the first that serves and suits."""


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
    across: str = "auto",
) -> Float[Array, "B T H Dv"]:
    """``softmax(logits) v`` over the keys that the mask shows; query head ``h`` reads key head ``h // (H/K)``.

    The softmax is computed in fp32 (float64 inputs: in float64). A query that sees nothing gets 0 and passes finite
    gradients. On a mesh each device attends for its own rows, tokens and heads (``ops.attention.partitioned``).

    Args:
        q: queries.
        k: keys; ``H`` is a multiple of ``K``.
        v: values.
        mask: who sees whom.
        scale: factor on the logits, usually ``D ** -0.5``.
        softcap: see ``Terms``, as for ``slopes`` and ``sink_logits``.
        dropout: probability of dropping a weight; needs ``dropout_key``.
        dropout_key: randomness of the dropout; none is applied without it.
        implementation: one of ``IMPLEMENTATIONS``, or "auto" for the best that serves here.
        across: how keys reach queries on other devices, where the tokens of a row are on several: "gather", "ring", or
            "auto" to decide by the memory.
    """
    terms = Terms(scale=scale, softcap=softcap, slopes=slopes, sink_logits=sink_logits)
    if dropout > 0.0 and dropout_key is not None:
        _check_shapes(q, k, v)
        choose(implementation, Case.of(q, k, v, mask, terms, dropout=True))
        # In plain operations, which the partitioner splits; so each weight's fate depends on no mesh.
        return reference.attend(q, k, v, mask, terms, dropout=dropout, dropout_key=dropout_key)[0]
    return _attend(q, k, v, mask, terms, implementation, across, lse=False)[0]


def partial_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    implementation: str = "auto",
    across: str = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Attention over some of the keys: the output, and the log-sum-exp of the logits, for ``merge``."""
    return _attend(q, k, v, mask, terms, implementation, across, lse=True)


def merge(parts: list[tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]]) -> Float[Array, "B T H Dv"]:
    """Attention over all keys from attention over disjoint parts of them."""
    logs = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(jnp.maximum(logs.max(axis=0), HIDDEN / 2))
    weights = jnp.exp(logs - top)
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    mixed = sum(weight[..., None] * out.astype(weight.dtype) for weight, (out, _) in zip(weights, parts, strict=True))
    return jnp.asarray(mixed).astype(parts[0][0].dtype)


def _attend(q, k, v, mask: Mask, terms: Terms, implementation: str, across: str, lse: bool):
    _check_shapes(q, k, v)

    def here(q, k, v, mask: Mask, terms: Terms, lse: bool):
        """On one device."""
        name = choose(implementation, Case.of(q, k, v, mask, terms, lse=lse))
        return IMPLEMENTATIONS[name].attend(q, k, v, mask, terms)

    mesh = active_mesh()
    if mesh is None:
        return here(q, k, v, mask, terms, lse)
    return partitioned.attend(here, mesh, q, k, v, mask, terms, across=across, lse=lse)


def choose(implementation: str, case: Case) -> str:
    """The implementation that serves this case.

    Args:
        implementation: a name, or "auto".
        case: what is to be computed, and where.

    Raises:
        ValueError: the name is unknown, or the named implementation cannot serve; the message says why.
    """
    check_implementation(implementation)
    if implementation == "auto":
        serving = (name for name, each in IMPLEMENTATIONS.items() if _refusal(name, each, case) is None)
        return next(name for name in serving if IMPLEMENTATIONS[name].suits(case))
    reason = _refusal(implementation, IMPLEMENTATIONS[implementation], case)
    if reason is not None:
        raise CannotServe(
            f"attention implementation {implementation!r} cannot serve: {reason}; take another, or 'auto' for the "
            "best that can"
        )
    return implementation


def _refusal(name: str, implementation: Implementation, case: Case) -> str | None:
    if case.dropout and name != "reference":
        return "only 'reference' applies dropout to attention weights"
    return implementation.refusal(case)


def check_implementation(name: str) -> None:
    """Refuse a schedule that does not exist."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        known = ", ".join(repr(each) for each in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"unknown attention implementation {name!r}; expected one of {known}")


def _check_shapes(q, k, v) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together")
