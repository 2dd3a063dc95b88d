"""Grouped matmuls with a choice of schedules, which changes speed and memory and never the meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.terms import CannotServe, this_device, unproven
from rlhf_jax.ops.experts import blocked, reference
from rlhf_jax.ops.kernels import hopper_grouped, tpu_grouped
from rlhf_jax.ops.kernels.grouped_schedule import GroupedCase


@dataclass(frozen=True)
class GroupedImplementation:
    """A schedule: whether it can serve a case (None) or why not, its two products, and whether it suits ``auto``."""

    refusal: Callable[[GroupedCase], str | None]
    matmul: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    suits: Callable[[GroupedCase], bool] = lambda case: True


GROUPED_IMPLEMENTATIONS: dict[str, GroupedImplementation] = {
    "hopper": GroupedImplementation(
        hopper_grouped.refusal, hopper_grouped.grouped_matmul, hopper_grouped.grouped_outer, unproven
    ),
    "tpu": GroupedImplementation(tpu_grouped.refusal, tpu_grouped.grouped_matmul, tpu_grouped.grouped_outer, unproven),
    "ragged": GroupedImplementation(
        reference.ragged_refusal,
        reference.ragged_matmul,
        reference.ragged_outer,
        lambda case: case.platform == "tpu",
    ),
    "blocked": GroupedImplementation(blocked.refusal, blocked.grouped_matmul, blocked.grouped_outer),
    "reference": GroupedImplementation(reference.refusal, reference.grouped_matmul, reference.grouped_outer),
}
"""In the order in which ``auto`` takes the first that serves and suits."""


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "X K N"],
    sizes: Int[Array, " X"],
    *,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group; rows behind the last group give 0 and get no gradient.

    Summed in fp32 (float64 inputs: in float64); what stands in rows behind the last group does not matter.

    Args:
        x: rows sorted by group.
        w: a matrix for each group.
        sizes: rows of each group, 0 for empty ones; their sum is at most M.
        implementation: one of ``GROUPED_IMPLEMENTATIONS``, or "auto" for the best that serves here.

    Raises:
        ValueError: shapes do not fit, or the named implementation is unknown or cannot serve.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
        raise ValueError(f"rows {x.shape}, matrices {w.shape} and sizes {sizes.shape} do not fit together")
    name = choose(implementation, case_of(x, w))
    return _grouped(x, w.astype(x.dtype), sizes, name)


def _grouped_plain(x, w, sizes, name: str):
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    return GROUPED_IMPLEMENTATIONS[name].matmul(x, w, sizes)


def _forward(x, w, sizes, name: str):
    return _grouped(x, w, sizes, name), (x, w, sizes)


def _backward(name: str, kept, cotangent):
    x, w, sizes = kept
    if x.shape[0] == 0:
        return jnp.zeros_like(x), jnp.zeros_like(w), None
    chosen = GROUPED_IMPLEMENTATIONS[name]
    return chosen.matmul(cotangent, w, sizes, transpose_w=True), chosen.outer(x, cotangent, sizes), None


_grouped = jax.custom_vjp(_grouped_plain, nondiff_argnums=(3,))
_grouped.defvjp(_forward, _backward)


def case_of(x: Float[Array, "M K"], w: Float[Array, "X K N"]) -> GroupedCase:
    """The case of these arguments on the device that JAX runs on by default."""
    platform, device = this_device()
    return GroupedCase(platform, device, x.shape[0], w.shape[1], w.shape[2], w.shape[0], jnp.dtype(x.dtype).name)


def choose(implementation: str, case: GroupedCase) -> str:
    """The implementation that serves this case: the named one, or with "auto" the first that serves and suits.

    Raises:
        ValueError: the name is unknown, or the named implementation cannot serve; the message says why.
    """
    check_implementation(implementation)
    if implementation == "auto":
        serving = (name for name in GROUPED_IMPLEMENTATIONS if _refusal(name, case) is None)
        return next(name for name in serving if GROUPED_IMPLEMENTATIONS[name].suits(case))
    reason = _refusal(implementation, case)
    if reason is not None:
        raise CannotServe(
            f"grouped matmul implementation {implementation!r} cannot serve: {reason}; take another, or 'auto' for the "
            "best that can"
        )
    return implementation


def _refusal(name: str, case: GroupedCase) -> str | None:
    """Of the product or of its gradient, where the sides of the matrices are swapped."""
    refuses = GROUPED_IMPLEMENTATIONS[name].refusal
    reason = refuses(case)
    return refuses(replace(case, k=case.n, n=case.k)) if reason is None else reason


def check_implementation(name: str) -> None:
    """Refuse a schedule that does not exist."""
    if name != "auto" and name not in GROUPED_IMPLEMENTATIONS:
        names = ", ".join(repr(each) for each in ("auto", *GROUPED_IMPLEMENTATIONS))
        raise ValueError(f"unknown grouped matmul implementation {name!r}; expected one of {names}")
