"""The plan of an experiment on a machine: memory by what holds it, limits, and whether everything fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.experiment import Experiment
from rlhf_jax.planning.compiling import measured
from rlhf_jax.planning.estimates import cache_bytes, estimated
from rlhf_jax.planning.machines import RESERVE, Machine
from rlhf_jax.planning.numbers import Numbers, device_bytes, roofline
from rlhf_jax.planning.pieces import Program, Stage
from rlhf_jax.planning.programs import stage_programs
from rlhf_jax.stages.ilql import Steer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs.

    Args:
        resident: what lies there through the whole stage, unless it waits in the host's memory just then.
        batch: what is there for this program only: batches, rollouts, a policy in a layout of its own.
        cache: keys and values; estimated as a part of what the compiler reports.
        gradients: of the trained parameters in fp32; estimated as a part of what the compiler reports.
        temporary: the rest of what lives while the program runs: activations, gathered parameters, scratch.
        code: the program.
    """

    resident: int
    batch: int
    cache: int
    gradients: int
    temporary: int
    code: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def plan(
    experiment: Experiment,
    machine: Machine,
    devices: Sequence[Any],
    *,
    compiler: bool = True,
    only: str | None = None,
    responses: int = 2,
    progress: Progress = lambda words: None,
) -> dict[str, Any]:
    """Everything as a dictionary that JSON can hold; bytes and seconds, for one device.

    Args:
        experiment: what to run.
        machine: where.
        devices: of that machine, or simulated ones in their number.
        compiler: whether they can be compiled for; otherwise memory and work are estimated.
        only: the name of a stage.
        responses: K of rankings.
        progress: is told what is compiled.
    """
    chosen = [stage for stage in experiment.stages if only in (None, stage.name)]
    if not chosen:
        raise UserError(f"no stage {only!r}", at="--stage", fix="correct the name",
                        expected=f"one of {', '.join(stage.name for stage in experiment.stages)}")  # fmt: skip
    if responses < 2:
        raise UserError(f"{responses} responses in a ranking", at="--responses", expected="at least 2", fix="raise it")
    planned = [stage for stage in chosen if not isinstance(stage, Steer)]
    if not planned:
        raise UserError(f"stage {chosen[0].name!r} computes nothing on devices", at=f"stages.{chosen[0].name}",
                        expected="a stage with something to plan", fix="name another with --stage")  # fmt: skip
    placement = experiment.layout.place(devices)
    stages = []
    for stage in planned:
        made = stage_programs(stage, experiment.model, placement, devices, responses)
        stages.append(_stage(made, experiment, machine, devices, compiler, progress))
    notes = [f"{stage.name} computes nothing on devices" for stage in chosen if stage not in planned]
    return {
        "experiment": experiment.name,
        "machine": str(machine),
        "device": machine.device.name,
        "devices": machine.devices,
        "layout": experiment.layout.sizes(machine.devices),
        "memory": machine.device.memory,
        "reserve": RESERVE,
        "usable": machine.usable,
        "stages": stages,
        "fits": all(stage["fits"] for stage in stages),
        "notes": notes,
    }


def _stage(
    made: Stage, experiment: Experiment, machine: Machine, devices: Sequence[Any], compiler: bool, progress: Progress
) -> dict[str, Any]:
    resident = {kind: device_bytes(tree) for kind, tree in made.resident.items()}
    programs = []
    for program in made.programs:
        progress(f"{made.name}: {program.name}")
        begun = time.monotonic()
        if compiler:
            numbers = measured(program, machine, devices, experiment.model.repeats)
        else:
            numbers = estimated(program, experiment.model, machine)
        memory = _memory(program, numbers, made)
        programs.append(_row(program, numbers, memory, machine) | {"planning_seconds": time.monotonic() - begun})
    seconds = sum(row["seconds"] * row["runs"] for row in programs)
    useful = sum(program.work.flops * program.runs for program in made.programs)
    peak = max(row["memory"]["total"] for row in programs)
    return {
        "name": made.name,
        "resident": resident,
        "programs": programs,
        "peak": peak,
        "fits": peak <= machine.usable,
        "seconds": seconds,
        "tokens": made.tokens,
        "counted": made.counted,
        "tokens_per_second": made.tokens / seconds,
        "mfu": useful / (seconds * machine.device.flops * machine.devices),
    }


def _memory(program: Program, numbers: Numbers, made: Stage) -> Memory:
    """What the compiler calls temporary and output, by what it is known to consist of."""
    resident = device_bytes([tree for kind, tree in made.resident.items() if kind not in program.parked])
    batch = device_bytes(list(program.transient.values()))
    left = numbers.temporary + numbers.output
    cache = min(cache_bytes(program), left)
    left -= cache
    trained = made.resident["parameters"] if program.loss is not None else None
    gradients = min(sum(_wide(leaf) for leaf in _leaves(trained)), left)
    return Memory(resident, batch, cache, gradients, left - gradients, numbers.code)


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _wide(leaf: Any) -> int:
    """Bytes of an array's part on one device in fp32."""
    return device_bytes(leaf) * 4 // leaf.dtype.itemsize


def _row(program: Program, numbers: Numbers, memory: Memory, machine: Machine) -> dict[str, Any]:
    limits = roofline(numbers, machine)
    return {
        "name": program.name,
        "source": numbers.source,
        "flops_source": numbers.flops_source,
        "runs": program.runs,
        "memory": asdict(memory) | {"total": memory.total},
        "fits": memory.total <= machine.usable,
        "flops": numbers.flops,
        "model_flops": program.work.flops,
        "attention_flops": program.work.attention,
        "moved": numbers.moved,
        "traffic": {kind: asdict(traffic) for kind, traffic in sorted(numbers.traffic.items())},
        "compute_seconds": limits.compute,
        "memory_seconds": limits.memory,
        "network_seconds": limits.network,
        "seconds": limits.seconds,
        "bound": limits.bound,
        "mfu": program.work.flops / (max(limits.seconds, 1e-30) * machine.device.flops * machine.devices),
        "notes": list(numbers.notes),
    }
