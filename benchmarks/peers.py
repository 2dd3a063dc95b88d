"""rlhf_jax beside transformers and TRL on PyTorch, on the same CPU cores in one run.

    python benchmarks/peers.py --setup       once: makes .venv-peers with what peers-requirements.txt names
    python benchmarks/peers.py               about ten minutes; leave the machine alone meanwhile

One GPT-2 of about 14M parameters (sizes.py), fp32, the same weights and the same shapes on both sides:

- training_step: forward, backward and AdamW on 8 rows of 256 tokens. Both sides take the same steps on the same tokens;
  that their losses agree is checked before anything is reported.
- generation: 128 new tokens for each of 32 prompts of 16 to 64 tokens, drawn at temperature 1, none ending early.
- ppo: one whole iteration on those prompts: rollout, reward model, reference log-probabilities, values, advantages and
  4 epochs of 4 updates, by rlhf_jax.training.reinforcement and by trl's PPOTrainer.

Each side is a warm process of its own. They are asked in turn (ours, theirs, ours, ...) and the one that is not asked
sleeps. Reported: the median and the range of the timings, and of their ratios round by round. Compilation is not part
of a timing; the first rounds, which compile, are not counted and are noted apart. Results go to a JSON file, a Markdown
table and a PNG beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lines import Side
from sizes import FULL, TINY, Sizes

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers"
OURS, EAGER, COMPILED = "rlhf_jax", "transformers/TRL", "with torch.compile"
LOSS_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Measurement:
    """What is timed, against whom, and how many times as fast we mean to be."""

    task: str
    title: str
    target: float
    sides: tuple[str, ...]
    rounds: int
    warmups: int


MEASUREMENTS = (
    Measurement("training_step", "training step", 1.5, (OURS, EAGER, COMPILED), rounds=7, warmups=3),
    Measurement("generation", "batched generation", 3.0, (OURS, EAGER), rounds=7, warmups=2),
    Measurement("ppo", "PPO iteration", 3.0, (OURS, EAGER), rounds=3, warmups=1),
)


def set_up() -> None:
    """The peer's environment. pip's own settings (index, proxy) apply; a CPU build of torch is enough."""
    subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    install = [str(peer_python()), "-m", "pip", "install", "-r", str(HERE / "peers-requirements.txt")]
    subprocess.run(install, check=True)


def peer_python() -> Path:
    return PEERS / ("Scripts" if os.name == "nt" else "bin") / "python"


def usable_cores(count: int) -> list[int]:
    """The first ``count`` cores that this process may use."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return allowed[:count]


def save_inputs(folder: Path, tiny: bool) -> None:
    """Starting weights and tokens for both sides."""
    command = [str(peer_python()), str(HERE / "side_torch.py"), "inputs", str(folder)] + ["--tiny"] * tiny
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def start(side: str, task: str, folder: Path, cores: list[int], tiny: bool) -> Side:
    """A process for one side of one measurement."""
    if side == OURS:
        command = [sys.executable, str(HERE / "side_jax.py"), task, str(folder)]
    else:
        command = [str(peer_python()), str(HERE / "side_torch.py"), task, str(folder), "--threads", str(len(cores))]
    command += ["--compile"] * (side == COMPILED) + ["--tiny"] * tiny
    # The package also where it is not installed.
    path = {"PYTHONPATH": str(HERE.parent)} if side == OURS else {}
    name = {OURS: "rlhf_jax", EAGER: "peer", COMPILED: "compiled"}[side]
    return Side(command, cores, folder / f"{task}-{name}.log", path)


def measure(measurement: Measurement, folder: Path, cores: list[int], tiny: bool, rounds: int | None) -> dict[str, Any]:
    """Ask the sides in turn; every answer, and what they said about themselves."""
    sides: dict[str, Side] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        for name in measurement.sides:
            sides[name] = start(name, measurement.task, folder, cores, tiny)
            stack.callback(sides[name].close)
        hello = {name: side.read() for name, side in sides.items()}
        counts = {name: said["parameters"] for name, said in hello.items()}
        expected = (TINY if tiny else FULL).parameters
        if set(counts.values()) != {expected}:
            raise RuntimeError(f"the sides have {counts} parameters; expected {expected}")
        total = measurement.warmups + (measurement.rounds if rounds is None else rounds)
        for number in range(total):
            for name, side in sides.items():
                answers.setdefault(name, []).append(side.ask())
                took = answers[name][-1]["seconds"]
                note = "warm-up" if number < measurement.warmups else f"round {number - measurement.warmups + 1}"
                print(f"  {measurement.title}, {note}: {name} {took:.3f} s", flush=True)
    check_same_work(measurement, answers)
    return {"hello": hello, "warmups": measurement.warmups, "answers": answers}


def check_same_work(measurement: Measurement, answers: dict[str, list[dict[str, Any]]]) -> None:
    """Both sides must have done the same: equal losses, as many tokens, as many updates."""
    ours = answers[OURS]
    for name, theirs in answers.items():
        for mine, other in zip(ours, theirs, strict=True):
            for field in ("tokens", "updates", "count"):
                if mine.get(field) != other.get(field):
                    raise RuntimeError(
                        f"{measurement.title}: {OURS} counts {mine.get(field)} {field}, {name} {other.get(field)}"
                    )
            for a, b in zip(mine.get("losses", []), other.get("losses", []), strict=True):
                if abs(a - b) > LOSS_TOLERANCE:
                    raise RuntimeError(f"{measurement.title}: the loss is {a} in {OURS} and {b} in {name}")


def summarise(measurement: Measurement, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a side: median, range, and how many times as fast as it we are."""
    timed = {
        name: [answer["seconds"] / answer["count"] for answer in answers[found["warmups"] :]]
        for name, answers in found["answers"].items()
    }
    rows = []
    for name, seconds in timed.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, timed[OURS], strict=True)]
        answers = found["answers"][name]
        idle = [after["cpu_before"] - before["cpu_after"] for before, after in zip(answers, answers[1:], strict=False)]
        rows.append(
            {
                "measurement": measurement.title,
                "side": name,
                "seconds": statistics.median(seconds),
                "seconds_range": [min(seconds), max(seconds)],
                "times_as_fast": statistics.median(seconds) / statistics.median(timed[OURS]),
                "times_as_fast_range": [min(ratios), max(ratios)],
                "target": measurement.target if name == EAGER else None,
                "first_call_seconds": answers[0]["seconds"],
                "peak_memory_mib": max(answer["peak_mib"] for answer in answers),
                "cpu_seconds_while_idle": max(idle, default=0.0),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The summary in Markdown."""
    lines = [
        "| | side | seconds: median (range) | rlhf_jax is faster by | wanted | first call, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["seconds_range"]
        seconds = f"{row['seconds']:.3f} ({low:.3f} to {high:.3f})"
        low, high = row["times_as_fast_range"]
        faster = "" if row["side"] == OURS else f"{row['times_as_fast']:.2f} times ({low:.2f} to {high:.2f})"
        wanted = "" if row["target"] is None else f"{row['target']:.1f}"
        memory = f"{row['peak_memory_mib']:.0f}"
        cells = [row["measurement"], row["side"], seconds, faster, wanted, f"{row['first_call_seconds']:.1f}", memory]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """One panel a measurement: seconds of each side, with the range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = list(dict.fromkeys(row["measurement"] for row in rows))
    figure, axes = plt.subplots(1, len(titles), figsize=(3.9 * len(titles), 3.6), squeeze=False)
    colours = {OURS: "#2a6f97", EAGER: "#b5651d", COMPILED: "#d9a066"}
    for axis, title in zip(axes[0], titles, strict=True):
        panel = [row for row in rows if row["measurement"] == title]
        names = [row["side"] for row in panel]
        medians = [row["seconds"] for row in panel]
        spread = [[m - row["seconds_range"][0] for m, row in zip(medians, panel, strict=True)],
                  [row["seconds_range"][1] - m for m, row in zip(medians, panel, strict=True)]]  # fmt: skip
        shown = [name.replace("/", "/\n").replace("with ", "with\n") for name in names]
        bars = axis.bar(shown, medians, yerr=spread, color=[colours[name] for name in names], capsize=4)
        axis.bar_label(bars, [f"{m:.2f} s" for m in medians], padding=3, fontsize=8)
        axis.set_title(f"{title}\n{panel[1]['times_as_fast']:.2f} times as fast", fontsize=10)
        axis.margins(y=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("seconds, median and range (less is better)", fontsize=8)
    figure.text(0.5, 0.015, about, fontsize=8, ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def circumstances(sizes: Sizes, cores: list[int], load: float, found: dict[str, Any]) -> dict[str, Any]:
    """Where, when and with what."""
    versions, flags = {"python": platform.python_version()}, ""
    for measured in found.values():
        for said in measured["hello"].values():
            versions |= said["versions"]
            flags = said.get("flags", flags)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": machine(),
        "cores": len(cores),
        "load_at_start": load,
        "versions": versions,
        "xla_flags": flags,
        "parameters": sizes.parameters,
        "sizes": asdict(sizes),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peer's environment, then stop")
    parser.add_argument("--only", nargs="+", choices=[m.task for m in MEASUREMENTS], help="some of the measurements")
    parser.add_argument("--rounds", type=int, help="timings of each side (7, and 3 of the PPO iteration)")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides are held to (2)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers", help="results go here, less the suffix")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    if options.setup:
        set_up()
        return 0
    if not peer_python().exists():
        print(f"{peer_python()} does not exist; run this script with --setup first", file=sys.stderr)
        return 2
    sizes = TINY if options.tiny else FULL
    cores = usable_cores(options.cores)
    begun = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if begun > 0.3:
        print(f"the machine is busy (load {begun:.1f}): the timings will be too long, and their ratios off")
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_inputs(folder, options.tiny)
        for measurement in MEASUREMENTS:
            if options.only is None or measurement.task in options.only:
                found[measurement.task] = measure(measurement, folder, cores, options.tiny, options.rounds)
                rows += summarise(measurement, found[measurement.task])
    report(rows, circumstances(sizes, cores, begun, found), found, options.out)
    return 0


def report(rows: list[dict[str, Any]], about: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    """Print the table, and write it beside the numbers and the picture."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = f"{about['processor']}, {about['cores']} cores, {about['parameters']:,} parameters, fp32"
    line = f"{where}; {versions}; {about['date'][:10]}"
    lines = table(rows)
    print("\n" + "\n".join(lines) + f"\n\n{line}")
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps({**about, "summary": rows, "measurements": found}, indent=1) + "\n")
    Path(f"{out}.md").write_text("\n".join(lines) + f"\n\n{line}\n")
    draw(rows, line, Path(f"{out}.png"))
    print(f"written: {out}.json, {out}.md, {out}.png")


if __name__ == "__main__":
    sys.exit(main())
