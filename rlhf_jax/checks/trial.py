"""What every kind of attention is measured by: a trial of one implementation, and the laws that hold for all kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checks.layouts import Layout, documents, layouts, one_each
from rlhf_jax.checks.measure import Compile, Measurement, distance, exact_bound, worst
from rlhf_jax.checks.oracle import NOTHING_SEEN

WIDE = "float32"
LENGTH = 129
"""Odd, and one more than a tile."""

Law = Callable[[Any, str, Compile], Iterator[Measurement]]
"""(what is measured, dtype, compiler) to what was found."""

Inputs = dict[str, jax.Array]
"""The arguments by name, and the cotangent ``out`` of the output."""

Results = dict[str, np.ndarray]
"""The output ``out`` and gradients (``dq`` is that of ``q``), in float64."""


class Refused(Exception):
    """The implementation says why it does not serve."""


class Trial(Protocol):
    """One implementation at one shape; ``str`` of it names the shape."""

    @property
    def dtype(self) -> str:
        """Of the inputs."""
        ...

    @property
    def slack(self) -> float:
        """How many times the error of a plain program in a narrow type is allowed."""
        ...

    @property
    def by_query(self) -> tuple[str, ...]:
        """Arguments with an entry for each query, [B, T, ...]; so has the cotangent."""
        ...

    @property
    def by_key(self) -> tuple[str, ...]:
        """Arguments with an entry for each key, [B, S, ...]."""
        ...

    def draw(self, layout: Layout) -> Inputs:
        """Normal numbers, the same at every call."""
        ...

    def run(self, inputs: Inputs, layout: Layout) -> Results:
        """What the implementation makes of them; raises ``Refused``."""
        ...

    def expect(self, inputs: Inputs, layout: Layout, dtype: str | None = None) -> Results:
        """What is right: exactly, or as a plain program in ``dtype`` would compute it."""
        ...


def measure(law: Law, subject: Any, dtype: str = WIDE, compile: Compile = jax.jit) -> list[Measurement]:
    """What a law finds; where the subject refuses, its reason.

    Args:
        law: one of a table of laws, such as ``attention.LAWS``.
        subject: what is measured, as this table's laws take it.
        dtype: "float32", "bfloat16" or "float16".
        compile: ``jax.jit`` or the like.
    """
    found: list[Measurement] = []
    try:
        for each in law(subject, dtype, compile):
            found.append(each)
    except Refused as refused:
        found.append(Measurement("values", dtype, refusal=str(refused)))
    return found


def beside_float64(trial: Trial, layout: Layout) -> Iterator[Measurement]:
    """Values and gradients, each by its worst array."""
    inputs = trial.draw(layout)
    case = f"{layout.queries.positions.shape[1]} over {layout.shown.positions.shape[1]}, {trial}"
    yield from judged(trial, case, trial.run(inputs, layout), *expected(trial, inputs, layout))


def expected(trial: Trial, inputs: Inputs, layout: Layout) -> tuple[Results, Results]:
    """What is right exactly, and what a plain program finds; in fp32, where no plain program is asked, both alike."""
    exact = trial.expect(inputs, layout)
    return exact, exact if trial.dtype == WIDE else trial.expect(inputs, layout, trial.dtype)


def judged(trial: Trial, case: str, found: Results, exact: Results, plain: Results) -> Iterator[Measurement]:
    """Results beside exact ones, with the bound that a plain program's results set."""
    values = [name for name in found if name in exact and not name.startswith("d")]
    gradients = [name for name in found if name in exact and name.startswith("d")]
    for what, names in (("values", values), ("gradients", gradients)):
        if names:
            yield worst(
                Measurement(what, f"{name} of {case}", _distance(name, found[name], exact[name]),
                            bound(exact[name], plain[name], trial.dtype, trial.slack))
                for name in names
            )  # fmt: skip


def _distance(name: str, found: np.ndarray, exact: np.ndarray) -> float:
    """For queries that see nothing any log-sum-exp is right that is as good as -infinity."""
    if name == "lse":
        found = np.where((exact == NOTHING_SEEN) & (found <= NOTHING_SEEN / 2), NOTHING_SEEN, found)
    return distance(found, exact)


def bound(exact: np.ndarray, plain: np.ndarray, dtype: str, slack: float = 2.0) -> float:
    """In a narrow type: ``slack`` times the error of a plain program, and of writing the result."""
    exact = np.where(exact == NOTHING_SEEN, 0.0, exact)
    if dtype == WIDE:
        return exact_bound(exact)
    plain = np.where(plain == NOTHING_SEEN, 0.0, plain)
    narrow = jnp.dtype(dtype)
    written = (exact.astype(narrow) + narrow.type(0.3) - narrow.type(0.3)).astype(np.float64)
    return slack * distance(plain, exact) + 2.0 * distance(written, exact) + exact_bound(exact)


def causality(trial: Trial, layout: Layout, places: Iterable[int]) -> Iterator[Measurement]:
    """The past is the same to the bit whatever the future holds, and a loss of the past has no gradient there."""
    inputs, names = trial.draw(layout), (*trial.by_query, *trial.by_key)
    before = trial.run(inputs, layout)
    for at in places:
        future = {name: inputs[name].at[:, at:].add(1.0) for name in names}
        after = trial.run(inputs | future | {"out": inputs["out"].at[:, at:].set(0.0)}, layout)
        case = f"from token {at} of {layout.queries.positions.shape[1]}, {trial}"
        yield Measurement("values", case, distance(after["out"][:, :at], before["out"][:, :at]), 0.0)
        yield Measurement("gradients", case, largest(after[f"d{name}"][:, at:] for name in names), 0.0)


def planted(trial: Trial, kinds: Mapping[str, Layout], *garbage: float) -> Iterator[Measurement]:
    """What stands in padding, of cotangents too, changes no bit of anything else and gets no gradient."""
    for (kind, layout), dirt in itertools.product(kinds.items(), garbage):
        inputs, case = trial.draw(layout), f"{dirt}, {kind}, {trial}"
        queries, keys = layout.queries.segments == 0, layout.shown.segments == 0
        hidden = {name: queries for name in trial.by_query} | {name: keys for name in trial.by_key}
        changed = {name: inputs[name].at[np.nonzero(where)].set(dirt) for name, where in hidden.items()}
        changed["out"] = inputs["out"].at[np.nonzero(queries)].set(dirt)
        clean, dirty = trial.run(inputs, layout), trial.run(inputs | changed, layout)
        yield Measurement("values", case, distance(dirty["out"], clean["out"]), 0.0)
        if any(name.startswith("d") for name in clean):
            moved = [dirty[name] - clean[name] for name in clean if name.startswith("d")]
            got = [dirty[f"d{name}"][where] for name, where in hidden.items()]
            yield Measurement("gradients", case, largest(moved + got), 0.0)


def packing(trial: Trial, window: int | None = None, length: int = LENGTH) -> Iterator[Measurement]:
    """Documents in rows of their own are what the oracle says of them packed into a row."""
    together = documents(length)
    pieces = [
        (row, np.flatnonzero(together.segments[row] == segment))
        for row in range(2)
        for segment in dict.fromkeys(together.segments[row].tolist())
        if segment != 0
    ]
    packed = Layout(together, window=window)
    inputs, names = trial.draw(packed), (*trial.by_query, *trial.by_key)
    exact, plain = expected(trial, inputs, packed)
    results = ("out", *(f"d{name}" for name in names))
    for first, second in zip(pieces, (*pieces[1:], pieces[0]), strict=True):

        def apart(x, pair=(first, second)):
            ends = [(0, 0)] * (x.ndim - 2)
            return np.stack([np.pad(x[row, slots], ((0, length - len(slots)), *ends)) for row, slots in pair])

        # The same program for both, which is compiled once: what is known of rows with one document stays unused.
        alone = replace(one_each([len(first[1]), len(second[1])], length), packed=True)
        moved = inputs | {name: jnp.asarray(apart(inputs[name])) for name in (*names, "out")}
        found = trial.run(moved, Layout(alone, window=window))
        right, written = ({name: apart(each[name]) for name in results} for each in (exact, plain))
        yield from judged(trial, f"window {window}, {trial}", found, right, written)


def determinism(trial: Trial, layout: Layout) -> Iterator[Measurement]:
    """The same call twice gives the same bits, gradients included."""
    inputs = trial.draw(layout)
    one, other = trial.run(inputs, layout), trial.run(inputs, layout)
    yield Measurement("values", str(trial), distance(one["out"], other["out"]), 0.0)
    moved = [one[name] - other[name] for name in one if name.startswith("d")]
    if moved:
        yield Measurement("gradients", str(trial), largest(moved), 0.0)


def some(length: int, *kinds: str) -> dict[str, Layout]:
    """Those of ``layouts``."""
    known = layouts(length)
    return {kind: known[kind] for kind in kinds}


def largest(arrays: Iterable[np.ndarray]) -> float:
    """Largest absolute entry; NaN if there is one."""
    return float(max((np.abs(x).max(initial=0.0) for x in arrays), key=lambda x: (np.isnan(x), x)))
