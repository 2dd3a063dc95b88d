"""The laws of a mixer, each a function that measures it inside a tiny model.

``full(x) = prefill(x[:t]) then decode(x[t:])``, the past does not see the future, packed documents are separate ones,
and what stands in padding does not matter. Outputs are logits, compared in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax.checks.layouts import one_each
from rlhf_jax.checks.measure import Compile, Measurement, distance
from rlhf_jax.checks.trial import Law
from rlhf_jax.models import Block, RoPE, Transformer, abstract_params, empty_cache
from rlhf_jax.models.positions import Position
from rlhf_jax.types import Context

VOCAB, WIDTH = 17, 16
LENGTH, PROMPT, SLOTS = 14, 6, 16
ROWS, PROMPTS, DOCUMENTS = (LENGTH, 9, 4), (PROMPT, 3, 1), (5, 3, 6)
BOUND = 1e-5
"""Of logits and gradients, as a part of the largest (or of 1, if that is larger)."""


@dataclass(frozen=True)
class Sample:
    """Mixers that stand in for all of their kind, so small that windows, chunks and blocks end inside the rows."""

    mixers: tuple[nn.Module, ...]
    position: Position | None = RoPE()

    def model(self) -> Transformer:
        """A model of one layer for each mixer, without feed-forwards, which do not move information."""
        return Transformer(VOCAB, WIDTH, tuple(map(Block, self.mixers)), position=self.position, max_length=32)


class Subject:
    """The model of a sample with parameters so large that every path matters, and its compiled calls."""

    def __init__(self, sample: Sample, compile: Compile):
        self.model, generator = sample.model(), np.random.default_rng(0)
        leaves, tree = jax.tree.flatten_with_path(abstract_params(self.model))
        # Scales of norms about 1, everything else about 0.
        drawn = [0.3 * generator.normal(size=leaf.shape) + ("scale" in str(path[-1])) for path, leaf in leaves]
        self.params = jax.tree.unflatten(tree, [jnp.asarray(leaf, jnp.float32) for leaf in drawn])
        self.tokens = generator.integers(0, VOCAB, (3, LENGTH), np.int32)
        self.weights = generator.normal(size=(3, LENGTH, VOCAB)).astype(np.float32)
        self._forward = compile(lambda params, *rest: self.model.apply({"params": params}, *rest))
        self._pull = compile(jax.grad(self._loss))

    def full(self, tokens: np.ndarray, context: Context) -> np.ndarray:
        """Logits of whole rows."""
        return np.asarray(self._forward(self.params, tokens, context)[0])

    def step(self, tokens: np.ndarray, context: Context, cache) -> tuple[np.ndarray, Any]:
        """Logits of new tokens, and the cache with them in it."""
        logits, cache, _ = self._forward(self.params, tokens, context, cache)
        return np.asarray(logits), cache

    def empty(self):
        """A cache for the rows."""
        return empty_cache(self.model, 3, SLOTS)

    def gradients(self, tokens: np.ndarray, context: Context, weights: np.ndarray) -> np.ndarray:
        """Of a weighted sum of bounded logits over the real tokens, by all parameters in a row."""
        leaves = jax.tree.leaves(self._pull(self.params, tokens, context, weights))
        return np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])

    def _loss(self, params, tokens, context: Context, weights):
        logits = self.model.apply({"params": params}, tokens, context)[0]
        return (jnp.tanh(logits) * weights * (context.segments > 0)[..., None]).sum()


def prefill_and_decode(subject: Subject) -> Iterator[Measurement]:
    """Ragged rows in pieces: a prompt and single tokens, chunks, and single tokens alone."""
    context = _rows(ROWS)
    full, real = subject.full(subject.tokens, context), np.asarray(context.segments) > 0
    for name, widths in (
        ("a prompt, then tokens", (PROMPT, *(1,) * (LENGTH - PROMPT))),
        ("chunks, then tokens", (PROMPT, PROMPT, *(1,) * (LENGTH - 2 * PROMPT))),
        ("tokens", (1,) * LENGTH),
    ):
        cache, pieces, at = subject.empty(), [], 0
        for width in widths:
            part = np.s_[:, at : at + width]
            logits, cache = subject.step(
                subject.tokens[part], Context(context.positions[part], context.segments[part]), cache
            )
            pieces.append(logits)
            at += width
        yield _near("values", name, np.concatenate(pieces, axis=1)[real], full[real])


def ragged_prompts(subject: Subject) -> Iterator[Measurement]:
    """Right-padded prompts leave slots that nobody sees; the rows then go on together, each at its own position."""
    full = subject.full(subject.tokens, _rows((LENGTH,) * 3))
    _, cache = subject.step(subject.tokens[:, :PROMPT], _rows(PROMPTS, PROMPT), subject.empty())
    found, expected = [], []
    for step in range(LENGTH - PROMPT):
        at = np.array(PROMPTS, np.int32)[:, None] + step
        tokens = np.take_along_axis(subject.tokens, at, axis=1)
        logits, cache = subject.step(tokens, Context(at, np.ones_like(at)), cache)  # pyright: ignore[reportArgumentType]
        found.append(logits[:, 0])
        expected.append(np.take_along_axis(full, at[..., None], axis=1)[:, 0])
    yield _near("values", f"prompts of {PROMPTS}", np.stack(found), np.stack(expected))


def causality(subject: Subject) -> Iterator[Measurement]:
    """Other tokens from some place on change no bit before it, and do change what follows."""
    context = _rows((LENGTH,) * 3)
    before = subject.full(subject.tokens, context)
    for at in range(1, LENGTH):
        other = subject.tokens.copy()
        other[:, at:] = (other[:, at:] + 1) % VOCAB
        after = subject.full(other, context)
        stuck = float((after[:, at:] == before[:, at:]).all())
        changed = max(distance(after[:, :at], before[:, :at]), stuck)
        yield Measurement("values", f"tokens from {at} changed", changed, 0.0)


def packing(subject: Subject) -> Iterator[Measurement]:
    """Documents of one row against the same in rows of their own: logits, and gradients of all parameters."""
    alone = _rows(DOCUMENTS)

    def pack(rows):
        row = np.concatenate([np.asarray(rows)[row, :length] for row, length in enumerate(DOCUMENTS)])
        return np.stack([row, row, row])

    # The first row holds the documents, the others padding.
    segments = pack(np.array([[2], [5], [1]]) * alone.segments) * np.array([[1], [0], [0]])
    together = Context(pack(alone.positions), segments)  # pyright: ignore[reportArgumentType]
    found, case = subject.full(pack(subject.tokens), together)[0], f"documents of {DOCUMENTS}"
    yield _near("values", case, found, pack(subject.full(subject.tokens, alone))[0])
    # The same program for both, which is compiled once: what is known of rows with one document stays unused.
    expected = subject.gradients(subject.tokens, dataclasses.replace(alone, packed=True), subject.weights)
    found = subject.gradients(pack(subject.tokens), together, pack(subject.weights))
    yield _near("gradients", case, found, expected)


def padding_content(subject: Subject) -> Iterator[Measurement]:
    """Other tokens in the padding, of whole rows and of prompts, change no bit."""
    context = _rows(ROWS)
    real = np.asarray(context.segments) > 0
    other = np.where(real, subject.tokens, (subject.tokens + 1) % VOCAB)
    rows = [subject.full(tokens, context)[real] for tokens in (subject.tokens, other)]
    yield Measurement("values", "whole rows", distance(*rows), 0.0)
    prompts, after = _rows(PROMPTS, PROMPT), np.array(PROMPTS, np.int32)[:, None]
    start, continued = subject.tokens[:, :PROMPT], []
    for tokens in (start, np.where(np.asarray(prompts.segments) > 0, start, (start + 1) % VOCAB)):
        _, cache = subject.step(tokens, prompts, subject.empty())
        context = Context(after, np.ones_like(after))  # pyright: ignore[reportArgumentType]
        continued.append(subject.step(subject.tokens[:, -1:], context, cache)[0])
    yield Measurement("values", "prompts", distance(*continued), 0.0)


def _rows(lengths: tuple[int, ...], width: int = LENGTH) -> Context:
    """One document a row."""
    places = one_each(list(lengths), width)
    return Context(places.positions, places.segments, packed=False)  # pyright: ignore[reportArgumentType]


def _near(what: str, case: str, found, expected) -> Measurement:
    largest = float(np.abs(np.asarray(expected)).max(initial=0.0))
    return Measurement(what, case, distance(found, expected), BOUND * max(1.0, largest))


@functools.lru_cache(maxsize=4)
def subject(sample: Sample, compile: Compile = jax.jit) -> Subject:
    """The model of a sample, made once for all laws."""
    return Subject(sample, compile)


def of_sample(law: Callable[[Subject], Iterator[Measurement]]) -> Law:
    """The law of a sample's model; fp32 is computed with products of full precision on every device."""

    def measured(sample: Sample, dtype: str, compile: Compile) -> Iterator[Measurement]:
        with jax.default_matmul_precision("highest"):
            yield from list(law(subject(sample, compile)))

    return measured


MIXER_LAWS: dict[str, Law] = {
    "prefill = decode": of_sample(prefill_and_decode),
    "ragged prompts": of_sample(ragged_prompts),
    "causality": of_sample(causality),
    "packing": of_sample(packing),
    "padding content": of_sample(padding_content),
}
