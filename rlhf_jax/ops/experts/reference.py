"""Grouped matmuls over all experts at once: the definition. Its cost grows with the number of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.ops.kernels.grouped_schedule import GroupedCase


def refusal(case: GroupedCase) -> str | None:
    """It serves every case."""
    return None


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "X K N"], sizes: Int[Array, " X"], transpose_w: bool = False
) -> Float[Array, "M N"]:
    """See ``ops.experts.grouped_matmul``."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    own = members(sizes, x.shape[0])
    chosen = jnp.where(own[:, :, None], x[None], 0)
    matrix = "xnk" if transpose_w else "xkn"
    return jnp.einsum(f"xmk,{matrix}->mn", chosen, w, preferred_element_type=wide).astype(x.dtype)


def grouped_outer(x: Float[Array, "M K"], dy: Float[Array, "M N"], sizes: Int[Array, " X"]) -> Float[Array, "X K N"]:
    """``x' dy`` over the rows of each group; 0 for empty groups."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    own = members(sizes, x.shape[0])
    mine, theirs = (jnp.where(own[:, :, None], each[None], 0) for each in (x, dy))
    return jnp.einsum("xmk,xmn->xkn", mine, theirs, preferred_element_type=wide).astype(x.dtype)


def members(sizes: Int[Array, " X"], rows: int) -> Bool[Array, "X M"]:
    """Whether a row is of a group."""
    ends, row = jnp.cumsum(sizes)[:, None], jnp.arange(rows)
    return (row < ends) & (row >= ends - sizes[:, None])


def ragged_refusal(case: GroupedCase) -> str | None:
    """It serves every case; on CPU and GPU it costs what the dense form costs."""
    return None


def ragged_matmul(
    x: Float[Array, "M K"], w: Float[Array, "X K N"], sizes: Int[Array, " X"], transpose_w: bool = False
) -> Float[Array, "M N"]:
    """The same by ``jax.lax.ragged_dot``."""
    own = _real(x, sizes)
    y = jax.lax.ragged_dot(jnp.where(own, x, 0), w.swapaxes(1, 2) if transpose_w else w, sizes,
                           preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))  # fmt: skip
    return jnp.where(own, y, 0.0).astype(x.dtype)


def ragged_outer(x: Float[Array, "M K"], dy: Float[Array, "M N"], sizes: Int[Array, " X"]) -> Float[Array, "X K N"]:
    """``x' dy`` over the rows of each group, by ``jax.lax.ragged_dot_general``."""
    own = _real(x, sizes)
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(
        jnp.where(own, x, 0), jnp.where(own, dy, 0), sizes, numbers,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    ).astype(x.dtype)  # fmt: skip


def _real(x: Float[Array, "M K"], sizes: Int[Array, " X"]) -> Bool[Array, "M 1"]:
    """Rows that are of a group."""
    return jnp.arange(x.shape[0])[:, None] < sizes.sum()
