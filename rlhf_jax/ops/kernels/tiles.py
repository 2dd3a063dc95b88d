"""What the portable attention kernels share: which tiles to visit, the logits of one tile, and the derivative.

A kernel brings two functions over whole arrays in its own layout, forward and backward; ``differentiable`` joins them.
The choice of tiles and of the layout of arrays stays with each kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import ALL, NOTHING, Mask, Rule
from rlhf_jax.ops.attention.terms import HIDDEN, Terms

POSITION, START, END, SEGMENT = 0, 1, 2, 3
"""Rows of ``Scene.queries``."""
KEY_POSITION, KEY_SEGMENT = 0, 1
"""Rows of ``Scene.keys``."""


@dataclass(frozen=True)
class Plan:
    """The static facts of one call: tiles, the logits' terms, and on which axis of ``q`` its heads lie."""

    query_tile: int
    key_tile: int
    terms: Terms
    rule: Rule
    sloped: bool
    head_axis: int
    interpret: bool = False
    backward_tiles: tuple[int, int] | None = None

    @classmethod
    def of(cls, mask: Mask, terms: Terms, query_tile: int, key_tile: int, **rest) -> Plan:
        """The plan of a call."""
        static = Terms(scale=terms.scale, softcap=terms.softcap)
        return cls(query_tile, key_tile, static, mask.rule, terms.slopes is not None, **rest)

    @property
    def backward(self) -> Plan:
        """The plan of the gradient, whose tiles may be other ones."""
        if self.backward_tiles is None:
            return self
        return replace(self, query_tile=self.backward_tiles[0], key_tile=self.backward_tiles[1])

    @property
    def multiples(self) -> tuple[int, int]:
        """What the lengths of queries and keys are padded to multiples of; tiles are powers of two or equal."""
        return max(self.query_tile, self.backward.query_tile), max(self.key_tile, self.backward.key_tile)


@struct.dataclass
class Visits:
    """Which tiles of the other side each tile has to visit: ``order[:partial]`` masked, up to ``total`` unmasked."""

    order: Int[Array, "B n m"]
    partial: Int[Array, "B n"]
    total: Int[Array, "B n"]


@struct.dataclass
class Scene:
    """Who sees whom, in the form that kernels read; the mask is padded as the plan says."""

    queries: Int[Array, "B 4 T"]
    keys: Int[Array, "B 2 S"]
    mask: Mask
    slopes: Float[Array, " H"]

    def by_query(self, plan: Plan) -> Visits:
        """The tiles of keys that each tile of queries visits."""
        return visits(self.mask.blocks(plan.query_tile, plan.key_tile))

    def by_key(self, plan: Plan) -> Visits:
        """The tiles of queries that each tile of keys visits."""
        return visits(self.mask.blocks(plan.query_tile, plan.key_tile).swapaxes(1, 2))


def visits(blocks: Int[Array, "B n m"]) -> Visits:
    """For each tile the others that it meets, those that need a mask first."""
    # NOTHING, SOME, ALL = 0, 1, 2 sort as 2, 0, 1.
    order = jnp.argsort((blocks - 1) % 3, axis=-1, stable=True).astype(jnp.int32)
    total = (blocks != NOTHING).sum(-1, dtype=jnp.int32)
    return Visits(order, total - (blocks == ALL).sum(-1, dtype=jnp.int32), total)


def scene(plan: Plan, mask: Mask, terms: Terms, heads: int) -> Scene:
    """The mask, padded to the tiles, as arrays of positions."""
    mask = mask.padded(*plan.multiples)
    # A key of segment 0 must not meet the queries of segment 0.
    segments = jnp.where(mask.key_segments == 0, -1, mask.key_segments)
    queries = (mask.query_positions, mask.start, mask.end, mask.query_segments)
    return Scene(
        queries=jnp.stack(queries, axis=1).astype(jnp.int32),
        keys=jnp.stack((mask.key_positions, segments), axis=1).astype(jnp.int32),
        mask=mask,
        slopes=jnp.zeros(heads, jnp.float32) if terms.slopes is None else terms.slopes.astype(jnp.float32),
    )


def tile_logits(plan: Plan, products, queries, keys, slope, masked: bool):
    """The logits of one tile, hidden ones at ``HIDDEN``, and the same before slopes and mask.

    Args:
        plan: the static facts.
        products: unscaled products of a tile.
        queries: position, start, end and segment, each to broadcast against the tile.
        keys: position and segment, likewise.
        slope: of the head or heads of this tile, or None.
        masked: False where every query of the tile sees every key.
    """
    plain = plan.terms.logits(products, None, None, None)
    logits = plain
    if slope is not None:
        logits = logits - slope * (queries[POSITION] - keys[KEY_POSITION]).astype(logits.dtype)
    if masked:
        shown = plan.rule.visible(queries[POSITION], queries[START], queries[END], keys[KEY_POSITION])
        logits = jnp.where(shown & (queries[SEGMENT] == keys[KEY_SEGMENT]), logits, HIDDEN)
    return logits, plain


def padded(x: Array, axis: int, multiple: int) -> Array:
    """Zeros behind ``x``, up to a multiple."""
    missing = -x.shape[axis] % multiple
    return x if missing == 0 else jnp.pad(x, [(0, missing if at == axis else 0) for at in range(x.ndim)])


def differentiable(
    forward: Callable[..., tuple[Array, Array]], backward: Callable[..., tuple[Array, Array, Array]]
) -> Callable[..., tuple[Array, Array]]:
    """``attend(plan, q, k, v, sinks, scene) -> (out, lse)``, differentiable in q, k, v and sinks.

    Args:
        forward: ``(plan, q, k, v, sinks, scene) -> (out, lse)`` in the kernel's own layout, ``lse`` shaped as ``out``
            without its last axis.
        backward: ``(plan, q, k, v, scene, lse, delta, cotangent) -> (dq, dk, dv)``; ``lse`` is 0 where nothing is seen,
            so that hidden logits give weights of exactly 0, and ``delta`` holds both cotangents: the weights' cotangent
            is ``weights * (cotangent v - delta)``.
    """

    def attend(plan: Plan, q, k, v, sinks, scene: Scene):
        return forward(plan, q, k, v, sinks, scene)

    def attend_forward(plan: Plan, q, k, v, sinks, scene: Scene):
        out, lse = forward(plan, q, k, v, sinks, scene)
        return (out, lse), (q, k, v, sinks, scene, out, lse)

    def attend_backward(plan: Plan, residuals, cotangents):
        q, k, v, sinks, scene, out, lse = residuals
        d_out, d_lse = cotangents
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
        safe = jnp.where(lse <= HIDDEN / 2, 0.0, lse)
        dq, dk, dv = backward(plan.backward, q, k, v, scene, safe, delta, d_out)
        by_head = jnp.expand_dims(sinks, [at for at in range(3) if at != plan.head_axis])
        d_sinks = -jnp.sum(jnp.exp(by_head - safe) * delta, axis=[at for at in range(3) if at != plan.head_axis])
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None

    differentiated = jax.custom_vjp(attend, nondiff_argnums=(0,))
    differentiated.defvjp(attend_forward, attend_backward)
    return differentiated


def sinks_of(terms: Terms, heads: int) -> Float[Array, " H"]:
    """The logit of each head's sink; without any, one that weighs exactly nothing."""
    return jnp.full(heads, HIDDEN, jnp.float32) if terms.sink_logits is None else terms.sink_logits.astype(jnp.float32)


def product(a, b, contracted: tuple[int, int]):
    """``a b`` in fp32, over one axis of each; fp32 operands keep their full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def compute_capability() -> float | None:
    """Of the NVIDIA GPU that a program is traced for, or JAX runs on by default; None on any other device."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None and jax.default_backend() != "gpu":
        # Descriptions of devices that are not there have a name and no capability.
        return 9.0 if named.platform == "gpu" and named.device_kind.startswith(("NVIDIA H100", "NVIDIA H200")) else None
    try:
        return float(getattr(jax.devices()[0], "compute_capability", "none"))
    except ValueError:
        return None
