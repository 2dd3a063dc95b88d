"""The laws of a decoder, which attends from one query a row over a cache. Values alone: decoding has no gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks import trial
from rlhf_jax.checks.layouts import Layout, Places, layouts, one_each
from rlhf_jax.checks.measure import Compile, Measurement
from rlhf_jax.checks.problems import Shape, Softmax
from rlhf_jax.checks.trial import LENGTH, Law, beside_float64
from rlhf_jax.ops.attention.decode import Decoder
from rlhf_jax.ops.attention.dispatch import Implementation


@functools.lru_cache(maxsize=64)
def as_implementation(decoder: Decoder) -> Implementation:
    """The decoder as attention of rows of one query."""

    def attend(q, k, v, mask, terms):
        out = decoder.attend(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), mask, terms)
        return out[:, None], jnp.zeros(q.shape[:3])

    return Implementation(decoder.refusal, attend)


def last(layout: Layout) -> Layout:
    """The last token of each row that is not padding (the first slot of a row without any) over all keys.

    Free slots behind them make a multiple of 8, without which some kernels refuse a cache.
    """
    slots = np.arange(layout.queries.segments.shape[1])
    at = np.where(layout.queries.segments != 0, slots, 0).max(axis=1)[:, None]
    own = layout.queries
    positions, segments = (np.take_along_axis(x, at, axis=1) for x in (own.positions, own.segments))
    free = ((0, 0), (0, -layout.shown.segments.shape[1] % 8))
    keys = Places(np.pad(layout.shown.positions, free), np.pad(layout.shown.segments, free))
    return replace(layout, queries=Places(positions, segments), keys=keys)


def over(*pairs: tuple[Layout, Shape]) -> Law:
    """Values of these layouts and shapes beside float64."""

    def law(decoder: Decoder, dtype: str, compile: Compile) -> Iterator[Measurement]:
        for layout, shape in pairs:
            found = Softmax(as_implementation(decoder), replace(shape, dtype=dtype), compile, pull=False)
            yield from beside_float64(found, layout)

    return law


def general(law: Callable[[Softmax], Iterator[Measurement]]) -> Law:
    """A law of ``trial`` with the usual shape."""
    return lambda decoder, dtype, compile: law(
        Softmax(as_implementation(decoder), Shape(dtype=dtype), compile, pull=False)
    )


def filled(slots: int, *seen: int) -> Layout:
    """A cache of so many slots, of which each row has filled the first few."""
    keys = one_each(list(seen), slots)
    at = np.array(seen, np.int32)[:, None]
    return Layout(Places(np.maximum(at - 1, 0), np.minimum(at, 1)), keys)


KINDS = {kind: last(layout) for kind, layout in layouts(LENGTH).items() if kind != "prefix"}
CACHE = filled(136, 101, 64)
LAWS: dict[str, Law] = {kind: over((layout, Shape())) for kind, layout in KINDS.items()} | {
    # Nothing, one slot, a tile, one slot more, all slots.
    "filled slots": over(*((filled(slots, *seen), Shape()) for slots, *seen in ((8, 0, 1, 8), (264, 128, 129, 264)))),
    "odd slots": over((filled(7, 3, 7), Shape()), (filled(LENGTH, 127, LENGTH), Shape())),
    "long caches": over((filled(1000, 1000, 513), Shape(2, 1)), (last(layouts(601)["packed window"]), Shape(2, 1))),
    "head grouping": over(*((CACHE, Shape(heads=6, kv_heads=heads)) for heads in (1, 3, 6))),
    "head widths": over(*((CACHE, Shape(2, 1, *widths)) for widths in ((16, None), (128, None), (64, 128)))),
    "soft-cap": over((CACHE, Shape(softcap=2.0, size=1.5))),
    "ALiBi": over((CACHE, Shape(slopes=True)), (KINDS["ring"], Shape(slopes=True))),
    "sink logits": over((CACHE, Shape(sinks=True)), (KINDS["empty rows"], Shape(sinks=True))),
    "large logits": over((CACHE, Shape(size=3.0))),
    "padding content": general(
        lambda one: trial.planted(one, {"cache": CACHE, "ring": KINDS["ring"], "gaps": KINDS["cache with gaps"]}, 1e4)
    ),
    "determinism": general(lambda one: trial.determinism(one, CACHE)),
}  # fmt: skip
