"""Throughput and memory of training, PPO and decoding: by layout and devices on CPU, by size and phase on a GPU.

    python benchmarks/scaling.py                 one GPU, ten minutes at most (--devices N spreads 1.3B over several)
    python benchmarks/scaling.py --cpu           simulated devices and real processes on this machine's cores
    python benchmarks/scaling.py --tiny          whether every path of the first runs, on any device
    python benchmarks/scaling.py --cpu --tiny    of the second

Each point is a process of its own (or several that meet on loopback); one that fails leaves a row with its reason. On
CPU the points of a group are timed in turn, round after round, and ratios to its first point are taken inside a
round; on a GPU they have the device to themselves, one after another. Simulated devices share the same cores: their
throughput shows what splitting costs and never a speed-up. Memory of each device is what the compiler reports.
Results go to benchmarks/results/scaling_<cpu or gpu>.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scaling_report as report
from attention_pipe import Contestant
from scaling_points import Group, Point, cpu_groups, gpu_groups, shrunk

HERE = Path(__file__).resolve().parent
OPENING, TIMING = 240.0, 120.0  # seconds of patience on a GPU
SLOWER = 4
"""Times this patience on CPU, where all of a group compile at once."""


class Party:
    """The processes of one point."""

    def __init__(self, point: Point, scratch: Path, name: str, cpu: bool) -> None:
        self.point = point
        command = [sys.executable, str(HERE / "scaling_worker.py"), json.dumps(point.described())]
        if point.processes > 1:
            command += ["--coordinator", f"127.0.0.1:{free_port()}"]
        own = environment(point, cpu)
        self.members = [
            Contestant(f"{name}-{i}", [*command, "--process-id", str(i)], scratch / f"{name}-{i}.log", own)
            for i in range(point.processes)
        ]
        self.alive = True

    def send(self, do: str, **fields: Any) -> None:
        for each in self.members:
            each.send(do, **fields)

    def receive(self, patience: float) -> dict[str, Any]:
        """The first one's answer, or the failure of any."""
        until = time.monotonic() + patience
        answers = [each.receive(max(until - time.monotonic(), 1.0)) for each in self.members]
        failed = [answer for answer in answers if "failed" in answer or "refused" in answer]
        self.alive = not failed
        answer = dict((failed or answers)[0])
        for name in ("rss", "device_peak"):
            if answer.get(name) is not None:
                answer[name] = max(each[name] for each in answers)
        return answer

    def ask(self, do: str, patience: float, **fields: Any) -> dict[str, Any]:
        self.send(do, **fields)
        return self.receive(patience)

    def close(self) -> None:
        for each in reversed(self.members):
            each.close(kill=not self.alive)


def environment(point: Point, cpu: bool) -> dict[str, str]:
    """What the processes of a point see of the devices."""
    found = {"PYTHONPATH": f"{HERE.parent}:{HERE}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    simulated = {
        # Each device that waits in a collective holds a thread of XLA's pool.
        "NPROC": os.environ.get("NPROC", str(max(32, 4 * point.devices))),
        "JAX_NUM_CPU_DEVICES": str(point.devices // point.processes),
    }
    if cpu:
        return found | simulated | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    return found | simulated | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(group: Group, options: argparse.Namespace, scratch: Path, number: int) -> list[dict[str, Any]]:
    """One row for each point of a group; together on CPU, one after another on a GPU."""
    parties = [Party(point, scratch, f"{number}-{i}", options.cpu) for i, point in enumerate(group)]
    if options.cpu:
        rows = _timed(parties, options, SLOWER)
    else:
        rows = [row for party in parties for row in _timed([party], options, 1)]
    for row in rows:
        finish(row, rows[0])
    return rows


def _timed(parties: list[Party], options: argparse.Namespace, slower: int) -> list[dict[str, Any]]:
    until = time.monotonic() + slower * OPENING
    for party in parties:
        party.send("open")
    rows: list[dict[str, Any]] = []
    for party in parties:
        row = {"point": party.point.described(), "title": party.point.title, "spread": party.point.spread}
        rows.append(row | {"open": party.receive(max(until - time.monotonic(), 1.0)), "rounds": []})
    for turn in range(options.rounds):
        # Nobody is always first.
        for party, row in _turned(list(zip(parties, rows, strict=True)), turn):
            if party.alive:
                runs = max(1, min(50, int(options.seconds / max(row["open"]["once"], 1e-6))))
                row["rounds"].append(party.ask("time", slower * TIMING, runs=runs))
    for party, row in zip(parties, rows, strict=True):
        if party.alive:
            row["peak"] = party.ask("peak", TIMING)
        party.close()
    return rows


def _turned(pairs: list[Any], turn: int) -> list[Any]:
    at = turn % len(pairs)
    return pairs[at:] + pairs[:at]


def finish(row: dict[str, Any], first: dict[str, Any]) -> None:
    """Put medians and ratios into a row, or the reason why there are none.

    Args:
        row: with ``open`` and ``rounds``, the answers of its processes.
        first: the row of the group's first point.
    """
    answers = [row["open"], *row["rounds"]]
    row["reason"] = next((f"{word}: {a[word]}" for a in answers for word in ("refused", "failed") if word in a), None)
    if row["reason"] is not None or not row["rounds"]:
        return
    speeds = [_speed(answer) for answer in row["rounds"]]
    row["tokens_per_second"], row["range"] = statistics.median(speeds), [min(speeds), max(speeds)]
    names = row["rounds"][0]["seconds"]
    row["seconds"] = {name: statistics.median(a["seconds"][name] for a in row["rounds"]) for name in names}
    flops = row["open"].get("flops", {})
    row["flops_per_second"] = {name: flops[name] / row["seconds"][name] for name in flops}
    if "bytes" in row["open"]:
        steps = row["rounds"][0]["steps"]
        row["bytes_per_second"] = row["open"]["bytes"] * steps / row["seconds"]["decode"]
    if len(first["rounds"]) == len(speeds) and first.get("reason") is None:
        ratios = [mine / _speed(other) for mine, other in zip(speeds, first["rounds"], strict=True)]
        row["to_first"], row["to_first_range"] = statistics.median(ratios), [min(ratios), max(ratios)]


def _speed(answer: dict[str, Any]) -> float:
    """Tokens a second; of decoding, without the reading of prompts."""
    seconds = {name: each for name, each in answer["seconds"].items() if name != "prefill"}
    return answer["tokens"] / sum(seconds.values())


def run(groups: list[Group], options: argparse.Namespace) -> dict[str, Any]:
    """All rows that the budget allows, and what the machine did before and after."""
    began, load, longest = time.monotonic(), os.getloadavg()[0], 0.0
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        machine = [judged(options, scratch)]
        if not (options.cpu or options.tiny) and machine[0].get("platform") != "gpu":
            raise SystemExit(f"no GPU here ({machine[0]}); take --cpu, or --tiny to see whether everything runs")
        for number, group in enumerate(groups):
            # A group that takes as long as the longest one so far must still fit.
            if time.monotonic() - began + longest > options.budget:
                left += [f"{point.panel}: {point.title}, {point.spread}" for point in group]
                continue
            at = time.monotonic()
            rows += measure(group, options, scratch, number)
            longest = max(longest, time.monotonic() - at)
            words = f"{group[0].panel}: {group[-1].title}"
            print(f"{time.monotonic() - began:5.0f} s  {words}", file=sys.stderr, flush=True)
        machine.append(judged(options, scratch))
    return {
        "rows": rows, "not_measured": left, "machine": machine, "seconds": time.monotonic() - began,
        "budget": options.budget, "rounds": options.rounds, "cpu": options.cpu, "tiny": options.tiny,
        "load": [load, os.getloadavg()[0]], "cores": os.cpu_count(),
    }  # fmt: skip


def judged(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What the device does here and now: products a second, and bytes read and written by a copy."""
    own = {"PYTHONPATH": f"{HERE.parent}:{HERE}"} | ({"JAX_PLATFORMS": "cpu"} if options.cpu else {})
    command = [sys.executable, str(HERE / "attention_worker.py"), "judge", str(scratch)]
    judge = Contestant("judge", command, scratch / "judge.log", own)
    size, dtype = 256 if options.tiny else 2048 if options.cpu else 8192, "float32" if options.cpu else "bfloat16"
    answer = judge.ask("machine", OPENING, dtype=dtype, size=size)
    judge.close()
    return answer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="layouts on simulated devices and processes, fp32")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, where there are several")
    parser.add_argument("--panels", nargs="*", default=[], help="only points of these panels")
    parser.add_argument("--models", nargs="*", default=[], help="only points of these models")
    parser.add_argument("--budget", type=float, help="seconds after which nothing is begun (540; 3600 on CPU)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each point")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one timing, about")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    if options.budget is None:
        options.budget = 3600.0 if options.cpu else 540.0
    groups = cpu_groups() if options.cpu else gpu_groups(options.devices)
    groups = [[p for p in group if p.panel in (options.panels or [p.panel])] for group in groups]
    groups = [[p for p in group if p.model in (options.models or [p.model])] for group in groups]
    groups = [group for group in groups if group]
    if options.tiny:
        groups, options.seconds = shrunk(groups), 0.001
    name = "scaling_cpu" if options.cpu else "scaling_gpu"
    options.output.mkdir(parents=True, exist_ok=True)
    report.write(run(groups, options), options.output / (f"{name}_tiny" if options.tiny else name))


if __name__ == "__main__":
    main()
