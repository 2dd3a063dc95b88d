"""The laws of an implementation of FLASH, each a function that measures. See ``attention`` for the bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks import trial
from rlhf_jax.checks.gated import distances, divisors, numbers, pulled
from rlhf_jax.checks.gated_oracle import GatedProblem, solve_gated
from rlhf_jax.checks.layouts import Layout, documents, one_each
from rlhf_jax.checks.measure import Compile, Measurement
from rlhf_jax.checks.oracle import rounded, wide
from rlhf_jax.checks.trial import WIDE, Inputs, Law, Refused, Results, beside_float64
from rlhf_jax.ops.flash import FLASH_IMPLEMENTATIONS, FlashImplementation, flash_attention, flash_attention_chunks
from rlhf_jax.ops.gau_terms import GauCase, Laplace, Relu2, Score
from rlhf_jax.types import Context

TOKENS = ("q_local", "k_local", "q_global", "k_global", "v")
LENGTH = 301
"""Two chunks of the usual shape and a part of one."""


@dataclass(frozen=True)
class ChunkedShape:
    """Widths, chunk, dtype, score and entries of the bias."""

    width: int = 128
    value_width: int = 256
    chunk: int = 128
    dtype: str = WIDE
    score: Score = Relu2()
    bias: int = 0

    def __str__(self) -> str:
        bias = f" bias of {self.bias}" if self.bias else ""
        return f"{self.width}/{self.value_width} chunks of {self.chunk} {type(self.score).__name__} {self.dtype}{bias}"


@dataclass(frozen=True)
class Chunked:
    """A trial of FLASH: ``name`` in ``FLASH_IMPLEMENTATIONS``.

    With ``split`` rows, which are one document each, go through ``flash_attention_chunks`` in two pieces, the first
    of so many tokens.
    """

    name: str
    shape: ChunkedShape
    compile: Compile
    split: int | None = None

    by_query = ("q_local", "q_global")
    by_key = ("k_local", "k_global", "v")
    slack = 2.0

    def __str__(self) -> str:
        return str(self.shape)

    @property
    def dtype(self) -> str:
        return self.shape.dtype

    def draw(self, layout: Layout) -> Inputs:
        """Queries, keys, values, ``bias`` and the cotangent ``out``; the linear part is about as large as the other."""
        shape, (rows, length) = self.shape, layout.queries.positions.shape
        normal = numbers(shape.dtype, f"{rows} {length} {shape}")
        drawn = {name: normal(rows, length, shape.width) for name in TOKENS[:2]}
        drawn["q_global"] = normal(rows, length, shape.width, std=0.1 * shape.width**-0.5)
        drawn["k_global"] = normal(rows, length, shape.width)
        drawn |= {name: normal(rows, length, shape.value_width) for name in ("v", "out")}
        return drawn | ({"bias": normal(shape.bias, dtype=WIDE)} if shape.bias else {})

    def run(self, inputs: Inputs, layout: Layout) -> Results:
        """Values and gradients; fp32 by products of full precision on every device."""
        implementation, context = FLASH_IMPLEMENTATIONS[self.name], layout.queries.context()
        packed = context.packed and self.split is None
        case = GauCase.of(
            inputs["q_local"], inputs["k_local"], inputs["v"], self.shape.score, inputs.get("bias"),
            aligned=not packed, chunk=self.shape.chunk, packed=packed, state=self.split is not None,
        )  # fmt: skip
        reason = implementation.refusal(case)
        if reason is not None:
            raise Refused(reason)
        divisor = jnp.asarray(divisors(self._parts(layout)[0]), jnp.float32)
        with jax.default_matmul_precision("highest" if self.dtype == WIDE else "default"):
            found = _compiled(self, implementation)(inputs, context, divisor)
        return {name: wide(x) for name, x in found.items()}

    def expect(self, inputs: Inputs, layout: Layout, dtype: str | None = None) -> Results:
        """By ``solve_gated``."""
        exact, (here, earlier) = {name: wide(x) for name, x in inputs.items()}, self._parts(layout)
        problem = GatedProblem(
            exact["q_local"], exact["k_local"], exact["v"], here, distances(layout), divisors(here),
            self.shape.width**-0.5, isinstance(self.shape.score, Laplace), exact.get("bias"), exact["q_global"],
            exact["k_global"], earlier,
        )  # fmt: skip
        solved = solve_gated(problem, exact["out"], *(() if dtype is None else (rounded(dtype),)))
        return solved | {"dq_local": solved["dq"], "dk_local": solved["dk"]}

    def _parts(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Whom each token sees in its own chunk, and in earlier ones."""
        seen, chunk = layout.seen(), layout.queries.positions // self.shape.chunk
        own = chunk[:, :, None] == chunk[:, None, :]
        return seen & own, seen & ~own


@functools.lru_cache(maxsize=64)
def _compiled(found: Chunked, implementation: FlashImplementation) -> Callable:
    """Values and gradients, compiled once for all inputs of an implementation (which the name stands for)."""
    shape = found.shape
    settings = {"chunk": shape.chunk, "score": shape.score, "scale": shape.width**-0.5, "implementation": found.name}

    def in_pieces(split: int, tokens, context: Context, divisor, bias):
        lengths = (context.segments != 0).sum(axis=1)
        state, outs = jnp.zeros((len(lengths), shape.width, shape.value_width), jnp.float32), []
        for start, stop in ((0, split), (split, divisor.shape[1])):
            q_local, k_local, q_global, k_global, v = (x[:, start:stop] for x in tokens)
            out, state = flash_attention_chunks(
                q_local, k_local, q_global, k_global, v, jnp.clip(lengths - start, 0, stop - start), state,
                normaliser=divisor[:, start:stop], bias=bias, **settings,
            )  # fmt: skip
            outs.append(out)
        return jnp.concatenate(outs, axis=1)

    def both(inputs: Inputs, context: Context, divisor):
        def attend(arguments):
            tokens, bias = [arguments[name] for name in TOKENS], arguments.get("bias")
            if found.split is not None:
                return in_pieces(found.split, tokens, context, divisor, bias)
            q_local, k_local, q_global, k_global, v = tokens
            return flash_attention(
                q_local, k_local, q_global, k_global, v, context, normaliser=divisor, bias=bias, **settings
            )

        return pulled(attend, inputs)

    return found.compile(both)


def over(*pairs: tuple[Layout, ChunkedShape], split: int | None = None) -> Law:
    """Values and gradients of these layouts and shapes beside float64."""

    def law(name: str, dtype: str, compile: Compile) -> Iterator[Measurement]:
        for layout, shape in pairs:
            yield from beside_float64(Chunked(name, replace(shape, dtype=dtype), compile, split), layout)

    return law


def general(law: Callable[[Chunked], Iterator[Measurement]]) -> Law:
    """A law of ``trial`` with the usual shape."""
    return lambda name, dtype, compile: law(Chunked(name, ChunkedShape(dtype=dtype), compile))


RAGGED, PACKED = Layout(one_each([LENGTH, 140], LENGTH)), Layout(documents(LENGTH))
TINY = ChunkedShape(8, 16)
LAWS: dict[str, Law] = {
    "whole rows": over((RAGGED, ChunkedShape())),
    "packed": over((PACKED, ChunkedShape())),
    # One token, one chunk, and one token more.
    "odd lengths": over(*((Layout(one_each([length], length)), ChunkedShape()) for length in (1, 128, 257))),
    # Documents begin and end everywhere in chunks that are short beside them, or longer than the row.
    "small chunks": over(
        *((layout, replace(TINY, chunk=chunk))
          for layout, chunk in ((Layout(documents(37)), 5), (Layout(one_each([37, 20], 37)), 5),
                                (Layout(documents(23)), 1), (Layout(documents(23)), 64)))
    ),
    "Laplace": over((PACKED, ChunkedShape(score=Laplace()))),
    "bias": over((PACKED, replace(TINY, chunk=64, bias=40)), (RAGGED, replace(TINY, chunk=64, bias=40))),
    # What the first chunks leave behind is all that later ones need.
    "state": over((Layout(one_each([384, 200], 384)), ChunkedShape()), split=256),
    "packing": general(lambda one: trial.packing(one, length=LENGTH)),
    "causality": general(lambda one: trial.causality(one, RAGGED, (1, 127, 128, LENGTH - 1))),
    "padding content": general(lambda one: trial.planted(one, {"whole": RAGGED, "packed": PACKED}, 1e3)),
    "determinism": general(lambda one: trial.determinism(one, PACKED)),
}  # fmt: skip
