"""``rlhf-jax plan``: tables of what each program of a run holds, computes and sends on a machine, or JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.errors import DOES_NOT_FIT, UserError

WIDTH = 100
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
MARKS = {"compiled": "", "continued": "~", "estimated": "≈"}


def report(plan: dict[str, Any], as_json: bool, console: Console | None = None) -> None:
    """Print the plan; a UserError with exit code ``DOES_NOT_FIT`` where it does not fit."""
    if as_json:
        print(json.dumps(plan, indent=1))
    else:
        show(plan, Console(highlight=False, width=WIDTH) if console is None else console)
    if not plan["fits"]:
        worst = max(plan["stages"], key=lambda stage: stage["peak"])
        raise UserError(
            f"stage {worst['name']!r} takes {_size(worst['peak'])} of each device", at=plan["machine"],
            expected=f"at most {_size(plan['usable'])} ({plan['reserve']:.0%} of {_size(plan['memory'])} is kept back)",
            fix="split it further (layout.fsdp, layout.tensor), use more microbatches or rematerialisation, or take a "
            "larger machine", exit_code=DOES_NOT_FIT,
        )  # fmt: skip


def show(plan: dict[str, Any], console: Console) -> None:
    """One table of memory and one of time and traffic."""
    layout = " x ".join(f"{name}={size}" for name, size in plan["layout"].items() if size > 1) or "one device"
    console.print(Text(f"{plan['experiment']} on {plan['machine']} ({plan['devices']} x {plan['device']}), {layout}",
                       style="bold"))  # fmt: skip
    for note in plan["notes"]:
        console.print(Text(note, style="yellow"))
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    for stage in plan["stages"]:
        console.print(Text.assemble((f"{stage['name']}: ", "bold"), _resident(stage)))
        console.print(f"  {stage['tokens_per_second']:,.0f} {stage['counted']}/s at most, MFU {stage['mfu']:.0%}")
        for row in stage["programs"]:
            for note in row["notes"]:
                console.print(Text(f"  {row['name']}: {note}", style="yellow"))
    console.print(Text(
        "Memory, FLOPs, bytes and traffic are those of one device. No mark: compiled for this machine; ~: compiled at "
        "two smaller numbers of layers and continued in a straight line; ≈: by formula. Cache and gradients are "
        "formulas inside what the compiler reports as temporary. Times are the least that peak rates allow, with "
        "everything overlapped.", style="dim",
    ))  # fmt: skip


def _memory_table(plan: dict[str, Any]) -> Table:
    usable = plan["usable"]
    unit, name = _unit(max(stage["peak"] for stage in plan["stages"]))
    title = f"{name} on each device, of {usable / unit:,.4g} (after {plan['reserve']:.0%} in reserve)"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "program"):
        table.add_column(column, no_wrap=True)
    for column in ("resident", "batch", "cache", "gradients", "temporary", "code", "total", "full"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan["stages"]:
        for number, row in enumerate(stage["programs"]):
            memory, style = row["memory"], "" if row["fits"] else "bold red"
            kinds = ("resident", "batch", "cache", "gradients", "temporary", "code")
            table.add_row(
                stage["name"] if number == 0 else "", row["name"],
                *(f"{memory[kind] / unit:,.2f}" if memory[kind] else "" for kind in kinds),
                Text(f"{MARKS[row['source']]}{memory['total'] / unit:,.2f}", style=style),
                Text(f"{memory['total'] / usable:.0%}", style=style),
                end_section=number + 1 == len(stage["programs"]),
            )  # fmt: skip
    return table


def _time_table(plan: dict[str, Any]) -> Table:
    table = Table(title="work of one execution on each device, and the least time that it takes", title_justify="left")
    for name in ("stage", "program"):
        table.add_column(name, no_wrap=True)
    for name in ("TFLOP", "GB moved", "sent", "seconds", "bound", "MFU"):
        table.add_column(name, justify="right", no_wrap=name != "sent")
    for stage in plan["stages"]:
        for number, row in enumerate(stage["programs"]):
            runs = f" x{row['runs']}" if row["runs"] > 1 else ""
            table.add_row(
                stage["name"] if number == 0 else "", row["name"] + runs,
                f"{MARKS[row['flops_source']]}{row['flops'] / 1e12:.3g}", f"{row['moved'] / 1e9:.3g}",
                _traffic(row["traffic"]), f"{row['seconds']:.3g}", row["bound"], f"{row['mfu']:.0%}",
                end_section=number + 1 == len(stage["programs"]),
            )  # fmt: skip
    return table


def _traffic(traffic: dict[str, dict[str, float]]) -> str:
    lines = [f"{each['times']:,.0f} {kind} {_size(each['sent'])}" for kind, each in traffic.items() if each["times"]]
    return "\n".join(lines)


def _resident(stage: dict[str, Any]) -> str:
    parts = ", ".join(f"{kind} {_size(size)}" for kind, size in stage["resident"].items())
    return f"always there: {parts}; peak {_size(stage['peak'])}"


def _unit(count: float) -> tuple[int, str]:
    return next(((unit, name) for unit, name in UNITS if count >= unit), (1, "B"))


def _size(count: float) -> str:
    unit, name = _unit(count)
    return f"{count / unit:,.{0 if count >= 100 * unit or unit == 1 else 1}f} {name}"
