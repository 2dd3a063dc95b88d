"""Break attention on purpose, one line at a time, and show that a named test notices each break.

    python benchmarks/mutations.py                  every break; about ten minutes on two cores
    python benchmarks/mutations.py --only window    those whose name contains a word
    python benchmarks/mutations.py --record         write the table into results/mutations.md, too

Each break is an exact replacement, which must fit once, in a copy of the package; the test that has to fail runs there
and must have passed in the copy before. Exits with 1 if a break goes unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "mutations.md"
CAUGHT = "caught"
COPIED = ("rlhf_jax", "tests", "experiments", "pyproject.toml")
LAW = "tests/test_attention_laws.py::test_implementations_keep_the_law[{}]"
MIXER = "tests/test_attention_laws.py::test_mixers_keep_the_law[{}]"
MASKS, TERMS = "rlhf_jax/ops/attention/masks.py", "rlhf_jax/ops/attention/terms.py"
TILES, BACKWARD = "rlhf_jax/ops/attention/blocked_tiles.py", "rlhf_jax/ops/attention/blocked_backward.py"
FORWARD, CACHES = "rlhf_jax/ops/attention/blocked.py", "rlhf_jax/models/mixers/caches.py"
FLASH, STATE = "rlhf_jax/ops/flash_blocked.py", "rlhf_jax/ops/flash_state.py"
ATTENTION, SPARSE = "rlhf_jax/models/mixers/attention.py", "rlhf_jax/models/mixers/sparse.py"
REFERENCE, DECODE = "rlhf_jax/ops/attention/reference.py", "rlhf_jax/ops/attention/decode.py"
GAU, GAU_REFERENCE = "rlhf_jax/ops/gau_blocked.py", "rlhf_jax/ops/gau_reference.py"
GAU_MIXER = "rlhf_jax/models/mixers/gau.py"
DECODING = "tests/test_attention_laws.py::test_decoding_keeps_the_law[{}]"
GATED = "tests/test_attention_laws.py::test_gated_attention_keeps_the_law[{}]"
CHUNKED = "tests/test_attention_laws.py::test_flash_keeps_the_law[{}]"


@dataclass(frozen=True)
class Mutation:
    """One break: ``old`` becomes ``new`` in ``file``, and ``test`` has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation("window one too wide", MASKS, "positions - window + 1, 0)", "positions - window, 0)",
             LAW.format("reference-packed window")),
    Mutation("segments ignored", MASKS,
             "same = self.query_segments[:, :, None] == self.key_segments[:, None, :]",
             "same = (self.query_segments[:, :, None] != 0) & (self.key_segments[:, None, :] != 0)",
             LAW.format("reference-packed window")),
    Mutation("segments ignored inside tiles", TILES, "shown & (segment == key_segment) & (segment != 0)",
             "shown & (key_segment != 0) & (segment != 0)", LAW.format("blocked-packed window")),
    Mutation("causality given up in the tail tile", MASKS, "& (key(high) < query(end_low))",
             "& (key(low) < query(end_low))",
             "tests/test_attention.py::test_blocks_are_certain_where_they_say_so"),
    Mutation("causality reversed", MASKS, "return inside & (key < end)", "return inside & (key >= end - 1)",
             LAW.format("reference-causal")),
    Mutation("stride off by one", MASKS, "(query - key) % self.stride == 0", "(query - key) % self.stride == 1",
             LAW.format("reference-strided")),
    Mutation("one sink too many", MASKS, "inside | (key < self.sinks)", "inside | (key <= self.sinks)",
             LAW.format("reference-sinks")),
    Mutation("tiles left out", MASKS, "in_range = key(high) >= query(start_low)",
             "in_range = key(low) >= query(start_low)", LAW.format("blocked-packed window")),
    Mutation("keys turned one position too far", ATTENTION, "rope.rotate(k, queries.positions)\n",
             "rope.rotate(k, queries.positions + 1)\n",
             "tests/test_transformer.py::test_logits_equal_a_forward_pass_in_numpy[modern]"),
    Mutation("dV of one query head of a group", BACKWARD,
             'jnp.einsum("rkqd,rkqs->rkds", douts[i], weights,',
             'jnp.einsum("rkqd,rkqs->rkds", douts[i][:, :, : tiling.queries], weights[:, :, : tiling.queries],',
             LAW.format("blocked-head grouping")),
    Mutation("dK of one query head of a group", BACKWARD,
             'jnp.einsum("rkqd,rkqs->rkds", queries[i], dproducts,',
             'jnp.einsum("rkqd,rkqs->rkds", queries[i][:, :, : tiling.queries], dproducts[:, :, : tiling.queries],',
             LAW.format("blocked-head grouping")),
    Mutation("gradient of the log-sum-exp dropped", BACKWARD, "out.astype(wide)) - dlse", "out.astype(wide))",
             LAW.format("blocked-log-sum-exp")),
    Mutation("gradient of sink logits reversed", BACKWARD, "dsink = -(jnp.exp", "dsink = (jnp.exp",
             LAW.format("blocked-sink logits")),
    Mutation("sink logits dropped", FORWARD, "total * kept + jnp.exp(sink - higher)", "total * kept",
             LAW.format("blocked-sink logits")),
    Mutation("soft-cap without its gradient", TERMS,
             "cotangent * (1.0 - jnp.square(logits_before_slopes / self.softcap))", "cotangent",
             LAW.format("blocked-soft-cap")),
    Mutation("ALiBi the wrong way round", TERMS, "logits = logits - slopes * (", "logits = logits + slopes * (",
             LAW.format("reference-ALiBi")),
    Mutation("ring one slot too large", CACHES, "(positions - first) % size)", "(positions - first) % (size + 1))",
             MIXER.format("window and sinks-prefill = decode")),
    Mutation("padding takes a slot of the ring", CACHES, "(context.segments != 0) & (slots >= 0)", "(slots >= 0)",
             MIXER.format("window-ragged prompts")),
    Mutation("exclusive sum over chunks made inclusive", FLASH,
             'return _next(state, k, v, keep), _product("btd,bde->bte", q, state)',
             'state = _next(state, k, v, keep)\n        return state, _product("btd,bde->bte", q, state)',
             CHUNKED.format("blocked-causality")),
    Mutation("chunks of packed documents run together", FLASH,
             "same = (own == document[:, None, :]) & (own != 0)", "same = (document[:, None, :] != 0) & (own != 0)",
             MIXER.format("FLASH-packing")),
    Mutation("a chunk taken up one token too early", STATE, "full = real & (slot == chunk - 1)",
             "full = real & (slot == chunk - 2)", MIXER.format("FLASH-prefill = decode")),
    Mutation("state of packed documents read by the next", FLASH,
             "readable = (document == open_before[..., None]) & (document != 0)", "readable = document != 0",
             CHUNKED.format("blocked-packed")),
    Mutation("open chunk taken up", FLASH, "slots < (lengths // chunk * chunk)[:, None]", "slots < lengths[:, None]",
             MIXER.format("FLASH-prefill = decode")),
    Mutation("gradient of the state dropped", FLASH, "return dq.astype(q.dtype), dk, dv, None, first",
             "return dq.astype(q.dtype), dk, dv, None, jnp.zeros_like(first)", CHUNKED.format("blocked-state")),
    Mutation("padding of the reference not zeroed", REFERENCE,
             "k, v = (zero_where_padded(x, mask.key_segments) for x in (k, v))", "k, v = k, v",
             LAW.format("reference-NaN in padding")),
    Mutation("cotangents of padding not zeroed", REFERENCE, "out = zero_where_padded(out, mask.query_segments)",
             "out = out + 0.0", LAW.format("reference-NaN in padding")),
    Mutation("decoding one slot too many", DECODE, "values.swapaxes(1, 2), mask, terms",
             "values.swapaxes(1, 2), mask.replace(start=mask.start - 1), terms", DECODING.format("packed window")),
    Mutation("GAU loses its diagonal", GAU, "self.queries(mask.end, place)[:, None]",
             "self.queries(mask.end, place)[:, None] - 1", GATED.format("blocked-packed window")),
    Mutation("GAU sees the next token", GAU, "self.queries(mask.end, place)[:, None]",
             "self.queries(mask.end, place)[:, None] + 1", GATED.format("blocked-causality")),
    Mutation("GAU divided by one key too many", GAU, "[:, :length] / normaliser[..., None]",
             "[:, :length] / (normaliser[..., None] + 1)", GATED.format("blocked-packed window")),
    Mutation("GAU divided alike at every query", GAU_REFERENCE, "normaliser[..., None].astype(wide)",
             "normaliser.mean(axis=1)[:, None, None].astype(wide)", GATED.format("reference-packed window")),
    Mutation("GAU counts the whole row", GAU_MIXER, "visible = queries.positions + 1",
             "visible = jnp.full_like(queries.positions, queries.positions.shape[1])",
             MIXER.format("GAU-prefill = decode")),
    Mutation("GAU's bias off by one", "rlhf_jax/ops/gau_terms.py", "jnp.clip(distance, 0,",
             "jnp.clip(distance + 1, 0,", GATED.format("reference-bias")),
    Mutation("gradient of GAU's bias at the wrong distance", GAU, "jnp.clip(view.distance(place), 0,",
             "jnp.clip(view.distance(place) + 1, 0,", GATED.format("blocked-bias")),
    Mutation("plan of strided layers without their classes", SPARSE,
             "part(case_of(self, d_model, style, platform, device), rows * classes, each, each)",
             "part(case_of(self, d_model, style, platform, device), rows, each, each)",
             "tests/test_plans.py::test_what_is_planned_is_what_runs_ask_for[strided-False]"),
)  # fmt: skip


def fits(mutation: Mutation, root: Path = ROOT) -> int:
    """How often the text to be replaced occurs."""
    return (root / mutation.file).read_text(encoding="utf-8").count(mutation.old)


def passes(root: Path, *tests: str) -> tuple[bool, bool, str]:
    """Whether the tests pass in the copy, whether they really ran and failed, and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    failed = done.returncode == 1 and all(f"FAILED {test}" in done.stdout for test in tests)
    return done.returncode == 0, failed, done.stdout + done.stderr


def show(outcomes: list[tuple[Mutation, str, float]]) -> None:
    """Print what became of each break."""
    table = Table("break", "file", "test", "outcome", "seconds")
    for mutation, said, seconds in outcomes:
        outcome = Text(said, style="green" if said == CAUGHT else "bold red")
        test = Text(mutation.test.partition("::")[2])
        table.add_row(mutation.name, Path(mutation.file).name, test, outcome, f"{seconds:.0f}")
    Console().print(table)


def recorded(outcomes: list[tuple[Mutation, str, float]]) -> str:
    """The same in Markdown, without times."""
    caught = sum(said == CAUGHT for _, said, _ in outcomes)
    rows = [f"| {each.name} | `{Path(each.file).name}` | `{each.test.partition('::')[2]}` | {said} |"
            for each, said, _ in outcomes]  # fmt: skip
    total = f"`python benchmarks/mutations.py --record`: {caught} of {len(rows)} breaks were caught."
    head = "| break | file | test that has to fail | outcome |"
    return "\n".join(["# Faults planted in attention", "", total, "", head, "|---|---|---|---|", *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the names of the breaks to try")
    parser.add_argument("--record", action="store_true", help="write the table into results/mutations.md")
    asked = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if asked.only in mutation.name]
    wrong = [mutation.name for mutation in chosen if fits(mutation) != 1]
    if wrong or not chosen:
        print(f"these replacements do not fit exactly once: {', '.join(wrong)}" if chosen else "no such break")
        return 1
    outcomes: list[tuple[Mutation, str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for source in (ROOT / name for name in COPIED):
            if source.is_dir():
                shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / source.name)
        fine, _, said = passes(copy, *dict.fromkeys(mutation.test for mutation in chosen))
        if not fine:
            print(f"the tests do not pass before anything is broken:\n{said[-4000:]}")
            return 1
        survived = 0
        for number, mutation in enumerate(chosen, start=1):
            file, start = copy / mutation.file, time.monotonic()
            before = file.read_text(encoding="utf-8")
            file.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
            try:
                _, caught, _ = passes(copy, mutation.test)
            finally:
                file.write_text(before, encoding="utf-8")
            survived += not caught
            said = CAUGHT if caught else "SURVIVED"
            print(f"[{number}/{len(chosen)}] {mutation.name}: {said}", file=sys.stderr, flush=True)
            outcomes.append((mutation, said, time.monotonic() - start))
    show(outcomes)
    print(f"{len(chosen) - survived} of {len(chosen)} breaks were caught")
    if asked.record:
        RECORD.write_text(recorded(outcomes), encoding="utf-8")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
