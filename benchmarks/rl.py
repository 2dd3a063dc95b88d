"""Reinforcement learning by phases beside TRL's trainers, and sampling in slots beside whole batches, on CPU.

    python benchmarks/peers.py --setup       once: makes .venv-peers with what peers-requirements.txt names
    python benchmarks/rl.py                  about a quarter of an hour; leave the machine alone meanwhile

One GPT-2 of about 14M parameters, fp32, the same weights, prompts, group size, reward and number of updates on both
sides (rl_sizes.py). Parts (``--part``):

- trl: one whole iteration of GRPO and of RLOO: 64 responses to 8 prompts, rewards in plain Python, one update. Once
  with responses that all have 128 tokens, once with lengths from a long-tailed distribution. Reported by phase:
  generation; scoring (rewards, reference and old log-probabilities, advantages); update.
- refill: 128 responses of long-tailed lengths: all rows together, in batches of 32 rows, and in 32 slots.

Each side is a warm process of its own; they are asked in turn, and the one that is not asked sleeps. Rounds that
compile are not counted. Reported are medians, and the range of the ratios round by round. Results go to a JSON file,
a Markdown table and a PNG beside it.
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
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lines import Side
from peers import HERE, machine, peer_python, usable_cores
from rl_sizes import CASES, TINY

OURS, PEER = "rlhf_jax", "TRL"
PHASES = ("generation", "scoring", "update")
SLOTS, BATCHES, TOGETHER = "in slots", "in batches", "all rows together"


@dataclass(frozen=True)
class Measurement:
    """What is timed, and how many times as fast we mean to be. ``sides`` are ours first; each is (name, word)."""

    part: str
    title: str
    case: str
    sides: tuple[tuple[str, str], ...]
    target: float
    rounds: int
    warmups: int = 2


MEASUREMENTS = (
    *(
        Measurement("trl", f"{name}, {case}", case, ((OURS, word), (PEER, word)), target=3.0, rounds=5)
        for name, word in (("GRPO", "grpo"), ("RLOO", "rloo"))
        for case in CASES
    ),
    Measurement(
        "refill", "sampling, long-tailed lengths", "long-tailed lengths",
        ((SLOTS, "slots"), (BATCHES, "batches"), (TOGETHER, "together")), target=1.5, rounds=7,
    ),
)  # fmt: skip


def save_inputs(case: str, folder: Path, tiny: bool) -> None:
    """The policy, which ends responses by its schedule, and the prompts."""
    command = [str(peer_python()), str(HERE / "rl_torch.py"), "inputs", case, str(folder)] + ["--tiny"] * tiny
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def start(measurement: Measurement, side: tuple[str, str], folder: Path, cores: list[int], tiny: bool) -> Side:
    """A process for one side of one measurement."""
    name, word = side
    if name == PEER:
        command = [str(peer_python()), str(HERE / "rl_torch.py"), word, measurement.case, str(folder)]
        command += ["--threads", str(len(cores))]
    else:
        command = [sys.executable, str(HERE / "rl_jax.py"), measurement.part, word, measurement.case, str(folder)]
    path = {} if name == PEER else {"PYTHONPATH": str(HERE.parent)}
    log = folder / f"{measurement.title}-{name}.log"
    return Side(command + ["--tiny"] * tiny, cores, log, path)


def measure(measurement: Measurement, folder: Path, cores: list[int], tiny: bool, rounds: int | None) -> dict[str, Any]:
    """Ask the sides in turn; every answer, and what they said about themselves."""
    sides: dict[str, Side] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        for side in measurement.sides:
            sides[side[0]] = start(measurement, side, folder, cores, tiny)
            stack.callback(sides[side[0]].close)
        hello = {name: side.read() for name, side in sides.items()}
        if len({said["parameters"] for said in hello.values()}) != 1:
            raise RuntimeError(f"{measurement.title}: the sides have unequal models: {hello}")
        for number in range(measurement.warmups + (measurement.rounds if rounds is None else rounds)):
            for name, side in sides.items():
                answer = side.ask()
                answers.setdefault(name, []).append(answer)
                note = "warm-up" if number < measurement.warmups else f"round {number - measurement.warmups + 1}"
                found = f"{answer['seconds']:.2f} s, {answer['tokens']} tokens"
                print(f"  {measurement.title}, {note}: {name} {found}", flush=True)
    return {"hello": hello, "warmups": measurement.warmups, "answers": answers}


def summarise(measurement: Measurement, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a side: responses and tokens a second, the share of each phase, and how many times as fast we are."""
    timed = {name: answers[found["warmups"] :] for name, answers in found["answers"].items()}
    ours = [answer["count"] / answer["seconds"] for answer in timed[measurement.sides[0][0]]]
    rows = []
    for name, answers in timed.items():
        rates = [answer["count"] / answer["seconds"] for answer in answers]
        ratios = [mine / theirs for mine, theirs in zip(ours, rates, strict=True)]
        tokens = statistics.mean(answer["tokens"] for answer in answers)
        row = {
            "measurement": measurement.title,
            "side": name,
            "responses_per_s": statistics.median(rates),
            "tokens_per_response": tokens / answers[0]["count"],
            "times_as_fast": statistics.median(ratios),
            "times_as_fast_range": [min(ratios), max(ratios)],
            "target": None if name == measurement.sides[0][0] else measurement.target,
            "first_call_seconds": found["answers"][name][0]["seconds"],
            "peak_memory_mib": max(answer["peak_mib"] for answer in answers),
            "phases": {},
        }
        for phase in PHASES if "phases" in answers[0] else ():
            seconds = statistics.median(answer["phases"][phase] for answer in answers)
            share = statistics.median(answer["phases"][phase] / answer["seconds"] for answer in answers)
            row["phases"][phase] = {"seconds": seconds, "share": share, "tokens_per_s": tokens / max(seconds, 1e-9)}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The summary in Markdown. A phase: its share of the time, and response tokens a second in it."""
    lines = [
        "| | side | responses/s | tokens each | generation | scoring | update | we are faster by | wanted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [row["phases"].get(name) for name in PHASES]
        phases = ["" if p is None else f"{p['share']:.0%}, {p['tokens_per_s']:,.0f}/s" for p in found]
        low, high = row["times_as_fast_range"]
        faster = "" if row["target"] is None else f"{row['times_as_fast']:.2f} times ({low:.2f} to {high:.2f})"
        wanted = "" if row["target"] is None else f"{row['target']:.1f}"
        rate, tokens = f"{row['responses_per_s']:.2f}", f"{row['tokens_per_response']:.1f}"
        lines.append("| " + " | ".join([row["measurement"], row["side"], rate, tokens, *phases, faster, wanted]) + " |")
    return lines


def draw(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """One panel a measurement: seconds of each phase for a response, or of the response where there are no phases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = list(dict.fromkeys(row["measurement"] for row in rows))
    figure, axes = plt.subplots(1, len(titles), figsize=(3.2 * len(titles), 3.6), squeeze=False)
    colours = dict(zip(PHASES, ("#2a6f97", "#8ab17d", "#b5651d"), strict=True))
    for axis, title in zip(axes[0], titles, strict=True):
        panel = [row for row in rows if row["measurement"] == title]
        for place, row in enumerate(panel):
            whole, bottom = 1 / row["responses_per_s"], 0.0
            for phase, found in row["phases"].items():
                axis.bar(place, found["share"] * whole, bottom=bottom, color=colours[phase], label=phase)
                bottom += found["share"] * whole
            axis.bar(place, max(0.0, whole - bottom), bottom=bottom, color="#bbbbbb")
            note = "" if row["target"] is None else f"\n{row['times_as_fast']:.2f} times\nas long"
            axis.text(place, whole, f"{whole:.3f} s{note}", ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(panel)), [row["side"].replace(" rows", "\nrows") for row in panel])
        axis.set_title(title.replace(", ", "\n"), fontsize=9)
        axis.set_ylim(0, 1.3 * max(1 / row["responses_per_s"] for row in panel))  # room for the words
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("seconds a response (less is better)", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    if shown:
        axes[0][0].legend(shown.values(), shown.keys(), fontsize=7)
    shown_about = textwrap.fill(about, 45 * len(titles))
    figure.text(0.5, 0.01, shown_about, fontsize=6, ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.03 * (1 + shown_about.count("\n")) + 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(rows: list[dict[str, Any]], found: dict[str, Any], options: Any, load: float) -> None:
    """Print the table, and write it beside the numbers and the picture."""
    said = [hello for measured in found.values() for hello in measured["hello"].values()]
    versions: dict[str, str] = {"python": platform.python_version()}
    for each in said:
        versions |= each["versions"]
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": machine(),
        "cores": options.cores,
        "load_at_start": load,
        "versions": versions,
        "parameters": said[0]["parameters"],
        "cases": {name: asdict(case) for name, case in (TINY if options.tiny else CASES).items()},
    }
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    line = f"{about['processor']}, {options.cores} cores, {about['parameters']:,} parameters, fp32; {named}; "
    line += about["date"][:10]
    lines = table(rows)
    print("\n" + "\n".join(lines) + f"\n\n{line}")
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps({**about, "summary": rows, "measurements": found}, indent=1) + "\n")
    Path(f"{out}.md").write_text("\n".join(lines) + f"\n\n{line}\n")
    draw(rows, line, Path(f"{out}.png"))
    print(f"written: {out}.json, {out}.md, {out}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["trl", "refill"], help="one of the parts (both)")
    parser.add_argument("--only", help="measurements whose title contains this, such as GRPO")
    parser.add_argument("--rounds", type=int, help="timings of each side (5, and 7 of refill)")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides are held to (2)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "rl", help="results go here, less the suffix")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    if not peer_python().exists():
        print(f"{peer_python()} does not exist; run benchmarks/peers.py --setup first", file=sys.stderr)
        return 2
    cores = usable_cores(options.cores)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.3:
        print(f"the machine is busy (load {load:.1f}): the timings will be too long, and their ratios off")
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for measurement in MEASUREMENTS:
        wanted = options.part in (None, measurement.part) and (options.only or "") in measurement.title
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as name:
            save_inputs(measurement.case, Path(name), options.tiny)
            found[measurement.title] = measure(measurement, Path(name), cores, options.tiny, options.rounds)
        rows += summarise(measurement, found[measurement.title])
    if not rows:
        print(f"no measurement has {options.only!r} in its title; there are "
              + ", ".join(m.title for m in MEASUREMENTS), file=sys.stderr)  # fmt: skip
        return 2
    report(rows, found, options, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
