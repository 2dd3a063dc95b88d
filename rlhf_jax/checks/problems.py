"""One attention to be measured: its shape, its numbers, what an implementation makes of them and what is right."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks.layouts import Layout
from rlhf_jax.checks.measure import Compile, Measurement, distance, exact_bound, worst
from rlhf_jax.checks.oracle import NOTHING_SEEN, Problem, rounded, solve, wide
from rlhf_jax.ops.attention import Case, Mask, Terms, alibi_slopes
from rlhf_jax.ops.attention.dispatch import Implementation

WIDE, NARROW = "float32", "bfloat16"
GRADIENTS = ("dq", "dk", "dv", "dsinks")


class Refused(Exception):
    """The implementation says why it does not serve."""


@dataclass(frozen=True)
class Shape:
    """Heads, widths, dtype and terms of one attention; ``size`` is the standard deviation of queries and keys."""

    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    value_width: int | None = None
    dtype: str = WIDE
    softcap: float | None = None
    slopes: bool = False
    sinks: bool = False
    size: float = 1.0

    def __str__(self) -> str:
        wide = self.width if self.value_width is None else f"{self.width}/{self.value_width}"
        terms = "".join(f" {name}" for name in ("softcap", "slopes", "sinks") if getattr(self, name))
        return f"{self.heads}/{self.kv_heads} heads of {wide} {self.dtype}{terms}"

    def terms(self, sinks: jax.Array) -> Terms:
        """With these sink logits, if the shape has any."""
        slopes = alibi_slopes(self.heads) if self.slopes else None
        return Terms(self.width**-0.5, self.softcap, slopes, sinks if self.sinks else None)


Inputs = dict[str, jax.Array]
"""``q``, ``k``, ``v``, ``sinks`` (logits), and the cotangents ``out`` and ``lse``."""

Results = dict[str, np.ndarray]
"""``out``, ``lse`` and gradients, in float64."""


def draw(layout: Layout, shape: Shape, lse: bool = False) -> Inputs:
    """Normal numbers, the same at every call; the cotangent of the log-sum-exp is 0 unless it is asked for."""
    rows, length = layout.queries.positions.shape
    slots = layout.shown.positions.shape[1]
    generator = np.random.default_rng(zlib.crc32(f"{rows} {length} {slots} {shape}".encode()))
    values = shape.width if shape.value_width is None else shape.value_width

    def normal(*sizes: int, dtype: str = shape.dtype, std: float = 1.0) -> jax.Array:
        return jnp.asarray(std * generator.normal(size=sizes), jnp.dtype(dtype))

    return {
        "q": normal(rows, length, shape.heads, shape.width, std=shape.size),
        "k": normal(rows, slots, shape.kv_heads, shape.width, std=shape.size),
        "v": normal(rows, slots, shape.kv_heads, values),
        "sinks": normal(shape.heads, dtype=WIDE),
        "out": normal(rows, length, shape.heads, values),
        "lse": normal(rows, length, shape.heads, dtype=WIDE, std=float(lse)),
    }


Run = Callable[[Inputs, Layout], Results]


@functools.lru_cache(maxsize=64)
def runner(implementation: Implementation, shape: Shape, compile: Compile, lse: bool = False) -> Run:
    """What the implementation makes of inputs: values and gradients, compiled once.

    fp32 is computed with products of full precision on every device. The function raises ``Refused``.
    """

    def both(inputs: Inputs, mask: Mask):
        def attend(q, k, v, sinks):
            return implementation.attend(q, k, v, mask, shape.terms(sinks))

        (out, lse), pull = jax.vjp(attend, *(inputs[name] for name in ("q", "k", "v", "sinks")))
        gradients = pull((inputs["out"].astype(out.dtype), inputs["lse"].astype(lse.dtype)))
        return out, lse, *gradients

    compiled = compile(both)

    def run(inputs: Inputs, layout: Layout) -> Results:
        mask, terms = layout.mask(), shape.terms(inputs["sinks"])
        reason = implementation.refusal(Case.of(inputs["q"], inputs["k"], inputs["v"], mask, terms, lse=lse))
        if reason is not None:
            raise Refused(reason)
        with jax.default_matmul_precision("highest" if shape.dtype == WIDE else "default"):
            found = compiled(inputs, mask)
        return {name: wide(x) for name, x in zip(("out", "lse", *GRADIENTS), found, strict=True)}

    return run


def expect(layout: Layout, shape: Shape, inputs: Inputs, dtype: str | None = None) -> Results:
    """The same from the oracle: exactly, or as a plain program in ``dtype`` would compute it."""
    exact = {name: wide(x) for name, x in inputs.items()}
    back = layout.queries.positions[:, :, None] - layout.shown.positions[:, None, :]
    slopes = wide(alibi_slopes(shape.heads)) if shape.slopes else None
    problem = Problem(
        exact["q"], exact["k"], exact["v"], layout.seen(), back.astype(np.float64), shape.width**-0.5, shape.softcap,
        slopes, exact["sinks"] if shape.sinks else None,
    )  # fmt: skip
    return solve(problem, exact["out"], exact["lse"], *(() if dtype is None else (rounded(dtype),)))


def beside_float64(
    implementation: Implementation, law: str, layout: Layout, shape: Shape, compile: Compile, lse: bool = False
) -> Iterator[Measurement]:
    """Values and gradients, each by its worst array; with ``lse`` the log-sum-exp and gradients through it too."""
    inputs = draw(layout, shape, lse)
    case = f"{inputs['q'].shape[1]} over {inputs['k'].shape[1]}, {shape}"
    found = runner(implementation, shape, compile, lse)(inputs, layout)
    exact, plain = expect(layout, shape, inputs), expect(layout, shape, inputs, shape.dtype)
    yield from judged(law, case, found, exact, plain, shape, ("out", "lse") if lse else ("out",))


def judged(
    law: str,
    case: str,
    found: Results,
    exact: Results,
    plain: Results,
    shape: Shape,
    values: tuple[str, ...] = ("out",),
) -> Iterator[Measurement]:
    """Results beside exact ones, with the bound that a plain program's results set."""
    for what, names in (("values", values), ("gradients", GRADIENTS)):
        yield worst(
            Measurement(law, what, f"{name} of {case}", _distance(name, found[name], exact[name]),
                        bound(exact[name], plain[name], shape))
            for name in names
            if name in exact
        )  # fmt: skip


def _distance(name: str, found: np.ndarray, exact: np.ndarray) -> float:
    """For queries that see nothing any log-sum-exp is right that is as good as -infinity."""
    if name == "lse":
        found = np.where((exact == NOTHING_SEEN) & (found <= NOTHING_SEEN / 2), NOTHING_SEEN, found)
    return distance(found, exact)


def bound(exact: np.ndarray, plain: np.ndarray, shape: Shape) -> float:
    """In a narrow type: twice (three times with a soft-cap) the error of a plain program, and of writing the result."""
    exact = np.where(exact == NOTHING_SEEN, 0.0, exact)
    if shape.dtype == WIDE:
        return exact_bound(exact)
    plain = np.where(plain == NOTHING_SEEN, 0.0, plain)
    narrow = jnp.dtype(shape.dtype)
    written = (exact.astype(narrow) + narrow.type(0.3) - narrow.type(0.3)).astype(np.float64)
    factor = 2.0 if shape.softcap is None else 3.0
    return factor * distance(plain, exact) + 2.0 * distance(written, exact) + exact_bound(exact)
