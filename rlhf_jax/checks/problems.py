"""Softmax attention to be measured: its shape, its numbers, what an implementation makes of them and what is right."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks.layouts import Layout
from rlhf_jax.checks.measure import Compile
from rlhf_jax.checks.oracle import Problem, rounded, solve, wide
from rlhf_jax.checks.trial import WIDE, Inputs, Refused, Results
from rlhf_jax.ops.attention import Case, Mask, Terms, alibi_slopes
from rlhf_jax.ops.attention.dispatch import Implementation

ARGUMENTS = ("q", "k", "v", "sinks")


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


@dataclass(frozen=True)
class Softmax:
    """A trial of softmax attention.

    Args:
        implementation: what is measured.
        shape: of the inputs.
        compile: ``jax.jit`` or the like.
        lse: measure the log-sum-exp and gradients through it, too.
        pull: measure gradients.
    """

    implementation: Implementation
    shape: Shape
    compile: Compile
    lse: bool = False
    pull: bool = True

    by_query = ("q",)
    by_key = ("k", "v")

    def __str__(self) -> str:
        return str(self.shape)

    @property
    def dtype(self) -> str:
        return self.shape.dtype

    @property
    def slack(self) -> float:
        """Twice, and three times with a soft-cap: the rule of FlashAttention's tests."""
        return 2.0 if self.shape.softcap is None else 3.0

    def draw(self, layout: Layout) -> Inputs:
        """``q``, ``k``, ``v``, ``sinks`` (logits), and the cotangents ``out`` and ``lse`` (0 unless it is measured)."""
        shape, (rows, length) = self.shape, layout.queries.positions.shape
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
            "lse": normal(rows, length, shape.heads, dtype=WIDE, std=float(self.lse)),
        }

    def ask(self, inputs: Inputs, layout: Layout) -> None:
        """Raise ``Refused`` if the implementation does not serve."""
        terms = self.shape.terms(inputs["sinks"])
        case = Case.of(inputs["q"], inputs["k"], inputs["v"], layout.mask(), terms, lse=self.lse)
        reason = self.implementation.refusal(case)
        if reason is not None:
            raise Refused(reason)

    def run(self, inputs: Inputs, layout: Layout) -> Results:
        """Values, and gradients if they are measured; fp32 by products of full precision on every device."""
        self.ask(inputs, layout)
        with jax.default_matmul_precision("highest" if self.dtype == WIDE else "default"):
            found = _compiled(self.implementation, self.shape, self.compile, self.pull)(inputs, layout.mask())
        names = ("out", "lse", *(f"d{name}" for name in ARGUMENTS))
        return {
            name: wide(x)
            for name, x in zip(names, found, strict=False)
            if (name != "lse" or self.lse) and (name != "dsinks" or self.shape.sinks)
        }

    def expect(self, inputs: Inputs, layout: Layout, dtype: str | None = None) -> Results:
        """By ``solve``."""
        exact, shape = {name: wide(x) for name, x in inputs.items()}, self.shape
        back = layout.queries.positions[:, :, None] - layout.shown.positions[:, None, :]
        slopes = wide(alibi_slopes(shape.heads)) if shape.slopes else None
        problem = Problem(
            exact["q"], exact["k"], exact["v"], layout.seen(), back.astype(np.float64), shape.width**-0.5,
            shape.softcap, slopes, exact["sinks"] if shape.sinks else None,
        )  # fmt: skip
        return solve(problem, exact["out"], exact["lse"], *(() if dtype is None else (rounded(dtype),)))


@functools.lru_cache(maxsize=64)
def _compiled(implementation: Implementation, shape: Shape, compile: Compile, pull: bool) -> Callable:
    """Values and gradients, compiled once for all inputs."""

    def both(inputs: Inputs, mask: Mask):
        def attend(q, k, v, sinks):
            return implementation.attend(q, k, v, mask, shape.terms(sinks))

        arguments = [inputs[name] for name in ARGUMENTS]
        if not pull:
            return attend(*arguments)
        (out, lse), back = jax.vjp(attend, *arguments)
        return out, lse, *back((inputs["out"].astype(out.dtype), inputs["lse"].astype(lse.dtype)))

    return compile(both)
