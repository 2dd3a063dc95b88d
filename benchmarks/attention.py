"""Time every implementation of attention beside its rivals, in one run on one device.

    python benchmarks/attention.py               one GPU, nine minutes at most
    python benchmarks/attention.py --cpu         fp32 on the cores of this machine
    python benchmarks/attention.py --predict     no device: the least times an H200 could take
    python benchmarks/attention.py --cpu --tiny  whether everything runs

Every contestant is a process of its own: one that fails leaves a row with its reason. All of them draw the same inputs;
what they compute is held against the package's reference in fp32 before it is timed. Then they are timed in turn, round
after round, and a row has the median, the range, and the ratio to the fastest rival of the same case. Cases begin with
the most telling; when the budget is used up, the rest is named as not measured. PyTorch may live in another
environment (--torch PYTHON). Results go to benchmarks/results/attention*.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attention_report as report
import numpy as np
from attention_cases import Case, cpu_cases, gpu_cases, tiny_cases
from attention_pipe import Contestant

HERE = Path(__file__).resolve().parent
OURS = ("reference", "blocked", "hopper", "tpu", "triton", "cudnn")
RIVALS = ("jax.nn:cudnn", "jax.nn:xla", "tokamax:mosaic", "tokamax:triton", "pallas:triton")
TORCH = ("torch:sdpa", "torch:flash")
ON_CPU = ("ours:reference", "ours:blocked", "jax.nn:xla", "torch:sdpa")
BOUND = {"bfloat16": 2e-2, "float32": 2e-4}
"""Of the largest difference, relative to the largest entry of what was expected."""
COMPILING, TIMING = 150.0, 60.0  # seconds of patience


def start(options: argparse.Namespace, scratch: Path) -> tuple[Contestant, list[Contestant]]:
    """The judge and the contestants, none of them running yet."""
    environment = {
        "PYTHONPATH": f"{HERE.parent}:{HERE}",
        # They share one device, and what a process has once taken it keeps.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3",
    }
    if options.cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    seconds = ["--seconds", "0.001" if options.tiny else "0.03"]

    def process(name: str) -> Contestant:
        command = [sys.executable, str(HERE / "attention_worker.py"), name, str(scratch), *seconds]
        if name.startswith("torch:"):
            device = "cpu" if options.cpu else "cuda"
            command = [options.torch, str(HERE / "attention_torch.py"), name, str(scratch), *seconds]
            command += ["--device", device]
        return Contestant(name, command, scratch / f"{name.replace(':', '-')}.log", environment)

    everyone = [f"ours:{name}" for name in OURS] + list(RIVALS) + list(TORCH)
    names = list(ON_CPU) if options.cpu else everyone
    if options.only:
        names = [name for name in names if any(part in name for part in options.only)]
    return process("judge"), [process(name) for name in names]


def measure(
    case: Case, judge: Contestant, contestants: list[Contestant], rounds: int, patience: float
) -> list[dict[str, Any]]:
    """One row for each contestant and part of a case."""
    # They compile at the same time, and this is for all of them together.
    until = time.monotonic() + patience
    judge.send("expect", case=case.described())
    for each in contestants:
        each.send("open", case=case.described())
    expected = judge.receive(patience)
    rows, ready = [], []
    for each in contestants:
        answer = judged(case, each.receive(max(until - time.monotonic(), 1.0)), expected)
        row = {"contestant": each.name, "memory": answer.get("memory"), "errors": answer.get("errors")}
        reason = next((f"{word}: {answer[word]}" for word in ("refused", "failed", "wrong") if word in answer), None)
        for part in case.parts:
            rows.append(row | {"case": case.described(), "title": case.title, "part": part, "reason": reason})
        if reason is None:
            ready.append(each)
    for part in case.parts:
        seconds: dict[str, list[float]] = {each.name: [] for each in ready}
        failed: dict[str, str] = {}
        for turn in range(rounds):
            # Nobody is always first.
            for each in ready[turn % max(len(ready), 1) :] + ready[: turn % max(len(ready), 1)]:
                if each.name in failed:
                    continue
                answer = each.ask("time", TIMING, part=part)
                if "seconds" in answer:
                    seconds[each.name].append(answer["seconds"])
                else:
                    failed[each.name] = answer.get("failed", "no time")
        finish(case, [row for row in rows if row["part"] == part], seconds, failed)
        ready = [each for each in ready if each.name not in failed]
    for each in contestants:
        if each.running:
            each.ask("close", TIMING)
    return rows


def judged(case: Case, answer: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """An answer with the relative errors of its results, or with what is wrong about them."""
    if "results" not in answer:
        return answer
    if "results" not in expected:
        return answer | {"failed": f"could not be checked: {expected}"}
    if expected["results"] is None:
        return answer | {"errors": {}}
    with np.load(answer["results"]) as found, np.load(expected["results"]) as right:
        errors = {
            name: float(np.abs(found[name] - right[name]).max() / np.abs(right[name]).max()) for name in right.files
        }
    answer = answer | {"errors": errors}
    # A NaN is not within the bound either.
    wrong = {name: error for name, error in errors.items() if not error <= BOUND[case.dtype]}
    return answer | {"wrong": f"relative errors {wrong} exceed {BOUND[case.dtype]}"} if wrong else answer


def finish(case: Case, rows: list[dict[str, Any]], seconds: dict[str, list[float]], failed: dict[str, str]) -> None:
    """Put the times into the rows of one part of a case."""
    part = rows[0]["part"]
    medians = {name: statistics.median(times) for name, times in seconds.items() if times and name not in failed}
    rivals = {name: median for name, median in medians.items() if not name.startswith("ours:")}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    for row in rows:
        name = row["contestant"]
        row["predicted_seconds"] = case.predicted(part)
        if name in failed:
            row["reason"] = f"failed: {failed[name]}"
        if name not in medians:
            continue
        row |= {
            "seconds": medians[name], "range": [min(seconds[name]), max(seconds[name])], "times": seconds[name],
            "flops": case.flops(part) / medians[name], "bytes": case.bytes(part) / medians[name],
            "best_rival": best, "speed_to_best_rival": rivals[best] / medians[name] if best else None,
        }  # fmt: skip


def run(options: argparse.Namespace, cases: Iterable[Case]) -> dict[str, Any]:
    """All rows that the budget allows, and what the machine did before and after."""
    load = os.getloadavg()[0]
    began = time.monotonic()
    deadline = began + options.budget
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        judge, contestants = start(options, Path(folder))
        size = 256 if options.tiny else 2048 if options.cpu else 8192
        dtype = "float32" if options.cpu else "bfloat16"
        machine = [judge.ask("machine", COMPILING, dtype=dtype, size=size)]
        for case in cases:
            # A case that takes as long as the longest one so far must still fit.
            if time.monotonic() + longest > deadline:
                left.append(case.title)
                continue
            at = time.monotonic()
            rows += measure(case, judge, contestants, options.rounds, 2 * COMPILING if options.cpu else COMPILING)
            longest = max(longest, time.monotonic() - at)
            print(f"{time.monotonic() - began:5.0f} s  {case.title}", file=sys.stderr, flush=True)
        machine.append(judge.ask("machine", COMPILING, dtype=dtype, size=size))
        for each in (judge, *contestants):
            each.close()
    return {
        "rows": rows, "not_measured": left, "machine": machine, "seconds": time.monotonic() - began,
        "budget": options.budget, "rounds": options.rounds, "cpu": options.cpu, "tiny": options.tiny,
        "load": [load, os.getloadavg()[0]],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="fp32 on the CPU")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time")
    parser.add_argument("--predict", action="store_true", help="only the least times, without a device")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no case is begun")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each contestant and case")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name contains one of these")
    parser.add_argument("--kinds", nargs="*", default=[], help="cases of these kinds alone")
    parser.add_argument("--torch", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    cases = tiny_cases() if options.tiny else cpu_cases() if options.cpu else gpu_cases()
    if options.kinds:
        cases = (case for case in cases if case.kind in options.kinds)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.predict:
        report.predictions(list(cases), options.output / "attention_predicted.md")
        return
    found = run(options, cases)
    name = "attention_cpu" if options.cpu else "attention_gpu"
    report.write(found, options.output / (f"{name}_tiny" if options.tiny else name))


if __name__ == "__main__":
    main()
