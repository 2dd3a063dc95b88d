"""Every law over every implementation and mixer on this device, and the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rlhf_jax.checks.attention import LAWS, measure
from rlhf_jax.checks.measure import Compile, Measurement, worst
from rlhf_jax.checks.mixers import MIXER_LAWS, measure_mixer
from rlhf_jax.checks.samples import SAMPLES
from rlhf_jax.ops.attention import IMPLEMENTATIONS
from rlhf_jax.ops.attention.terms import this_device

DTYPES = ("float32", "bfloat16", "float16")
HALF = ("packed", "causality", "sink logits")
"""Laws that are also measured in float16."""


@dataclass(frozen=True)
class Entry:
    """What one law found of one subject.

    ``kind`` is "implementation" or "mixer"; ``dtype`` that of the inputs.
    """

    kind: str
    subject: str
    law: str
    dtype: str
    found: tuple[Measurement, ...]

    @property
    def measured(self) -> tuple[Measurement, ...]:
        """Those that were computed."""
        return tuple(each for each in self.found if each.error is not None)

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.found)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Reasons, each once."""
        return tuple(dict.fromkeys(each.refusal for each in self.found if each.refusal is not None))

    @property
    def worst(self) -> Measurement | None:
        """The measurement that is nearest to its bound, or furthest beyond it."""
        return worst(self.measured) if self.measured else None

    def described(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        kept = [dataclasses.asdict(each) | {"passed": each.passed} for each in self.found]
        return {"kind": self.kind, "subject": self.subject, "law": self.law, "dtype": self.dtype,
                "passed": self.passed, "found": kept}  # fmt: skip


def jobs(dtypes: Sequence[str] = DTYPES) -> Iterator[tuple[str, str, str, str]]:
    """(kind, subject, law, dtype) of every entry of the matrix, the subjects apart."""
    for name in IMPLEMENTATIONS:
        for dtype in dtypes:
            yield from (("implementation", name, law, dtype) for law in LAWS if dtype != "float16" or law in HALF)
    for name in SAMPLES if "float32" in dtypes else ():
        yield from (("mixer", name, law, "float32") for law in MIXER_LAWS)


def run(job: tuple[str, str, str, str], compile: Compile = jax.jit) -> Entry:
    """One entry. A computation that fails is a failed measurement with the error as its case."""
    kind, subject, law, dtype = job
    try:
        if kind == "implementation":
            found = measure(subject, IMPLEMENTATIONS[subject], law, dtype, compile)
        else:
            found = measure_mixer(SAMPLES[subject], law, compile)
    except Exception as error:
        first = str(error).strip().split("\n")[0][:300]
        found = [Measurement(law, "values", f"{type(error).__name__}: {first}", float("nan"), 0.0)]
    return Entry(kind, subject, law, dtype, tuple(found))


def matrix(dtypes: Sequence[str] = DTYPES, report: Callable[[int, int, str], None] = lambda *_: None) -> list[Entry]:
    """All entries; ``report`` is told before each (number, total, what)."""
    todo, entries = list(jobs(dtypes)), []
    for number, job in enumerate(todo, start=1):
        report(number, len(todo), f"{job[1]}: {job[2]}, {job[3]}")
        entries.append(run(job))
    return entries


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """The device, the verdict and every measurement, for JSON."""
    platform, device = this_device()
    return {
        "platform": platform,
        "device": device,
        "jax": jax.__version__,
        "passed": all(entry.passed for entry in entries),
        "entries": [entry.described() for entry in entries],
    }
