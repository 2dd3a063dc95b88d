"""Decode state that keeps some tokens of each row, each in a slot that follows from its position.

A layer that sees only part of the past needs no slot for every token. Here the caller names the slot of each position
(``ring`` is the usual choice); rows may be of different lengths, padding is dropped, and where several new tokens claim
a slot the last one gets it. The state carries its own positions and segments, from which masks are computed, so it does
not matter in which order the slots are filled.

How a mixer uses it::

    def empty_cache(self, rows, slots, d_model, dtype):
        return Kept.empty(rows, min(self.window, slots), dtype, keys=(K, D), values=(K, D))

    slots = ring(positions, self.window)
    if tokens == 1:  # decoding: enter the token, then read what is kept
        cache = cache.write(context, slots, keys=k, values=v)
        seen, keys = cache.contents, cache.context
    else:  # a chunk: read what was kept and the chunk, then enter it
        seen, keys = cache.beside(context, keys=k, values=v)
        cache = cache.write(context, slots, keys=k, values=v)
    mask = Mask.ranges(context, keys, window=self.window)

The order matters: the first tokens of a chunk still see what its last tokens displace. A state that is enlarged by
zeros behind each axis stays right as long as the slot of a position below the old number of slots does not change.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Context


@struct.dataclass
class Kept:
    """Some tokens of each row.

    ``contents`` are by name what is kept of a token, [B, ..., S, D] with any axes (heads) between the rows and the
    slots. Slots of segment 0 are free.
    """

    contents: dict[str, Float[Array, "B ... S D"]]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]

    @classmethod
    def empty(cls, rows: int, slots: int, dtype, **shapes: tuple[int, ...]) -> Kept:
        """All slots free. ``shapes`` are those of one token: ``(D,)``, or ``(K, D)`` for heads before the slots."""
        contents = {
            name: jnp.zeros((rows, *shape[:-1], slots, shape[-1]), dtype) for name, shape in sorted(shapes.items())
        }
        return cls(contents, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), jnp.int32))

    @property
    def context(self) -> Context:
        """Where the kept tokens stand, for masks."""
        return Context(self.positions, self.segments)

    def write(self, context: Context, slots: Int[Array, "B T"], **new: Float[Array, "B ... T D"]) -> Kept:
        """Enter new tokens.

        Args:
            context: of the new tokens; those of segment 0 are dropped.
            slots: of each new token; one that is out of range drops the token. The last token of a row that names a
                slot gets it.
            new: what is kept of the tokens, laid out like ``contents``.
        """
        assert new.keys() == self.contents.keys(), (sorted(new), sorted(self.contents))
        total = self.positions.shape[1]
        slots = jnp.where((context.segments != 0) & (slots >= 0), slots, total)
        one = slots.shape[1] == 1
        enter = functools.partial(_enter_one, slots[:, 0]) if one else functools.partial(_enter_many, slots)
        return Kept(
            {name: enter(old, new[name], -2) for name, old in self.contents.items()},
            enter(self.positions, context.positions, -1),
            enter(self.segments, context.segments, -1),
        )

    def beside(
        self, context: Context, **new: Float[Array, "B ... T D"]
    ) -> tuple[dict[str, Float[Array, "B ... S+T D"]], Context]:
        """What is kept and the new tokens behind it, which are not entered: the keys that a chunk attends to."""
        assert new.keys() == self.contents.keys(), (sorted(new), sorted(self.contents))
        contents = {
            name: jnp.concatenate([old, new[name].astype(old.dtype)], axis=-2) for name, old in self.contents.items()
        }
        positions = jnp.concatenate([self.positions, context.positions.astype(jnp.int32)], axis=1)
        segments = jnp.concatenate([self.segments, context.segments.astype(jnp.int32)], axis=1)
        return contents, Context(positions, segments)


def ring(positions: Int[Array, "B T"], size: int, first: int = 0) -> Int[Array, "B T"]:
    """Slots of the last ``size`` positions, behind those of the ``first`` positions, which are never displaced."""
    return jnp.where(positions < first, positions, first + (positions - first) % size)


def _enter_one(slot: Int[Array, "B"], old: Array, new: Array, axis: int) -> Array:
    """One token a row, in place where the compiler can; ``axis`` is that of the slots and of the tokens."""
    between = (slice(None),) * (old.ndim + axis - 1)
    token = jnp.squeeze(new, axis).astype(old.dtype)
    return old.at[(jnp.arange(old.shape[0]), *between, slot)].set(token, mode="drop", unique_indices=True)


def _enter_many(slots: Int[Array, "B T"], old: Array, new: Array, axis: int) -> Array:
    """The last of the tokens that name a slot; read rather than scattered, so that duplicates have a meaning."""
    numbers = jnp.arange(slots.shape[1], dtype=jnp.int32)
    named = slots[:, :, None] == jnp.arange(old.shape[axis], dtype=jnp.int32)
    last = jnp.where(named, numbers[:, None], -1).max(axis=1)
    place = [1] * old.ndim
    place[0], place[axis] = last.shape
    last = last.reshape(place)
    taken = jnp.take_along_axis(new.astype(old.dtype), jnp.maximum(last, 0), axis=axis)
    return jnp.where(last >= 0, taken, old)
