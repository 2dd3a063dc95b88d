"""Attention on NVIDIA Hopper (H100, H200) through Mosaic GPU, forward and backward; not measured on a GPU yet.

Exact for every mask of ranges (causality, windows, prefixes, packing, ragged rows, caches) with sinks, and for grouped
heads, soft-caps, ALiBi slopes and sink logits. Products are of bf16 or fp16 numbers with fp32 sums, as is the softmax.
The backward pass is deterministic: one kernel for the queries' gradient, one for the keys' and values', nothing atomic.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import HIDDEN, Case, Terms
from rlhf_jax.ops.kernels import hopper_attention_backward as backward
from rlhf_jax.ops.kernels import hopper_attention_forward as forward
from rlhf_jax.ops.kernels.hopper_pieces import LOG2E, Plan
from rlhf_jax.ops.kernels.tiles import Visits, padded, sinks_of, visits

WIDEST = 256
MISCOMPILED_CUDA = range(12080, 12091)
"""Versions whose ptxas is known to miscompile such loops over masked tiles."""


@struct.dataclass
class Scene:
    """Who sees whom, in the form that the kernels read: vectors, and the tiles that each kernel visits."""

    queries: Int[Array, "B 4 T"]
    keys: Int[Array, "B 2 S"]
    forward: Visits
    by_query: Visits
    by_key: Visits
    slopes: Float[Array, " H"]


def refusal(case: Case) -> str | None:
    """Why these kernels cannot serve, or None."""
    if case.platform != "gpu" or not re.search(r"\bG?H(100|200|800|20)\b", case.device):
        return f"its kernels are for NVIDIA Hopper (H100, H200), and this device is {case.device!r}"
    if jax.__version_info__ < (0, 11, 1):
        return f"its kernels need JAX 0.11.1 or newer, and this is {jax.__version__}; newer ones need Python 3.12"
    if case.dtype not in ("bfloat16", "float16"):
        return f"its tensor cores take bfloat16 or float16, not {case.dtype}"
    if max(case.width, case.value_width) > WIDEST:
        return f"heads of width {max(case.width, case.value_width)} are wider than its registers hold ({WIDEST})"
    if case.rule.stride not in (None, 1) or case.rule.block is not None:
        return "it does not thin out ranges (stride) or add summary columns to them"
    if case.dropout:
        return "it does not apply dropout to attention weights"
    if (version := _cuda_version()) in MISCOMPILED_CUDA:
        return f"the compiler of CUDA {version // 1000}.{version % 1000 // 10} is known to miscompile it"
    return None


def _cuda_version() -> int:
    """Such as 13000; 0 where it is not known."""
    found = re.search(r"cuda (\d+)", jax.devices()[0].client.platform_version)
    return int(found[1]) if found else 0


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output and the natural log of each query's sum of exponentials; differentiable in q, k, v and sink logits.

    Lengths are padded to the tiles, widths to the next multiple of 64. ``interpret`` runs on a CPU (JAX >= 0.11.1).
    """
    length, heads, value_width = q.shape[1], q.shape[2], v.shape[3]
    width = -(-max(q.shape[3], value_width) // 64) * 64
    plan = Plan(
        width, terms.scale, terms.softcap, terms.slopes is not None, terms.sink_logits is not None, mask.rule, interpret
    )
    q, k, v = (_to_width(x, width) for x in (q, k, v))
    # One multiple that every kernel's tiles divide.
    mask = mask.padded(forward.QUERY_TILE, 128)
    q, k, v = padded(q, 1, forward.QUERY_TILE), padded(k, 1, 128), padded(v, 1, 128)
    out, lse = _attend(plan, q, k, v, sinks_of(terms, heads), _scene(plan, mask, terms, heads))  # pyright: ignore[reportGeneralTypeIssues]
    return out[:, :length, :, :value_width], lse.swapaxes(1, 2)[:, :length]


def _to_width(x: Float[Array, "B S K D"], width: int) -> Float[Array, "B S K W"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))


def _scene(plan: Plan, mask: Mask, terms: Terms, heads: int) -> Scene:
    width = plan.width
    queries = (mask.start, mask.end, mask.query_segments, mask.query_positions)
    # A key of segment 0 must not meet the queries of segment 0.
    keys = (mask.key_positions, jnp.where(mask.key_segments == 0, -1, mask.key_segments))
    by_key = mask.blocks(backward.query_step(width), backward.key_tile(plan)).swapaxes(1, 2)
    return Scene(
        queries=jnp.stack(queries, axis=1).astype(jnp.int32),
        keys=jnp.stack(keys, axis=1).astype(jnp.int32),
        forward=visits(mask.blocks(forward.QUERY_TILE, forward.key_tile(width))),
        by_query=visits(mask.blocks(backward.query_tile(width), backward.key_step(width))),
        by_key=visits(by_key),
        slopes=jnp.zeros(heads, jnp.float32) if terms.slopes is None else terms.slopes.astype(jnp.float32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, sinks, scene: Scene):
    return forward.forward(plan, q, k, v, scene.queries, scene.keys, scene.forward, scene.slopes, sinks)


def _attend_forward(plan: Plan, q, k, v, sinks, scene: Scene):
    out, lse = _attend(plan, q, k, v, sinks, scene)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (q, k, v, sinks, scene, out, lse)


def _attend_backward(plan: Plan, residuals, cotangents):
    q, k, v, sinks, scene, out, lse = residuals
    d_out, d_lse = cotangents
    products = jnp.einsum("bthd,bthd->bht", d_out.astype(jnp.float32), out.astype(jnp.float32))
    delta = products - d_lse
    # A query without keys gets weights of exactly 0.
    safe = jnp.where(lse <= HIDDEN / 2, 0.0, lse)
    stats = jnp.stack([safe * LOG2E, delta], axis=2)
    dq = backward.queries_gradient(plan, q, k, v, d_out, stats, scene.queries, scene.keys, scene.by_query, scene.slopes)
    dk, dv = backward.keys_gradient(plan, q, k, v, d_out, stats, scene.queries, scene.keys, scene.by_key, scene.slopes)
    d_sinks = -jnp.sum(jnp.exp(sinks[:, None] - safe) * delta, axis=(0, 2)) if plan.sinks else jnp.zeros_like(sinks)
    return dq, dk, dv, d_sinks, None


_attend.defvjp(_attend_forward, _attend_backward)
