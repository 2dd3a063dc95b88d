"""FLASH on a mesh: each device has its own rows, its own tokens of them, and its own part of the values' width.

Where the tokens of a row are on several devices, what a device needs of those before is small: the sum of ``k' v`` that
the linear part reads and, in packed rows, the last chunk of the device before, whose tokens may share a chunk with its
first. Nothing of a whole row is gathered. Parts that are no whole number of chunks are not cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from rlhf_jax.ops.attention.partitioned import Cuts
from rlhf_jax.ops.meshes import ways
from rlhf_jax.types import Context

Tokens = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""Local queries and keys, global queries and keys, values."""


@dataclass(frozen=True)
class Part:
    """One device's part of each row.

    Args:
        axis: mesh axis of the devices of a row.
        size: how many they are.
        chunk: tokens of a chunk, of which each device has a whole number.
    """

    axis: str
    size: int
    chunk: int

    def passed(self, tree: Any) -> Any:
        """What the device before has; zeros on the first."""
        pairs = [(device, device + 1) for device in range(self.size - 1)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def each(self, x: Array) -> Array:
        """What all devices of the row have, [size, ...]."""
        return jax.lax.all_gather(x, self.axis)


def attend(
    rows: Callable[..., Float[Array, "B T E"]],
    chunks: Callable[..., Float[Array, "B T E"]],
    mesh: Any,
    tokens: Tokens,
    context: Context,
    divisor: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    *,
    chunk: int,
) -> Float[Array, "B T E"]:
    """``flash_attention`` in parts.

    Args:
        rows: that function on one device: (tokens, context, divisor, bias).
        chunks: the same for one document a row, after earlier tokens: (tokens, context, divisor, bias, state).
        mesh: what ``active_mesh`` found.
        tokens: queries, keys and values.
        context: where they stand.
        divisor: of the quadratic part.
        bias: of the quadratic part, or None.
        chunk: tokens of a chunk.
    """
    count, length, width = tokens[-1].shape
    cuts = Cuts.of(mesh, count, length, length, 1, 1, width)
    axis = cuts.queries
    if cuts.queries_apart and length // ways(mesh, axis) % chunk:
        axis = None

    def one_device(tokens, context, divisor, bias):
        if axis is None or not cuts.queries_apart:
            return rows(tokens, context, divisor, bias)
        part = Part(axis, ways(mesh, axis), chunk)
        if context.packed:
            return _packed(rows, part, tokens, context, divisor, bias)
        before = _before(part, _summed(tokens, context.segments != 0))
        return chunks(tokens, context, divisor, bias, before)

    narrow, values, numbers = P(cuts.rows, axis, None), P(cuts.rows, axis, cuts.values), P(cuts.rows, axis)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=((*[narrow] * 4, values), jax.tree.map(lambda _: numbers, context), numbers, P()),
        out_specs=values,
        check_vma=False,
    )(tokens, context, divisor, bias)


def continued(
    here: Callable[..., tuple[jax.Array, jax.Array]],
    mesh: Any,
    tokens: Tokens,
    lengths: Array,
    divisor: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    state: Float[Array, "B D E"],
) -> tuple[Float[Array, "B T E"], Float[Array, "B D E"]]:
    """``flash_attention_chunks`` in parts of rows and widths; ``here`` is one device's, with the same arguments."""
    count, _, width = tokens[-1].shape
    cuts = Cuts.of(mesh, count, 1, 1, 1, 1, width)
    rows, wide = P(cuts.rows), P(cuts.rows, None, cuts.values)  # whole rows also where devices share them
    return jax.shard_map(
        here,
        mesh=mesh,
        in_specs=((*[rows] * 4, wide), rows, rows, P(), wide),
        out_specs=(wide, wide),
        check_vma=False,
    )(tokens, lengths, divisor, bias, state)


def _summed(tokens: Tokens, counted: Bool[Array, "B t"]) -> Float[Array, "B D E"]:
    """The sum of ``k' v`` over the counted tokens, in fp32 or wider."""
    *_, k_global, v = tokens
    wide = jnp.promote_types(v.dtype, jnp.float32)
    k_global = jnp.where(counted[..., None], k_global, 0.0)
    return jnp.einsum("btd,bte->bde", k_global, v, preferred_element_type=wide)


def _before(part: Part, own: Array) -> Array:
    """The sum of what the devices before this one have."""
    all_parts = part.each(own)
    earlier = jnp.arange(part.size) < jax.lax.axis_index(part.axis)
    return jnp.tensordot(earlier.astype(own.dtype), all_parts, 1)


def _packed(rows: Callable, part: Part, tokens: Tokens, context: Context, divisor, bias) -> Float[Array, "B t E"]:
    """Documents may begin anywhere, so the last chunk of the device before comes along, without queries.

    Tokens before that chunk are never in one chunk with a query here. Queries see them through the sum over those of
    their document, which is the one that the device before ends with.
    """
    chunk, length = part.chunk, divisor.shape[1]
    (halo, divisors) = part.passed(jax.tree.map(lambda x: x[:, -chunk:], ((*tokens, context), divisor)))
    positions, segments = context.positions, context.segments
    longer = [jnp.concatenate([old, new], axis=1) for old, new in zip(halo[:5], tokens, strict=True)]
    seen = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), halo[5], context)
    # The first device got zeros, which divide nothing.
    divisors = jnp.concatenate([jnp.where(divisors == 0.0, 1.0, divisors), divisor], axis=1)
    near = rows(tuple(longer), seen, divisors, bias)[:, chunk:]

    begins = jnp.arange(length) - positions  # the slot of its document's first token, negative on an earlier device
    last = begins[:, -1:]
    mine = (segments != 0) & (begins == last) & (segments[:, -1:] != 0)
    goes_on = mine[:, -1] & (last[:, 0] < 0)
    far = _far_before(part, tokens, mine, goes_on)
    q_global, v = tokens[2], tokens[4]
    reaches = (segments != 0) & (begins < 0)
    query = jnp.where(reaches[..., None], q_global, 0.0).astype(v.dtype)
    read = jnp.einsum("btd,bde->bte", query, far.astype(v.dtype), preferred_element_type=far.dtype)
    return (near + read).astype(v.dtype)


def _far_before(part: Part, tokens: Tokens, mine: Bool[Array, "B t"], goes_on: Bool[Array, " B"]):
    """The sum over the document that the device before ends with, without that device's last chunk.

    Args:
        part: of the row.
        tokens: of this device.
        mine: which of them belong to the document that it ends with.
        goes_on: whether that document began on an earlier device.
    """
    slots = jnp.arange(mine.shape[1])
    without = part.passed(_summed(tokens, mine & (slots < mine.shape[1] - part.chunk)))
    sums, older = part.each(_summed(tokens, mine)), part.each(goes_on)
    # Of each device, the sum over its last document on it and on all devices before it.
    whole = [jnp.zeros_like(sums[0])]
    for own, began_before in zip(sums, older, strict=True):
        whole.append(own + jnp.where(began_before[:, None, None], whole[-1], 0.0))
    device = jax.lax.axis_index(part.axis)
    two_before = jnp.stack(whole)[jnp.maximum(device - 1, 0)]
    return without + jnp.where(part.passed(goes_on)[:, None, None], two_before, 0.0)
