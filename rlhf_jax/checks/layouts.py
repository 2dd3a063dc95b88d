"""Who sees whom in the checks: each kind of mask twice, as the ``Mask`` under test and by its plain definition."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.ops.attention import Mask, Rule
from rlhf_jax.types import Context


@dataclass(frozen=True, eq=False)
class Places:
    """Positions and segments of tokens, [B, T] each; segment 0 is padding."""

    positions: Int[np.ndarray, "B T"]
    segments: Int[np.ndarray, "B T"]
    packed: bool = True

    def context(self) -> Context:
        return Context(jnp.asarray(self.positions), jnp.asarray(self.segments), packed=self.packed)


@dataclass(frozen=True, eq=False)
class Layout:
    """Queries, keys (None: the queries' own tokens) and what narrows or widens the causal range."""

    queries: Places
    keys: Places | None = None
    window: int | None = None
    prefix: int = 0
    rule: Rule = Rule()

    @property
    def shown(self) -> Places:
        """The keys."""
        return self.queries if self.keys is None else self.keys

    def mask(self) -> Mask:
        """The mask under test."""
        queries = self.queries.context()
        keys = queries if self.keys is None else self.keys.context()
        return Mask.ranges(queries, keys, window=self.window, prefix=self.prefix, rule=self.rule)

    def seen(self) -> Bool[np.ndarray, "B T S"]:
        """Who sees whom, from the definitions and without ``Mask``."""
        at, key = self.queries.positions[:, :, None], self.shown.positions[:, None, :]
        own, other = self.queries.segments[:, :, None], self.shown.segments[:, None, :]
        back, rule = at - key, self.rule
        near = np.ones_like(back, bool) if self.window is None else back < self.window
        if rule.stride is not None:
            near &= back % rule.stride == 0
        if rule.block is not None:
            near |= key % rule.block >= rule.block - rule.columns
        near |= key < rule.sinks
        past = (back >= 0) & near
        ahead = (at < self.prefix) & (key < self.prefix)
        return (own == other) & (own != 0) & (past | ahead)


def one_each(lengths: list[int], width: int) -> Places:
    """One document a row, padding behind it."""
    slots = np.broadcast_to(np.arange(width, dtype=np.int32), (len(lengths), width))
    real = slots < np.array(lengths)[:, None]
    return Places(slots * real, real.astype(np.int32), packed=False)


def packed(rows: list[list[tuple[int, int]]], width: int) -> Places:
    """Documents one behind the other, each a (segment, length); padding behind them."""
    positions, segments = np.zeros((2, len(rows), width), np.int32)
    for row, documents in enumerate(rows):
        at = 0
        for segment, length in documents:
            positions[row, at : at + length], segments[row, at : at + length] = np.arange(length), segment
            at += length
        assert at <= width
    return Places(positions, segments)


def documents(length: int) -> Places:
    """Two rows of packed documents: one of a single token, segments that are not in order, padding behind."""
    if length < 5:
        return packed([[(1, length)], [(3, length - 1)]], length)
    third = length // 3
    return packed([[(2, third), (7, 1), (1, length - third - 1)], [(1, length - third - 2), (4, third)]], length)


def gaps(length: int) -> Layout:
    """New tokens over a cache: ragged prompts left free slots behind them, and later slots are still free."""
    old, new = length - length // 3, length // 3 + 1
    prompts = [old, max(1, old // 2)]
    earlier = one_each(prompts, old)
    positions = np.stack([np.arange(start, start + new) for start in prompts]).astype(np.int32)
    later = Places(positions, np.ones_like(positions))
    free = np.zeros((2, 3), np.int32)
    joined = [
        np.concatenate([getattr(earlier, name), getattr(later, name), free], axis=1)
        for name in ("positions", "segments")
    ]
    return Layout(later, Places(joined[0], joined[1]))


def ring(length: int, window: int) -> Layout:
    """One new token a row over a ring of the last ``window`` positions, which lie in no order; one row is short."""
    last = np.array([[length - 1], [max(0, window // 2 - 1)]], np.int32)
    slots = np.arange(window, dtype=np.int32)[None, :]
    positions = last - (last - slots) % window
    there = positions >= 0
    return Layout(Places(last, np.ones_like(last)), Places(positions * there, there.astype(np.int32)), window=window)


def empty(length: int) -> Layout:
    """A row of padding, a row whose first document has no keys, and a row of one token."""
    keys = packed([[], [(2, length)], [(1, 1)]], length)
    return Layout(packed([[], [(1, length // 2), (2, length - length // 2)], [(1, 1)]], length), keys)


def layouts(length: int) -> dict[str, Layout]:
    """Every kind of mask, at about this length."""
    ragged, several = one_each([length, max(1, 2 * length // 3)], length), documents(length)
    window, block = max(1, length // 5), max(2, length // 6)
    return {
        "causal": Layout(ragged),
        "window": Layout(ragged, window=window),
        "packed": Layout(several),
        "packed window": Layout(several, window=window),
        "prefix": Layout(ragged, prefix=max(1, length // 4)),
        "sinks": Layout(several, window=window, rule=Rule(sinks=2)),
        "strided": Layout(several, rule=Rule(stride=3)),
        "columns": Layout(several, window=window, rule=Rule(block=block, columns=max(1, block // 4))),
        "cache with gaps": gaps(length),
        "ring": ring(length, max(2, window)),
        "empty rows": empty(length),
    }
