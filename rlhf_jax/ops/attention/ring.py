"""Attention over a ring of devices: queries stay, keys and values travel (arXiv 2310.01889).

Each device holds one part of a row's tokens. In each step it attends to the keys that it has, merges that with what it
had by the log-sum-exps, and passes the keys on. Backwards they go round again, with their gradients. What a device
holds never grows with the whole length. Runs inside ``shard_map``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask, Rule
from rlhf_jax.ops.attention.terms import HIDDEN, Terms


@dataclass(frozen=True)
class Ring:
    """Who computes, and how far keys travel.

    Args:
        here: attention over one part of the keys, with its log-sum-exp; differentiable.
        axis: mesh axis of the devices of a row.
        size: how many they are.
        steps: parts of the keys that each device meets, its own first, then those of the devices before it.
    """

    here: Callable[..., tuple[jax.Array, jax.Array]]
    axis: str
    size: int
    steps: int

    def passed(self, tree, by: int = 1):
        """What the device ``by`` places before this one had."""
        pairs = [(device, (device + by) % self.size) for device in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)


def steps(mask: Mask, size: int) -> int:
    """How many parts of the keys any device's queries can see; fewer than all where a window says so.

    Args:
        mask: of one device's queries and its own part of the keys.
        size: devices of the ring.
    """
    if not mask.aligned or not mask.causal or mask.window is None or mask.rule != Rule():
        return size
    # The last key of the part ``n`` before the own one lies ``(n - 1) * slots + 1`` before the first query.
    slots = mask.key_positions.shape[1]
    return min(size, 1 + -(-(mask.window - 1) // slots))


def attend(
    ring: Ring,
    q: Float[Array, "B t H D"],
    k: Float[Array, "B s K D"],
    v: Float[Array, "B s K Dv"],
    mask: Mask,
    terms: Terms,
) -> tuple[Float[Array, "B t H Dv"], Float[Array, "B t H"]]:
    """This device's queries over the keys of all devices of the ring: the output and the log-sum-exp.

    Args:
        ring: who computes.
        q: queries of this device.
        k: its keys.
        v: its values.
        mask: of its queries and its keys.
        terms: what else the logits are made of.
    """
    return _attend(ring, q, k, v, mask.replace(aligned=False), terms)  # pyright: ignore[reportAttributeAccessIssue]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, q, k, v, mask: Mask, terms: Terms):
    plain = terms.replace(sink_logits=None)  # pyright: ignore[reportAttributeAccessIssue]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def meet(keys, state):
        k, v, positions, segments = keys
        part = mask.replace(key_positions=positions, key_segments=segments)  # pyright: ignore[reportAttributeAccessIssue]
        return _joined(state, ring.here(q, k, v, part, plain))

    def step(_, carry):
        keys, state = carry
        return ring.passed(keys), meet(keys, state)

    numbers = q.shape[:3]
    state = jnp.zeros((*numbers, v.shape[3]), wide), jnp.full(numbers, HIDDEN, wide)
    keys, state = jax.lax.fori_loop(0, ring.steps - 1, step, ((k, v, mask.key_positions, mask.key_segments), state))
    out, lse = meet(keys, state)
    if terms.sink_logits is not None:
        sink = jnp.broadcast_to(terms.sink_logits.astype(wide), numbers)
        out, lse = _joined((out, lse), (jnp.zeros_like(out), sink))
    return out.astype(q.dtype), lse


def _attend_forward(ring: Ring, q, k, v, mask: Mask, terms: Terms):
    out, lse = _attend(ring, q, k, v, mask, terms)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (q, k, v, mask, terms, out, lse)


def _attend_backward(ring: Ring, residuals, cotangents):
    """A part's output has the weight ``w = exp(its lse - lse)`` in the whole, so its cotangents are ``w dout`` and
    ``w (dout (its out - out) + dlse)``. Gradients are summed, and travel, in fp32 or wider."""
    q, k, v, mask, terms, out, lse = residuals
    dout, dlse = cotangents
    wide = lse.dtype
    dout, out = dout.astype(wide), out.astype(wide)
    plain = terms.replace(sink_logits=None)

    def meet(keys, sums):
        k, v, positions, segments = keys
        part = mask.replace(key_positions=positions, key_segments=segments)
        (own, log), pull_back = jax.vjp(lambda q, k, v: ring.here(q, k, v, part, plain), q, k, v)
        weight = jnp.where(log <= HIDDEN / 2, 0.0, jnp.exp(log - lse))
        dlog = weight * (jnp.einsum("bthd,bthd->bth", dout, own.astype(wide) - out) + dlse)
        new = pull_back(((weight[..., None] * dout).astype(own.dtype), dlog.astype(log.dtype)))
        return jax.tree.map(lambda total, x: total + x.astype(wide), sums, new)

    def step(_, carry):
        keys, (dq, *dkeys) = carry
        dq, *dkeys = meet(keys, (dq, *dkeys))
        keys, dkeys = ring.passed((keys, dkeys))
        return keys, (dq, *dkeys)

    sums = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    keys = (k, v, mask.key_positions, mask.key_segments)
    keys, sums = jax.lax.fori_loop(0, ring.steps - 1, step, (keys, sums))
    dq, *dkeys = meet(keys, sums)
    dk, dv = ring.passed(dkeys, by=1 - ring.steps) if ring.steps > 1 else dkeys
    dterms = jax.tree.map(jnp.zeros_like, terms)
    if terms.sink_logits is not None:
        delta = jnp.einsum("bthd,bthd->bth", dout, out) - dlse
        dsink = -(jnp.exp(terms.sink_logits.astype(wide) - lse) * delta).sum(axis=(0, 1))
        dterms = dterms.replace(sink_logits=dsink.astype(terms.sink_logits.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dterms


_attend.defvjp(_attend_forward, _attend_backward)


def _joined(state, part):
    """Attention over two parts of the keys, where a query that sees none of a part has ``HIDDEN`` for it."""
    (out, lse), (more, log) = state, part
    top = jnp.maximum(jnp.maximum(lse, log), HIDDEN / 2)
    old, new = jnp.exp(lse - top), jnp.exp(log - top)
    total = old + new
    divisor = jnp.where(total == 0.0, 1.0, total)
    mixed = (old[..., None] * out + new[..., None] * more.astype(out.dtype)) / divisor[..., None]
    return mixed, jnp.where(total == 0.0, HIDDEN, top + jnp.log(divisor))
