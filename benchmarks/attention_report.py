"""What attention.py found, as JSON, a table and a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from attention_cases import Case  # noqa: E402

Row = dict[str, Any]


def write(found: dict[str, Any], stem: Path) -> None:
    """``stem``.json (every timing), .md (the tables) and .png (the curves)."""
    found = {
        "date": date.today().isoformat(), "python": platform.python_version(),
        "host": f"{os.cpu_count()} cores, {platform.machine()}",
    } | found  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = tables(found)
    stem.with_suffix(".md").write_text(text)
    plot(found, stem.with_suffix(".png"))
    print(text)


def tables(found: dict[str, Any]) -> str:
    """A heading with the machine, a table for each case, flatness of FLASH, and what was not measured."""
    before, after = found["machine"]
    lines = [
        f"# Attention on {before.get('device', 'an unknown device')}",
        "",
        f"{found['date']}, {found['host']}, Python {found['python']}, JAX {before.get('jax', '?')}; {found['rounds']} "
        f"rounds, {found['seconds']:.0f} s of a budget of {found['budget']:.0f} s. Products of square matrices: "
        + " and ".join(f"{m['flops'] / 1e12:.3g} TFLOP/s" if "flops" in m else str(m) for m in (before, after))
        + "; copying: "
        + " and ".join(f"{m['bytes'] / 1e9:.4g} GB/s" if "bytes" in m else "?" for m in (before, after))
        + " (before and after). Load of the machine before and after (this program's own included): "
        + " and ".join(f"{each:.1f}" for each in found["load"])
        + ".",
    ]
    for title in dict.fromkeys(row["title"] for row in found["rows"]):
        lines += ["", f"## {title}", ""]
        lines += _table([row for row in found["rows"] if row["title"] == title], before)
    lines += _flatness(found["rows"])
    if found["not_measured"]:
        lines += ["", "## Not measured: the budget was used up", ""] + [f"- {each}" for each in found["not_measured"]]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    decoding = rows[0]["case"]["kind"] == "decode"
    rate = "% of copying" if decoding else "% of matrix rate"
    lines = [
        f"| contestant | part | ms (range) | {'GB/s' if decoding else 'GFLOP/s'} | {rate} | speed to best rival | MiB "
        "| largest error | H200 at best, ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    reasons: dict[str, str] = {}
    for row in rows:
        if row["reason"]:
            reasons[row["contestant"]] = row["reason"]
            continue
        low, high = (1e3 * each for each in row["range"])
        achieved, possible = (row["bytes"], machine.get("bytes")) if decoding else (row["flops"], machine.get("flops"))
        ratio = row["speed_to_best_rival"]
        errors = [error for error in (row["errors"] or {}).values()]
        memory = "" if row["memory"] is None else f"{row['memory'] / 2**20:.1f}"
        cells = [
            row["contestant"], row["part"], f"{1e3 * row['seconds']:.3f} ({low:.3f} to {high:.3f})",
            f"{achieved / 1e9:.1f}", f"{100 * achieved / possible:.0f}" if possible else "",
            f"{ratio:.2f}" if ratio and row["contestant"].startswith("ours:") else "",
            memory, f"{max(errors):.1e}" if errors else "unchecked", f"{1e3 * row['predicted_seconds']:.4f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if reasons:
        lines += ["", "Not in the table: "]
        lines += [f"- {name}: {' '.join(reason.split())[:200]}" for name, reason in reasons.items()]
    return lines


def _flatness(rows: list[Row]) -> list[str]:
    """Time a token of FLASH, forward and backward, by length."""
    lines: list[str] = []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        times: dict[int, float] = {}
        for row in rows:
            if row["case"]["kind"] == "flash" and row["contestant"] == name and not row["reason"]:
                tokens = row["case"]["rows"] * row["case"]["length"]
                times[row["case"]["length"]] = times.get(row["case"]["length"], 0.0) + row["seconds"] / tokens
        if len(times) > 1:
            cells = ", ".join(f"{length}: {1e6 * each:.3f}" for length, each in sorted(times.items()))
            spread = max(times.values()) / min(times.values())
            lines += [
                "",
                f"FLASH by {name}, us a token forwards and backwards: {cells}; largest / smallest {spread:.2f}",
            ]
    return (["", "## Time a token", *lines]) if lines else []


def predictions(cases: list[Case], path: Path) -> None:
    """The least time of every case on an H200, from its bytes and operations."""
    lines = [
        "# The least times on an H200, from bytes and operations; nothing here is measured",
        "",
        "The larger of products / 989 TFLOP/s and bytes / 4.8 TB/s, each array read or written once.",
        "",
        "| case | part | GFLOP | MB | ms | bound by |",
        "|---|---|---:|---:|---:|---|",
    ]
    for case in cases:
        for part in case.parts:
            flops, moved, seconds = case.flops(part), case.bytes(part), case.predicted(part)
            bound = "products" if flops / moved > 989e12 / 4.8e12 else "memory"
            lines.append(
                f"| {case.title} | {part} | {flops / 1e9:.1f} | {moved / 1e6:.1f} | {1e3 * seconds:.4f} | {bound} |"
            )
    path.write_text("\n".join(lines) + "\n")
    print(path)


def plot(found: dict[str, Any], path: Path) -> None:
    """By length: time and memory of causal attention, and time a token of FLASH."""
    rows = [row for row in found["rows"] if not row["reason"]]
    widths = sorted({row["case"]["width"] for row in rows if row["case"]["kind"] == "attention"})
    panels: list[tuple[str, str, list[Row], Callable[[Row], float]]] = []
    for width in widths:
        causal = [
            row for row in rows
            if row["case"]["kind"] == "attention" and row["case"]["mask"] == "causal" and row["case"]["width"] == width
        ]  # fmt: skip
        for part in ("forward", "backward"):
            chosen = [row for row in causal if row["part"] == part]
            panels.append((f"causal, D={width}, {part}", "TFLOP/s", chosen, lambda row: row["flops"] / 1e12))
        memory = [row for row in causal if row["part"] == "backward" and row["memory"]]
        panels.append((f"causal, D={width}, memory", "MiB", memory, lambda row: row["memory"] / 2**20))
    flash = [row for row in rows if row["case"]["kind"] == "flash"]
    for part in ("forward", "backward"):
        chosen = [row for row in flash if row["part"] == part]
        panels.append(
            (f"FLASH, {part}", "us a token", chosen,
             lambda row: 1e6 * row["seconds"] / row["case"]["rows"] / row["case"]["length"])
        )  # fmt: skip
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for axis, (title, unit, chosen, value) in zip(axes.flat, panels, strict=False):
        for index, name in enumerate(names):
            points = sorted((row["case"]["length"], value(row)) for row in chosen if row["contestant"] == name)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{index}", label=name)
        axis.set_xscale("log", base=2)
        if unit == "MiB":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="tokens of a row", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
