"""The laws of an implementation of gated attention, each a function that measures. See ``attention`` for the bounds."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks import trial
from rlhf_jax.checks.gated_oracle import GatedProblem, solve_gated
from rlhf_jax.checks.layouts import Layout, documents, layouts
from rlhf_jax.checks.measure import Compile, Measurement
from rlhf_jax.checks.oracle import rounded, wide
from rlhf_jax.checks.trial import LENGTH, WIDE, Inputs, Law, Refused, Results, beside_float64
from rlhf_jax.ops import gau_blocked
from rlhf_jax.ops.attention import Mask
from rlhf_jax.ops.gau import GauCase, GauImplementation, Laplace, Relu2, Score

TILES: dict[Callable, tuple[int, ...]] = {gau_blocked.attend: (16, 40, 128)}
"""Tiles that are tried where an implementation lets them be chosen."""


@dataclass(frozen=True)
class GatedShape:
    """Widths, dtype, score and entries of the bias; ``size`` is the standard deviation of queries and keys."""

    width: int = 128
    value_width: int = 256
    dtype: str = WIDE
    score: Score = Relu2()
    bias: int = 0
    size: float = 1.0

    def __str__(self) -> str:
        bias = f" bias of {self.bias}" if self.bias else ""
        return f"{self.width}/{self.value_width} {type(self.score).__name__} {self.dtype}{bias}"


@dataclass(frozen=True)
class Gated:
    """A trial of gated attention; queries are divided by the number of keys that they see, and 1."""

    implementation: GauImplementation
    shape: GatedShape
    compile: Compile

    by_query = ("q",)
    by_key = ("k", "v")
    slack = 2.0

    def __str__(self) -> str:
        return str(self.shape)

    @property
    def dtype(self) -> str:
        return self.shape.dtype

    def draw(self, layout: Layout) -> Inputs:
        """``q``, ``k``, ``v``, ``bias``, and the cotangent ``out``."""
        shape, (rows, length) = self.shape, layout.queries.positions.shape
        slots = layout.shown.positions.shape[1]
        normal = numbers(shape.dtype, f"{rows} {length} {slots} {shape}")
        drawn = {
            "q": normal(rows, length, shape.width, std=shape.size),
            "k": normal(rows, slots, shape.width, std=shape.size),
            "v": normal(rows, slots, shape.value_width),
            "out": normal(rows, length, shape.value_width),
        }
        return drawn | ({"bias": normal(shape.bias, dtype=WIDE)} if shape.bias else {})

    def ask(self, inputs: Inputs, layout: Layout) -> None:
        """Raise ``Refused`` if the implementation does not serve."""
        q, k, v, bias = (inputs.get(name) for name in ("q", "k", "v", "bias"))
        reason = self.implementation.refusal(GauCase.of(q, k, v, self.shape.score, bias, layout.mask()))
        if reason is not None:
            raise Refused(reason)

    def run(self, inputs: Inputs, layout: Layout) -> Results:
        """Values and gradients; fp32 by products of full precision on every device."""
        self.ask(inputs, layout)
        divisor = jnp.asarray(divisors(layout.seen()), jnp.float32)
        with jax.default_matmul_precision("highest" if self.dtype == WIDE else "default"):
            found = _compiled(self.implementation, self.shape, self.compile)(inputs, layout.mask(), divisor)
        return {name: wide(x) for name, x in found.items()}

    def expect(self, inputs: Inputs, layout: Layout, dtype: str | None = None) -> Results:
        """By ``solve_gated``."""
        exact, seen = {name: wide(x) for name, x in inputs.items()}, layout.seen()
        problem = GatedProblem(
            exact["q"], exact["k"], exact["v"], seen, distances(layout), divisors(seen), self.shape.width**-0.5,
            isinstance(self.shape.score, Laplace), exact.get("bias"),
        )  # fmt: skip
        return solve_gated(problem, exact["out"], *(() if dtype is None else (rounded(dtype),)))


def numbers(dtype: str, seed: str) -> Callable[..., jax.Array]:
    """Normal numbers of any shape, the same for the same seed."""
    generator = np.random.default_rng(zlib.crc32(seed.encode()))

    def normal(*sizes: int, dtype: str = dtype, std: float = 1.0) -> jax.Array:
        return jnp.asarray(std * generator.normal(size=sizes), jnp.dtype(dtype))

    return normal


def divisors(seen: np.ndarray) -> np.ndarray:
    """Of each query: the number of keys that it sees, and 1."""
    return seen.sum(axis=-1) + 1.0


def distances(layout: Layout) -> np.ndarray:
    """How far each key lies before each query, [B, T, S]."""
    return (layout.queries.positions[:, :, None] - layout.shown.positions[:, None, :]).astype(np.float64)


@functools.lru_cache(maxsize=64)
def _compiled(implementation: GauImplementation, shape: GatedShape, compile: Compile) -> Callable:
    """Values and gradients, compiled once for all inputs."""

    def both(inputs: Inputs, mask: Mask, divisor):
        def attend(arguments):
            q, k, v, bias = (arguments.get(name) for name in ("q", "k", "v", "bias"))
            return implementation.attend(q, k, v, mask, divisor, bias, score=shape.score, scale=shape.width**-0.5)

        return pulled(attend, inputs)

    return compile(both)


def pulled(attend: Callable, inputs: Inputs) -> dict[str, jax.Array]:
    """The output of ``attend`` of all inputs but the cotangent ``out``, and the gradient of each."""
    out, back = jax.vjp(attend, {name: x for name, x in inputs.items() if name != "out"})
    (gradients,) = back(inputs["out"].astype(out.dtype))
    return {"out": out} | {f"d{name}": x for name, x in gradients.items()}


def over(*pairs: tuple[Layout, GatedShape]) -> Law:
    """Values and gradients of these layouts and shapes beside float64."""

    def law(implementation: GauImplementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
        for layout, shape in pairs:
            yield from beside_float64(Gated(implementation, replace(shape, dtype=dtype), compile), layout)

    return law


def tile_sizes(implementation: GauImplementation, dtype: str, compile: Compile) -> Iterator[Measurement]:
    """The tiles change nothing: many small ones, uneven ones, and such that the rows end inside the last one."""
    layout, plain = layouts(300)["packed window"], Gated(implementation, GatedShape(8, 16, dtype, bias=20), compile)
    plain.ask(plain.draw(layout), layout)
    if implementation.attend not in TILES:
        raise Refused("its tiles cannot be chosen")
    for tile in TILES[implementation.attend]:
        cut = GauImplementation(implementation.refusal, functools.partial(implementation.attend, tile=tile))
        for each in beside_float64(replace(plain, implementation=cut), layout):
            yield replace(each, case=f"tiles of {tile}, {each.case}")


def general(law: Callable[[Gated], Iterator[Measurement]]) -> Law:
    """A law of ``trial`` with the usual shape."""
    return lambda implementation, dtype, compile: law(Gated(implementation, GatedShape(dtype=dtype), compile))


KINDS = layouts(LENGTH)
LAWS: dict[str, Law] = {
    kind: over((KINDS[kind], GatedShape()))
    for kind in ("causal", "packed window", "sinks", "cache with gaps", "ring", "empty rows")
} | {
    "odd lengths": over(*((Layout(documents(length), window=70), GatedShape()) for length in (1, 7, 257))),
    "long rows": over((layouts(601)["packed window"], GatedShape())),
    "tile sizes": tile_sizes,
    "Laplace": over((KINDS["packed"], GatedShape(score=Laplace()))),
    # Fewer entries than the longest distance, and keys in no order.
    "bias": over(
        *((KINDS[kind], GatedShape(score=score, bias=40))
          for kind, score in (("packed", Relu2()), ("packed", Laplace()), ("ring", Relu2())))
    ),
    "widths": over(*((Layout(documents(65)), GatedShape(*widths)) for widths in ((5, 7), (64, 128)))),
    "packing": general(lambda one: trial.packing(one, LENGTH // 5)),
    "causality": general(lambda one: trial.causality(one, KINDS["causal"], (1, 63, 64, LENGTH - 1))),
    "padding content": general(lambda one: trial.planted(one, trial.some(LENGTH, "causal", "packed", "ring"), 1e3)),
    "determinism": general(lambda one: trial.determinism(one, KINDS["packed"])),
}  # fmt: skip
