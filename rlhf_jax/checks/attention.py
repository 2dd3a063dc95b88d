"""The laws of an implementation of attention, each a function that measures.

A law takes an ``Implementation`` and yields measurements. Values and gradients are held against float64; in a narrow
type the bound is the rule of FlashAttention's own tests: twice the error of a plain program in that type.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks.layouts import Layout, Places, documents, layouts, one_each
from rlhf_jax.checks.measure import Compile, Measurement, distance
from rlhf_jax.checks.problems import WIDE, Refused, Shape, beside_float64, draw, expect, judged, runner
from rlhf_jax.ops.attention import merge
from rlhf_jax.ops.attention.dispatch import Implementation

LENGTH = 129
"""Odd, and one more than a tile."""

Law = Callable[[Implementation, str, Compile], Iterator[Measurement]]
"""(implementation, dtype, compiler) to what was found."""


def dense_equivalence(kind: str) -> Law:
    """One kind of mask."""

    def law(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
        yield from beside_float64(implementation, kind, layouts(LENGTH)[kind], Shape(dtype=dtype), compile)

    return law


def odd_lengths(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Lengths of one token, below, at and above tiles."""
    for length in (1, 7, 127, 257):
        layout = Layout(documents(length), window=70)
        yield from beside_float64(implementation, "odd lengths", layout, Shape(dtype=dtype), compile)


def head_grouping(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """One, some and all key/value heads: gradients of keys and values are sums over their query heads."""
    for kv_heads in (1, 3, 6):
        shape = Shape(heads=6, kv_heads=kv_heads, dtype=dtype)
        yield from beside_float64(implementation, "head grouping", Layout(documents(65)), shape, compile)


def head_widths(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Widths of heads, and values that are wider than keys."""
    for width, values in ((16, None), (128, None), (256, None), (64, 128)):
        shape = Shape(heads=2, kv_heads=1, width=width, value_width=values, dtype=dtype)
        yield from beside_float64(implementation, "head widths", Layout(documents(65)), shape, compile)


def softcap(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Bounded logits, with products so large that the bound matters."""
    shape = Shape(softcap=2.0, dtype=dtype, size=1.5)
    yield from beside_float64(implementation, "soft-cap", Layout(documents(65)), shape, compile)


def slopes(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """ALiBi, also on keys that lie in no order."""
    for layout in (Layout(documents(65)), layouts(65)["ring"]):
        yield from beside_float64(implementation, "ALiBi", layout, Shape(slopes=True, dtype=dtype), compile)


def sink_logits(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Logits without a value, their own gradient, and rows that see nothing else."""
    for layout in (Layout(documents(65), window=20), layouts(65)["empty rows"]):
        yield from beside_float64(implementation, "sink logits", layout, Shape(sinks=True, dtype=dtype), compile)


def large_logits(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Logits of some hundreds, where exponentials overflow or vanish unless the maximum is taken off."""
    shape = Shape(size=8.0, dtype=dtype)
    for each in beside_float64(implementation, "large logits", Layout(documents(65)), shape, compile):
        # fp32 knows logits of this size to 1e-5, which the exponential makes an error of as large a part.
        yield each if each.bound is None else replace(each, bound=10 * each.bound)


def log_sum_exp(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """The second result and gradients through it."""
    for layout in (Layout(documents(65)), layouts(65)["empty rows"]):
        yield from beside_float64(implementation, "log-sum-exp", layout, Shape(dtype=dtype), compile, lse=True)


def key_order(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Positions decide and slots do not: the keys in another order."""
    order, own = np.random.default_rng(0).permutation(LENGTH), documents(LENGTH)
    layout = Layout(own, Places(own.positions[:, order], own.segments[:, order]))
    yield from beside_float64(implementation, "key order", layout, Shape(dtype=dtype), compile)


def tile_alignment(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Padding in front moves every token against the tiles."""
    start = documents(66)
    for shift in (0, 1, 31, 63):
        pads = ((0, 0), (shift, LENGTH - 66 - shift))
        moved = Layout(Places(np.pad(start.positions, pads), np.pad(start.segments, pads)))
        yield from beside_float64(implementation, "tile alignment", moved, Shape(dtype=dtype), compile)


def causality(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """The past is the same to the bit whatever the future holds, and a loss of the past has no gradient there."""
    layout, shape = layouts(LENGTH)["causal"], Shape(dtype=dtype)
    inputs, run = draw(layout, shape), runner(implementation, shape, compile)
    before = run(inputs, layout)
    for at in (1, 63, 64, 100, LENGTH - 1):
        future = {name: inputs[name].at[:, at:].add(1.0) for name in ("q", "k", "v")}
        after = run(inputs | future | {"out": inputs["out"].at[:, at:].set(0.0)}, layout)
        case = f"from token {at} of {LENGTH}, {shape}"
        yield Measurement("causality", "values", case, distance(after["out"][:, :at], before["out"][:, :at]), 0.0)
        yield Measurement("causality", "gradients", case, _largest(after[f"d{x}"][:, at:] for x in "qkv"), 0.0)


def planted(law: str, *garbage: float) -> Law:
    """What stands in padding, of cotangents too, changes no bit of anything else and gets no gradient."""

    def measured(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
        shape, kinds = Shape(dtype=dtype), layouts(LENGTH)
        run = runner(implementation, shape, compile)
        for kind, dirt in itertools.product(("causal", "packed", "ring"), garbage):
            layout = kinds[kind]
            inputs, case = draw(layout, shape), f"{dirt}, {kind}, {shape}"
            queries, keys = layout.queries.segments == 0, layout.shown.segments == 0
            hidden = {"q": queries, "k": keys, "v": keys, "out": queries}
            changed = {name: inputs[name].at[np.nonzero(where)].set(dirt) for name, where in hidden.items()}
            clean, dirty = run(inputs, layout), run(inputs | changed, layout)
            yield Measurement(law, "values", case, distance(dirty["out"], clean["out"]), 0.0)
            moved = [dirty[f"d{name}"] - clean[f"d{name}"] for name in "qkv"]
            got = [dirty[f"d{name}"][hidden[name]] for name in "qkv"]
            yield Measurement(law, "gradients", case, _largest(moved + got), 0.0)

    return measured


def packing(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """Documents in rows of their own are what the oracle says of them packed into a row."""
    together, shape = documents(LENGTH), Shape(dtype=dtype)
    pieces = [
        (row, np.flatnonzero(together.segments[row] == segment))
        for row in range(2)
        for segment in dict.fromkeys(together.segments[row].tolist())
        if segment != 0
    ]
    run = runner(implementation, shape, compile)
    for window in (None, LENGTH // 5):
        packed = Layout(together, window=window)
        inputs = draw(packed, shape)
        exact, plain = (expect(packed, shape, inputs, each) for each in (None, dtype))
        for first, second in zip(pieces, (*pieces[1:], pieces[0]), strict=True):

            def apart(x, pair=(first, second)):
                ends = [(0, 0)] * (x.ndim - 2)
                return np.stack([np.pad(x[row, slots], ((0, LENGTH - len(slots)), *ends)) for row, slots in pair])

            alone = one_each([len(first[1]), len(second[1])], LENGTH)
            layout = Layout(replace(alone, packed=True), window=window)
            found = run({name: x if name == "sinks" else jnp.asarray(apart(x)) for name, x in inputs.items()}, layout)
            expected, written = ({name: apart(x) for name, x in each.items()} for each in (exact, plain))
            yield from judged("packing", f"window {window}, {shape}", found, expected, written, shape)


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
    yield from beside_float64(both, "merged parts", layout, Shape(dtype=dtype), compile)


def determinism(implementation: Implementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """The same call twice gives the same bits, gradients included."""
    layout, shape = layouts(LENGTH)["packed"], Shape(dtype=dtype)
    inputs, run = draw(layout, shape), runner(implementation, shape, compile)
    one, other = run(inputs, layout), run(inputs, layout)
    yield Measurement("determinism", "values", str(shape), distance(one["out"], other["out"]), 0.0)
    changed = [one[name] - other[name] for name in ("dq", "dk", "dv")]
    yield Measurement("determinism", "gradients", str(shape), _largest(changed), 0.0)


def _largest(arrays) -> float:
    """Largest absolute entry; NaN if there is one."""
    return float(max((np.abs(x).max(initial=0.0) for x in arrays), key=lambda x: (np.isnan(x), x)))


LAWS: dict[str, Law] = {kind: dense_equivalence(kind) for kind in layouts(LENGTH)} | {
    "odd lengths": odd_lengths,
    "head grouping": head_grouping,
    "head widths": head_widths,
    "soft-cap": softcap,
    "ALiBi": slopes,
    "sink logits": sink_logits,
    "large logits": large_logits,
    "log-sum-exp": log_sum_exp,
    "merged parts": merging,
    "key order": key_order,
    "tile alignment": tile_alignment,
    "packing": packing,
    "causality": causality,
    "padding content": planted("padding content", 1e4),
    "NaN in padding": planted("NaN in padding", np.nan, np.inf),
    "determinism": determinism,
}


def measure(
    name: str, implementation: Implementation, law: str, dtype: str = WIDE, compile: Compile = jax.jit
) -> list[Measurement]:
    """What one of ``LAWS`` finds of an implementation; where it refuses, its reason.

    Args:
        name: of the implementation.
        implementation: what is measured.
        law: a name in ``LAWS``.
        dtype: "float32", "bfloat16" or "float16".
        compile: ``jax.jit`` or the like.
    """
    found: list[Measurement] = []
    try:
        for each in LAWS[law](implementation, dtype, compile):
            found.append(each)
    except Refused as refused:
        found.append(Measurement(law, "values", dtype, refusal=str(refused)))
    return found
