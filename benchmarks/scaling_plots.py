"""The panels of scaling.py's plot: each a function that draws into an axis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Panel = Callable[[Any], None]
MIB = 2**20
COLOURS = {"data": "#2a6f97", "fsdp": "#b5651d", "tensor": "#5b8c5a", "context": "#8e5572", "expert": "#d9a066"}
ONE, MANY, RING = "#9aa5b1", "#2a6f97", "#b5651d"


def cpu_panels(rows: list[Row], found: dict[str, Any]) -> list[Panel]:
    """Those of panels that have rows."""
    del found
    by = {name: [row for row in rows if row["point"]["panel"] == name]
          for name in ("devices", "processes", "model size", "length", "experts")}  # fmt: skip
    panels: list[Panel] = []
    if by["devices"]:
        panels += [functools.partial(_layout_bytes, by["devices"]), functools.partial(_layout_speed, by["devices"])]
    if by["processes"]:
        panels.append(functools.partial(_processes, by["processes"]))
    if by["model size"]:
        panels.append(functools.partial(_sizes, by["model size"]))
    if by["length"]:
        panels.append(functools.partial(_lengths, by["length"]))
    if by["experts"]:
        panels.append(functools.partial(_experts, by["experts"]))
    return panels


def held(row: Row) -> float:
    """MiB of one device."""
    return sum(row["open"]["memory"].values()) / MIB


def _axis(row: Row) -> str | None:
    return next(iter(row["point"]["layout"]), None)


def _curves(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each layout, that of one device before them."""
    (one, *_) = [row for row in rows if _axis(row) is None] or [None]
    found: dict[str, list[Row]] = {}
    for row in rows:
        if _axis(row) is not None:
            found.setdefault(str(_axis(row)), [] if one is None else [one]).append(row)
    return found


def _by_devices(axis: Any, title: str, label: str, devices: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(devices, [str(each) for each in devices])
    axis.set_xlabel("devices", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)


def _layout_bytes(rows: list[Row], axis: Any) -> None:
    curves = _curves(rows)
    for name, curve in curves.items():
        at = [row["point"]["devices"] for row in curve]
        axis.plot(at, [held(row) for row in curve], "o-", markersize=4, color=COLOURS[name], label=name)
        axis.plot(at, [row["open"]["memory"]["arguments"] / MIB for row in curve], "o:", markersize=3,
                  color=COLOURS[name], linewidth=1)  # fmt: skip
    axis.plot([], [], ":", color="grey", label="dotted: state and batch alone")
    title = f"memory of a device: {rows[0]['title']}"
    _by_devices(axis, title, "MiB a device", sorted({row["point"]["devices"] for row in rows}))


def _layout_speed(rows: list[Row], axis: Any) -> None:
    axis.axhline(1.0, color="grey", linewidth=0.8)
    for name, curve in _curves(rows).items():
        at = [row["point"]["devices"] for row in curve]
        axis.plot(at, [row["to_first"] for row in curve], "o-", markersize=4, color=COLOURS[name], label=name)
        low, high = zip(*(row["to_first_range"] for row in curve), strict=True)
        axis.fill_between(at, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
    devices = sorted({row["point"]["devices"] for row in rows})
    _by_devices(axis, "speed on the same cores (1: splitting is free)", "times one device", devices)


def _processes(rows: list[Row], axis: Any) -> None:
    for name, curve in _curves(rows).items():
        at = [row["point"]["processes"] for row in curve]
        axis.plot(at, [row["peak"]["rss"] / MIB for row in curve], "o-", markersize=4, color=COLOURS[name],
                  label=f"{name}: resident set")  # fmt: skip
        axis.plot(at, [held(row) for row in curve], "o:", markersize=3, color=COLOURS[name],
                  label=f"{name}: compiled program")  # fmt: skip
    processes = sorted({row["point"]["processes"] for row in rows})
    _by_devices(axis, f"real processes: {rows[0]['title']}", "MiB a process", processes)
    axis.set_xlabel("processes, one device each", fontsize=8)


def _bars(axis: Any, groups: list[str], series: list[tuple[str, str, list[float | None]]]) -> None:
    width = 0.8 / len(series)
    for number, (label, colour, values) in enumerate(series):
        at = [i + (number - (len(series) - 1) / 2) * width for i, value in enumerate(values) if value is not None]
        there = [value for value in values if value is not None]
        bars = axis.bar(at, there, 0.92 * width, color=colour, label=label)
        axis.bar_label(
            bars, [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in there], fontsize=6.5, padding=1
        )
    axis.set_xticks(range(len(groups)), groups)
    axis.margins(y=0.45 if len(series) > 2 else 0.2)
    axis.legend(fontsize=7, frameon=False, loc="upper left")


def _first(rows: list[Row], **fields: Any) -> Row | None:
    return next((row for row in rows if all(row["point"][name] == value for name, value in fields.items())), None)


def _bytes_of(row: Row | None) -> float | None:
    return None if row is None else held(row)


def _sizes(rows: list[Row], axis: Any) -> None:
    names = list(dict.fromkeys(row["point"]["model"] for row in rows))
    most = max(row["point"]["devices"] for row in rows)
    series = [(label, colour, [_bytes_of(_first(rows, model=name, devices=n)) for name in names])
              for label, colour, n in (("one device", ONE, 1), (f"fsdp={most}", MANY, most))]  # fmt: skip
    _bars(axis, [f"{name} parameters" for name in names], series)
    axis.set_title("model size", fontsize=10)
    axis.set_ylabel("MiB a device", fontsize=8)
    axis.set_yscale("log")


def _lengths(rows: list[Row], axis: Any) -> None:
    lengths = sorted({row["point"]["length"] for row in rows})
    most = max(row["point"]["devices"] for row in rows)
    ways = [("one device", ONE, {"devices": 1}), (f"context={most}, gather", MANY, {"across": "gather"}),
            (f"context={most}, ring", RING, {"across": "ring"})]  # fmt: skip
    series = [(label, colour, [_bytes_of(_first(rows, length=length, **fields)) for length in lengths])
              for label, colour, fields in ways]  # fmt: skip
    tokens = rows[0]["point"]["rows"] * rows[0]["point"]["length"]
    _bars(axis, [f"{tokens // length} x {length}" for length in lengths], series)
    axis.set_title(f"length, {tokens} tokens a step: {rows[0]['point']['model']}", fontsize=10)
    axis.set_ylabel("MiB a device", fontsize=8)


def _experts(rows: list[Row], axis: Any) -> None:
    experts = sorted({row["point"]["experts"] for row in rows})
    most = max(row["point"]["devices"] for row in rows)
    series = [(label, colour, [_bytes_of(_first(rows, experts=each, devices=n)) for each in experts])
              for label, colour, n in (("one device", ONE, 1), (f"expert={most}", MANY, most))]  # fmt: skip
    _bars(axis, ["dense" if not each else str(each) for each in experts], series)
    axis.set_title("experts, of which a token takes two", fontsize=10)
    axis.set_ylabel("MiB a device", fontsize=8)


def gpu_panels(rows: list[Row], found: dict[str, Any]) -> list[Panel]:
    """Training and decoding as shares of what the device can do, and the phases of PPO."""
    machine = found["machine"][0]
    panels: list[Panel] = []
    training = [row for row in rows if row["point"]["kind"] == "train"]
    decoding = [row for row in rows if row["point"]["kind"] == "decode"]
    if training and machine.get("flops"):
        shares = [row["flops_per_second"]["step"] / machine["flops"] / row["point"]["devices"] for row in training]
        peaks = [each and each / machine["flops"] for each in (row["open"]["peak_flops"] for row in training)]
        panels.append(functools.partial(_shares, training, shares, peaks, "training", "% of the measured matrix rate"))
    if decoding and machine.get("bytes"):
        shares = [row["bytes_per_second"] / machine["bytes"] for row in decoding]
        label = "% of the measured copy bandwidth"
        panels.append(functools.partial(_shares, decoding, shares, None, "decoding", label))
    panels += [functools.partial(_iteration, row) for row in rows if row["point"]["kind"] == "ppo"]
    return panels


def _shares(rows: list[Row], shares: list[float], peaks: Any, title: str, label: str, axis: Any) -> None:
    at = range(len(rows))[::-1]
    bars = axis.barh(list(at), [100 * share for share in shares], color=MANY)
    axis.bar_label(bars, [f"{100 * share:.0f}" for share in shares], fontsize=7, padding=2)
    for y, row, peak in zip(at, rows, peaks or [1.0] * len(rows), strict=True):
        if row["point"]["target"] and peak:
            wanted = 100 * row["point"]["target"] * peak
            axis.plot([wanted, wanted], [y - 0.4, y + 0.4], color=RING, linewidth=2)
    axis.set_yticks(list(at), [row["title"].replace("_saveable", "").replace("dots_with_no_batch_dims", "dots")
                               for row in rows], fontsize=6)  # fmt: skip
    axis.set_title(f"{title} (orange: wanted)", fontsize=10)
    axis.set_xlabel(label, fontsize=8)


def _iteration(row: Row, axis: Any) -> None:
    names = list(row["seconds"])
    bars = axis.bar(names, [row["seconds"][name] for name in names], color=[MANY, ONE, COLOURS["expert"], RING])
    tokens = row["rounds"][-1]["tokens"]
    axis.bar_label(bars, [f"{tokens / row['seconds'][name]:.0f}\ntokens/s" for name in names], fontsize=7, padding=2)
    axis.set_title(f"PPO iteration: {row['title'].split(', remat')[0]}", fontsize=10)
    axis.set_ylabel("seconds", fontsize=8)
    axis.margins(y=0.2)
