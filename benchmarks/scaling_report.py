"""What scaling.py found, as JSON, tables and a plot."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MIB, GIB = 2**20, 2**30
FORMULA = """FLOPs by formula, whatever the compiler makes of it: a step of training takes `6 (N + V E)` for a token,
with `N` numbers in the layers' matrices that it meets and `V E` of the unembedding, and `6 H D T (T + 1)` for a row
of attention in a layer; a forward pass a third of it. Nothing is counted for embeddings that are looked up and for
what is computed again. MFU is that, over the device's peak of dense bf16 products."""
DECODE = """A decode step must read every matrix once, and keys and values of the tokens so far; prompts are read
before and not counted."""
SIMULATED = """**Simulated devices share the same cores.** The work is the same on any number of them, so throughput
shows what splitting costs and never a speed-up; 1 would be no cost at all. Bytes on a device and bytes sent are those
of the program as it is compiled for CPU; they do not depend on what else the machine does."""
RESIDENT = """Arguments: parameters, optimizer state and batch. Temporary: activations, gradients, what is gathered,
and what the update needs. Resident set: of each process at most, the compiler and libraries included."""
TITLES = {"ppo": "An iteration of PPO"}
BUSY = "times and their ratios are of no use, bytes are"


def write(found: dict[str, Any], stem: Path) -> None:
    """``stem``.json (every timing), .md (the tables) and .png (the curves)."""
    found = {
        "date": date.today().isoformat(), "python": platform.python_version(), "host": _processor(),
    } | found  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = tables(found)
    stem.with_suffix(".md").write_text(text)
    plot(found, stem.with_suffix(".png"))
    print(text)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def tables(found: dict[str, Any]) -> str:
    """A heading with the machine, a table for each panel, and what was not measured."""
    before, after = found["machine"]
    lines = [
        f"# Scaling on {before.get('device', 'an unknown device')}" + (" (simulated devices)" if found["cpu"] else ""),
        "",
        f"{found['date']}, {found['host']}, Python {found['python']}, JAX {before.get('jax', '?')}; {found['rounds']} "
        f"rounds, {found['seconds']:.0f} s. Products of square matrices: "
        + " and ".join(f"{m['flops'] / 1e12:.3g} TFLOP/s" if "flops" in m else str(m) for m in (before, after))
        + "; copying: " + " and ".join(f"{m['bytes'] / 1e9:.4g} GB/s" if "bytes" in m else "?" for m in (before, after))
        + " (before and after). Load of the machine before and after: "
        + " and ".join(f"{each:.1f}" for each in found["load"]) + ".",
    ]  # fmt: skip
    lines += ["", SIMULATED, "", RESIDENT] if found["cpu"] else ["", FORMULA, "", DECODE]
    if busy(found):
        lines += ["", f"**The machine was busy with other work (load {found['load'][0]:.1f}): {BUSY}.**"]
    for panel in dict.fromkeys(row["point"]["panel"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["point"]["panel"] == panel]
        lines += ["", f"## {TITLES.get(panel, panel.capitalize())}", ""]
        kind = rows[0]["point"]["kind"]
        done = [row for row in rows if row["reason"] is None]
        if done and kind == "train":
            lines += _spread_table(done) if found["cpu"] or panel == "devices" else _training_table(done, before)
        elif done:
            lines += _decode_table(done, before) if kind == "decode" else _phases(done, before)
        lines += [f"- failed: {row['title']}, {row['spread']}: {' '.join(row['reason'].split())[:300]}"
                  for row in rows if row["reason"]]  # fmt: skip
    if found["not_measured"]:
        lines += ["", "## Not measured: the budget was used up", ""] + [f"- {each}" for each in found["not_measured"]]
    return "\n".join(lines) + "\n"


def busy(found: dict[str, Any]) -> bool:
    """Whether others used the cores that were measured."""
    return found["cpu"] and found["load"][0] > 0.5 * found["cores"]


def _spread_table(rows: list[Row]) -> list[str]:
    lines = [
        "| model, rows x tokens | layout | arguments, MiB a device | temporary, MiB a device | sent, MiB a device and "
        "step | by | resident set, MiB a process | tokens/s | times the first (range) |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        memory, low, high = row["open"]["memory"], *row["to_first_range"]
        alone = row["point"]["devices"] == 1
        cells = [
            row["title"], row["spread"], f"{memory['arguments'] / MIB:.1f}",
            f"{(memory['temporary'] + memory['output']) / MIB:.1f}", f"{sent(row) / MIB:.1f}", _kinds(row),
            f"{row['peak']['rss'] / MIB:.0f}", f"{row['tokens_per_second']:.0f}",
            "" if alone else f"{row['to_first']:.2f} ({low:.2f} to {high:.2f})",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def sent(row: Row) -> float:
    """Bytes that a device sends in one step."""
    return sum(bytes_ for _, bytes_ in row["open"]["sent"].values())


def _kinds(row: Row) -> str:
    return ", ".join(f"{times:.0f} {kind}" for kind, (times, _) in sorted(row["open"]["sent"].items()))


def _training_table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    lines = [
        "| model, rows x tokens | million parameters | tokens/s (range) | ms a step | TFLOP/s | MFU, % | % of the "
        "matrix rate | of it attention, % | peak memory, GiB | compiler's, GiB | wanted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        low, high = row["range"]
        rate, share = row["flops_per_second"]["step"], mfu(row)
        memory, peak = row["open"]["memory"], row["peak"]["device_peak"]
        cells = [
            row["title"], f"{row['open']['params'] / 1e6:.1f}",
            f"{row['tokens_per_second']:.0f} ({low:.0f} to {high:.0f})", f"{1e3 * row['seconds']['step']:.1f}",
            f"{rate / 1e12:.1f}", "" if share is None else f"{100 * share:.1f}", _of(rate, machine.get("flops")),
            f"{100 * row['open']['attention_flops'] / row['open']['flops']['step']:.0f}",
            "" if peak is None else f"{peak / GIB:.1f}", f"{sum(memory.values()) / GIB:.1f}", _wanted(row, share),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mfu(row: Row) -> float | None:
    """FLOPs by formula over the peak of the device; None where its peak is not known."""
    peak = row["open"]["peak_flops"]
    return None if not peak else row["flops_per_second"]["step"] / peak / row["point"]["devices"]


def _of(rate: float, possible: float | None) -> str:
    return f"{100 * rate / possible:.1f}" if possible else ""


def _wanted(row: Row, share: float | None) -> str:
    target = row["point"]["target"]
    if target is None:
        return ""
    said = "not known" if share is None else "reached" if share >= target else "missed"
    return f"{100 * target:.0f} %: {said}"


def _decode_table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    lines = [
        "| model, prompts x tokens + new | ms a step | tokens/s (range) | prompts read, ms | GB/s | % of "
        "copying | peak memory, GiB | wanted |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        low, high = row["range"]
        share = row["bytes_per_second"] / machine["bytes"] if machine.get("bytes") else None
        peak, steps = row["peak"]["device_peak"], row["rounds"][0]["steps"]
        cells = [
            row["title"], f"{1e3 * row['seconds']['decode'] / steps:.3f}",
            f"{row['tokens_per_second']:.0f} ({low:.0f} to {high:.0f})", f"{1e3 * row['seconds']['prefill']:.1f}",
            f"{row['bytes_per_second'] / 1e9:.1f}", "" if share is None else f"{100 * share:.1f}",
            "" if peak is None else f"{peak / GIB:.1f}", _wanted(row, share),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _phases(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        whole, peak = sum(row["seconds"].values()), row["peak"]["device_peak"]
        tokens = row["rounds"][-1]["tokens"]
        lines += [
            f"{row['title']}: {tokens:.0f} response tokens an iteration, policy and critic trained beside a reference "
            "and a reward model" + ("" if peak is None else f", peak memory {peak / GIB:.1f} GiB") + ".",
            "",
            "| phase | s | % of the time | response tokens/s | TFLOP/s | % of the matrix rate |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, seconds in row["seconds"].items():
            rate = row["flops_per_second"][name]
            lines.append(
                f"| {name} | {seconds:.3f} | {100 * seconds / whole:.0f} | {tokens / seconds:.0f} | "
                f"{rate / 1e12:.1f} | {_of(rate, machine.get('flops'))} |"
            )
        rate = sum(row["open"]["flops"].values()) / whole
        lines += [f"| all | {whole:.3f} | 100 | {tokens / whole:.0f} | {rate / 1e12:.1f} | "
                  f"{_of(rate, machine.get('flops'))} |", ""]  # fmt: skip
    return lines


def plot(found: dict[str, Any], path: Path) -> None:
    """One figure: bytes and cost by layout (CPU), or shares of what the device can do (GPU)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scaling_plots import cpu_panels, gpu_panels

    rows = [row for row in found["rows"] if row["reason"] is None]
    panels = (cpu_panels if found["cpu"] else gpu_panels)(rows, found)
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.7 * columns, 3.7 * lines), squeeze=False)
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    before = found["machine"][0]
    about = f"{found['host']}; {before.get('device', '?')}, JAX {before.get('jax', '?')}; {found['date']}"
    if found["cpu"]:
        about += "\nsimulated devices share the cores: speed shows what splitting costs, and never a speed-up"
        about += f"; load at the start {found['load'][0]:.1f}" + (f": {BUSY}" if busy(found) else "")
    figure.text(0.5, 0.008, about, fontsize=8, ha="center", va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
