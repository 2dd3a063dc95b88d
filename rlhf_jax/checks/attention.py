"""The laws of an implementation of softmax attention, each a function that measures.

A law takes an ``Implementation`` and yields measurements. Values and gradients are held against float64; in a narrow
type the bound is the rule of FlashAttention's own tests: twice the error of a plain program in that type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks import trial
from rlhf_jax.checks.layouts import Layout, Places, documents, layouts
from rlhf_jax.checks.measure import Compile, Measurement
from rlhf_jax.checks.problems import Shape, Softmax
from rlhf_jax.checks.trial import LENGTH, Law, Refused, beside_float64
from rlhf_jax.ops.attention import blocked, merge
from rlhf_jax.ops.attention.blocked_tiles import Tiling
from rlhf_jax.ops.attention.dispatch import Implementation

LONG = 601
"""Several tiles of every implementation, and a part of one."""

TILINGS: dict[Callable, tuple[Tiling, ...]] = {
    blocked.attend: (Tiling(16, 48), Tiling(64, 16, rows=2), Tiling(200, 1000))
}
"""Tiles that are tried where an implementation lets them be chosen."""


def over(shapes: Iterator[tuple[Layout, Shape]] | list[tuple[Layout, Shape]]) -> Law:
    """Values and gradients of these layouts and shapes beside float64."""
    pairs = list(shapes)

    def law(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
        for layout, shape in pairs:
            yield from beside_float64(Softmax(implementation, replace(shape, dtype=dtype), compile), layout)

    return law


def large_logits(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Logits of some hundreds, where exponentials overflow or vanish unless the maximum is taken off."""
    shape = Shape(size=8.0, dtype=dtype)
    for each in beside_float64(Softmax(implementation, shape, compile), Layout(documents(65))):
        # fp32 knows logits of this size to 1e-5, which the exponential makes an error of as large a part.
        yield each if each.bound is None else replace(each, bound=10 * each.bound)


def log_sum_exp(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """The second result and gradients through it."""
    for layout in (Layout(documents(65)), layouts(65)["empty rows"]):
        yield from beside_float64(Softmax(implementation, Shape(dtype=dtype), compile, lse=True), layout)


def merging(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Attention over parts of the keys, merged by their log-sum-exp, is attention over all of them."""
    layout, parts = Layout(documents(LENGTH)), (slice(0, 50), slice(50, None))
    own = layout.queries
    masks = [replace(layout, keys=Places(own.positions[:, part], own.segments[:, part])).mask() for part in parts]

    def in_parts(q, k, v, whole_mask, terms):
        pieces = zip(parts, masks, strict=True)
        found = [implementation.attend(q, k[:, part], v[:, part], mask, terms) for part, mask in pieces]
        return merge(found), jnp.zeros(q.shape[:3])

    both = Implementation(lambda case: implementation.refusal(replace(case, lse=True)), in_parts)
    yield from beside_float64(Softmax(both, Shape(dtype=dtype), compile), layout)


def tile_sizes(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """The tiles change nothing: many small ones, uneven ones, one that is larger than everything, shared ones."""
    layout, plain = layouts(300)["packed window"], Softmax(implementation, Shape(2, 1, 16, dtype=dtype), compile)
    plain.ask(plain.draw(layout), layout)
    if implementation.attend not in TILINGS:
        raise Refused("its tiles cannot be chosen")
    for tiling in TILINGS[implementation.attend]:
        cut = Implementation(implementation.refusal, partial(implementation.attend, tiling=tiling))
        for each in beside_float64(replace(plain, implementation=cut), layout):
            yield replace(each, case=f"{tiling}, {each.case}")


def tile_alignment() -> Iterator[tuple[Layout, Shape]]:
    """Padding in front moves every token against the tiles."""
    start = documents(66)
    for shift in (0, 1, 31, 63):
        pads = ((0, 0), (shift, LENGTH - 66 - shift))
        yield Layout(Places(np.pad(start.positions, pads), np.pad(start.segments, pads))), Shape()


def key_order() -> Layout:
    """Positions decide and slots do not: the keys in another order."""
    order, own = np.random.default_rng(0).permutation(LENGTH), documents(LENGTH)
    return Layout(own, Places(own.positions[:, order], own.segments[:, order]))


def general(law: Callable[[Softmax], Iterator[Measurement]]) -> Law:
    """A law of ``trial`` with the usual shape."""
    return lambda implementation, dtype, compile: law(Softmax(implementation, Shape(dtype=dtype), compile))


SMALL, HIDDEN = Layout(documents(65)), ("causal", "packed", "ring")
LAWS: dict[str, Law] = {kind: over([(layout, Shape())]) for kind, layout in layouts(LENGTH).items()} | {
    # One token, below, at and above tiles.
    "odd lengths": over([(Layout(documents(length), window=70), Shape()) for length in (1, 7, 127, 257)]),
    "long rows": over([(layouts(LONG)[kind], Shape(2, 1, 16)) for kind in ("packed", "packed window")]),
    "tile sizes": tile_sizes,
    # Gradients of keys and values are sums over their query heads.
    "head grouping": over([(SMALL, Shape(heads=6, kv_heads=heads)) for heads in (1, 3, 6)]),
    "head widths": over(
        [(SMALL, Shape(2, 1, width, values)) for width, values in ((16, None), (128, None), (256, None), (64, 128))]
    ),
    "soft-cap": over([(SMALL, Shape(softcap=2.0, size=1.5))]),  # products so large that the bound matters
    "ALiBi": over([(layout, Shape(slopes=True)) for layout in (SMALL, layouts(65)["ring"])]),
    # Logits without a value, their own gradient, and rows that see nothing else.
    "sink logits": over(
        [(layout, Shape(sinks=True)) for layout in (Layout(documents(65), window=20), layouts(65)["empty rows"])]
    ),
    "large logits": large_logits,
    "log-sum-exp": log_sum_exp,
    "merged parts": merging,
    "key order": over([(key_order(), Shape())]),
    "tile alignment": over(tile_alignment()),
    "packing": general(lambda one: (each for window in (None, LENGTH // 5) for each in trial.packing(one, window))),
    "causality": general(
        lambda one: trial.causality(one, layouts(LENGTH)["causal"], (1, 63, 64, 100, LENGTH - 1))
    ),
    "padding content": general(lambda one: trial.planted(one, trial.some(LENGTH, *HIDDEN), 1e4)),
    "NaN in padding": general(lambda one: trial.planted(one, trial.some(LENGTH, *HIDDEN), np.nan, np.inf)),
    "determinism": general(lambda one: trial.determinism(one, layouts(LENGTH)["packed"])),
}  # fmt: skip
