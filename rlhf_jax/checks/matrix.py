"""Every law over every implementation, decoder and mixer on this device, and the verdict."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rlhf_jax.checks import attention, chunked, decoding, gated
from rlhf_jax.checks.measure import Compile, Measurement, Verdict, worst
from rlhf_jax.checks.mixers import MIXER_LAWS
from rlhf_jax.checks.samples import SAMPLES
from rlhf_jax.checks.trial import Law, measure
from rlhf_jax.ops.attention import IMPLEMENTATIONS
from rlhf_jax.ops.attention.decode import DECODERS
from rlhf_jax.ops.attention.terms import this_device
from rlhf_jax.ops.flash import FLASH_IMPLEMENTATIONS
from rlhf_jax.ops.gau import GAU_IMPLEMENTATIONS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Kind:
    """Subjects of one kind, and the laws over them.

    Args:
        title: of its table.
        subjects: by name; ``laws`` take their values.
        laws: by name.
        bfloat16: laws that are also measured with such inputs.
        float16: likewise.
    """

    title: str
    subjects: Mapping[str, Any]
    laws: Mapping[str, Law]
    bfloat16: Sequence[str] = ()
    float16: Sequence[str] = ()

    def measured_in(self, dtype: str) -> Iterator[str]:
        """The laws that are measured with inputs of this dtype."""
        chosen = {"float32": self.laws, "bfloat16": self.bfloat16, "float16": self.float16}[dtype]
        return (law for law in self.laws if law in chosen)


EXACT = ("tile sizes", "tile alignment", "key order")
"""What fp32 says of them, and is about places and not about rounding, need not be said again."""


def _narrow(laws: Mapping[str, Law]) -> list[str]:
    return [law for law in laws if law not in EXACT]


KINDS: dict[str, Kind] = {
    "implementation": Kind(
        "implementations of attention", IMPLEMENTATIONS, attention.LAWS, _narrow(attention.LAWS),
        ("packed", "causality", "sink logits"),
    ),
    "decoder": Kind("decoders", DECODERS, decoding.LAWS, _narrow(decoding.LAWS), ("packed", "sink logits")),
    "GAU": Kind("implementations of GAU", GAU_IMPLEMENTATIONS, gated.LAWS, _narrow(gated.LAWS)),
    "FLASH": Kind(
        "implementations of FLASH", {name: name for name in FLASH_IMPLEMENTATIONS}, chunked.LAWS, _narrow(chunked.LAWS)
    ),
    "mixer": Kind("mixers", SAMPLES, MIXER_LAWS),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What one law found of one subject.

    ``kind`` is one of ``KINDS``; ``dtype`` that of the inputs.
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
    def verdict(self) -> Verdict:
        """Refused where nothing was computed, failed where a bound was broken."""
        if not self.measured:
            return "refused"
        return "failed" if any(each.verdict == "failed" for each in self.found) else "passed"

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
        kept = [dataclasses.asdict(each) | {"verdict": each.verdict} for each in self.found]
        return {"kind": self.kind, "subject": self.subject, "law": self.law, "dtype": self.dtype,
                "verdict": self.verdict, "found": kept}  # fmt: skip


Job = tuple[str, str, str, str]
"""(kind, subject, law, dtype) of an entry."""


def jobs(dtypes: Sequence[str] = DTYPES) -> Iterator[Job]:
    """Every entry of the matrix, the subjects apart."""
    for kind, all_of in KINDS.items():
        for name in all_of.subjects:
            for dtype in dtypes:
                yield from ((kind, name, law, dtype) for law in all_of.measured_in(dtype))


def run(job: Job, compile: Compile = jax.jit) -> Entry:
    """One entry. A computation that fails is a failed measurement with the error as its case."""
    kind, subject, law, dtype = job
    try:
        found = measure(KINDS[kind].laws[law], KINDS[kind].subjects[subject], dtype, compile)
    except Exception as error:
        first = str(error).strip().split("\n")[0][:300]
        found = [Measurement("values", f"{type(error).__name__}: {first}", float("nan"), 0.0)]
    return Entry(kind, subject, law, dtype, tuple(found))


def matrix(dtypes: Sequence[str] = DTYPES, report: Callable[[int, int, str], None] = lambda *_: None) -> list[Entry]:
    """All entries; ``report`` is told before each (number, total, what)."""
    todo, entries = list(jobs(dtypes)), []
    for number, job in enumerate(todo, start=1):
        report(number, len(todo), f"{job[0]} {job[1]}: {job[2]}, {job[3]}")
        entries.append(run(job))
    return entries


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """The device, how many entries got which verdict, and every measurement, for JSON."""
    platform, device = this_device()
    counts = Counter(entry.verdict for entry in entries)
    return {
        "platform": platform,
        "device": device,
        "jax": jax.__version__,
        **{verdict: counts[verdict] for verdict in ("passed", "failed", "refused")},
        "entries": [entry.described() for entry in entries],
    }
