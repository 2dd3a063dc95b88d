"""The benchmark of attention: its arithmetic by hand, its processes, and one toy case from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attention as benchmark  # noqa: E402
from attention_cases import Case, cpu_cases, gpu_cases, sampled, tiny_cases  # noqa: E402
from attention_pipe import Contestant  # noqa: E402


def case(**changes) -> Case:
    shape = {"rows": 1, "length": 24, "heads": 1, "kv_heads": 1, "width": 4, "value_width": 4, "dtype": "float32"}
    return Case(**({"kind": "attention", "mask": "causal"} | shape | changes))


def test_pairs_by_counting():
    positions, segments = case(mask="packed").places()
    see = (segments[:, None] == segments) & (positions[:, None] >= positions)
    assert case(mask="packed").pairs() == see.sum()
    at = np.arange(24)
    assert case(mask="window", window=5).pairs() == ((at[:, None] >= at) & (at[:, None] - at < 5)).sum()
    assert case().pairs() == 300
    assert case(kind="decode").pairs() == 24
    # Chunks of 10, 10 and 4 tokens.
    assert case(kind="flash", chunk=10).pairs() == 55 + 55 + 10


def test_work_by_hand():
    # Two heads, 300 pairs, products of widths 4 and 4: 2 * 2 * 300 * 8; five products backwards.
    assert case(heads=2).flops("forward") == 9600
    assert case(heads=2).flops("backward") == 24_000
    # q, k, v and the output: 4 arrays of 24 * 4 * 4 bytes.
    assert case().bytes("forward") == 1536
    assert case(kind="decode", kv_heads=1).bytes("forward") == 4 * (8 + 24 * 8)
    long = case(rows=2, length=8192, heads=16, kv_heads=16, width=128, value_width=128, dtype="bfloat16")
    # 2 rows * 16 heads * 8192 * 8193 / 2 pairs * 512 / 989e12
    assert long.predicted("forward") == pytest.approx(5.559e-4, rel=1e-3)


def test_cases_are_the_promised_ones():
    cases = list(gpu_cases())
    shapes = {(c.kind, c.mask, c.length, c.width) for c in cases}
    lengths = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
    for width in (64, 128, 256):
        assert {("attention", "causal", length, width) for length in lengths} <= shapes
        assert {("attention", mask, 8192, width) for mask in ("packed", "window")} <= shapes
    assert {(c.rows, c.length) for c in cases if c.kind == "decode"} == {
        (rows, length) for rows in (1, 8, 64) for length in (1024, 8192, 32_768)
    }
    assert len(set(cases)) == len(cases)
    assert {c.length for c in cpu_cases() if c.kind == "flash"} == {2**n for n in range(10, 16)}
    assert sampled(cases[0])[[0, -1]].tolist() == [0, 8191]


def answering(tmp_path: Path, body: str) -> Contestant:
    program = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom attention_pipe import Refused, serve\n{body}"
    return Contestant("child", [sys.executable, "-c", program], tmp_path / "log", {})


def test_whatever_a_process_does_is_an_answer(tmp_path):
    child = answering(tmp_path, """
import os, time
def refuse(): raise Refused("no")
def fail(): raise MemoryError("out")
def die(): os._exit(3)
def sleep(): time.sleep(60)
def add(a, b): print("noise"); return {"sum": a + b}
serve({f.__name__: f for f in (refuse, fail, die, sleep, add)})
""")  # fmt: skip
    assert child.ask("add", a=1, b=2) == {"sum": 3}
    assert child.ask("refuse") == {"refused": "no"}
    assert child.ask("fail") == {"failed": "MemoryError: out"}
    assert "exit status 3" in child.ask("die")["failed"]
    assert "no answer within" in child.ask("sleep", patience=0.5)["failed"]
    assert child.ask("add", a=2, b=2) == {"sum": 4}
    child.close()
    assert not child.running


def test_wrong_results_are_not_timed(tmp_path):
    np.savez(tmp_path / "right.npz", out=np.ones(3), dq=np.ones(3))
    for out, wrong in ((1.0, False), (1.1, True), (np.nan, True)):
        np.savez(tmp_path / "found.npz", out=np.full(3, out), dq=np.ones(3))
        answer = benchmark.judged(
            case(), {"results": str(tmp_path / "found.npz")}, {"results": str(tmp_path / "right.npz")}
        )
        assert ("wrong" in answer) == wrong


def test_the_ratio_is_to_the_fastest_rival():
    rows = [{"contestant": name, "part": "forward", "reason": None} for name in ("ours:a", "x", "y", "z")]
    seconds = {"ours:a": [2.0, 1.0, 9.0], "x": [4.0, 4.0, 4.0], "y": [3.0, 3.0, 3.0], "z": [0.1]}
    benchmark.finish(case(), rows, seconds, {"z": "out of memory"})
    assert rows[0]["seconds"] == 2.0 and rows[0]["range"] == [1.0, 9.0]
    assert rows[0]["best_rival"] == "y" and rows[0]["speed_to_best_rival"] == 1.5
    assert rows[3]["reason"] == "failed: out of memory" and "seconds" not in rows[3]


def test_a_toy_run_from_end_to_end(tmp_path):
    benchmark.main(["--cpu", "--tiny", "--rounds", "2", "--only", "blocked", "xla", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "attention_cpu_tiny.json").read_text())
    assert not found["not_measured"]
    assert {row["title"] for row in found["rows"]} == {each.title for each in tiny_cases()}
    timed = {(row["contestant"], row["case"]["kind"]) for row in found["rows"] if row["reason"] is None}
    assert timed >= {("ours:blocked", kind) for kind in ("attention", "gau", "flash")} | {("jax.nn:xla", "attention")}
    for row in found["rows"]:
        if row["reason"] is None:
            assert len(row["times"]) == 2 and max(row["errors"].values()) < 1e-5
        else:
            assert row["reason"].startswith("refused")
    assert (tmp_path / "attention_cpu_tiny.png").stat().st_size > 10_000
    assert "## attention causal 2x96" in (tmp_path / "attention_cpu_tiny.md").read_text()


def test_a_used_up_budget_says_what_is_left(tmp_path):
    benchmark.main(["--cpu", "--tiny", "--budget", "0", "--only", "nobody", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "attention_cpu_tiny.json").read_text())
    assert not found["rows"] and len(found["not_measured"]) == len(list(tiny_cases()))
