"""Programs through the compiler of the machine that is asked about: memory, FLOPs, bytes and collectives."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from rlhf_jax.planning import counts, hlo
from rlhf_jax.planning.machines import Machine
from rlhf_jax.planning.numbers import Numbers, continued, total_traffic
from rlhf_jax.planning.pieces import Program
from rlhf_jax.types import PyTree

WHOLE = 8
"""Programs whose layers are compiled one by one are compiled whole up to so many repeats of the pattern."""
SAMPLES = (2, 4)
"""Repeats at which larger ones are compiled instead."""

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def described_devices(machine: Machine) -> Sequence[Any]:
    """Devices to compile for: simulated ones of this machine's CPU, or descriptions of what is not there.

    Raises:
        RuntimeError: the compiler is not installed; the message names the package.
    """
    if machine.device.platform == "cpu":
        return jax.devices()[: machine.devices]
    from jax.experimental import topologies

    package = "rlhf_jax[cuda]" if machine.device.platform == "gpu" else "rlhf_jax[tpu]"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _topology(topologies, machine).devices
    except Exception as fault:
        lines = str(fault).strip().splitlines()
        reason = lines[0] if lines else type(fault).__name__
        raise RuntimeError(f"no compiler for {machine.device.name} here ({reason}); it comes with {package}") from fault


def _topology(topologies: Any, machine: Machine) -> Any:
    device = machine.device
    if device.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=str(machine))
    config = _GPU.format(bandwidth=int(device.bandwidth), memory=device.memory, name=device.name)
    hosts = max(1, machine.devices // device.node)
    return topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=f"1x{hosts}x{machine.devices // hosts}"
    )


def measured(program: Program, machine: Machine, devices: Sequence[Any], repeats: int) -> Numbers:
    """A program's numbers from its executable; of a smaller one's, where its layers are too many to compile each."""
    if program.smaller is None or repeats <= WHOLE:
        return _compiled(program, machine, devices)
    first, second = (_compiled(program.smaller(size), machine, devices) for size in SAMPLES)
    return continued(first, second, SAMPLES, repeats)


def executable(program: Program, devices: Sequence[Any]) -> Any:
    """The program compiled for these devices."""
    arguments = program.arguments
    if program.placement.mesh is None and devices[0].platform != "cpu":
        arguments = _on_one(arguments, devices[0])
    with _tracing_for(program, devices[0]):
        return lowered(program.function, arguments).compile()


def lowered(function: Any, arguments: tuple[Any, ...]) -> Any:
    """A function traced for these arguments, jitted first where it is not."""
    return (function if hasattr(function, "lower") else jax.jit(function)).lower(*arguments)


def _compiled(program: Program, machine: Machine, devices: Sequence[Any]) -> Numbers:
    compiled = executable(program, devices)
    memory = compiled.memory_analysis()
    found = counts.count(hlo.parse(compiled.as_text(), program.trips), machine.devices)
    numbers = Numbers(
        source="compiled",
        temporary=memory.temp_size_in_bytes,
        output=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        code=memory.generated_code_size_in_bytes,
        flops=found.flops,
        flops_source="compiled",
        moved=found.bytes,
        traffic=total_traffic(found.collectives, machine),
    )
    notes = []
    if len(found.unknown_loops) > (program.trips > 1):
        notes.append(f"{len(found.unknown_loops)} loops that end by their data taken to make {program.trips} rounds")
    if found.halved_loops:
        notes.append(
            f"{len(found.halved_loops)} loops that end by their data taken to make half of the rounds around them"
        )
    numbers = replace(numbers, notes=tuple(notes))
    if found.opaque:
        kernels = ", ".join(sorted(found.opaque))
        counted = program.work.flops / machine.devices
        numbers = replace(numbers, flops=max(found.flops, counted), flops_source="estimated",
                          notes=(*numbers.notes, f"FLOPs inside {kernels} by formula"))  # fmt: skip
    return numbers


def _on_one(arguments: PyTree, device: Any) -> PyTree:
    here = NamedSharding(Mesh([device], ("one",)), P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)


@contextlib.contextmanager
def _tracing_for(program: Program, device: Any) -> Iterator[None]:
    """Implementations are chosen by the device of the mesh, so a program without one gets an empty one that has it."""
    if program.placement.mesh is not None:
        with program.placement.active():
            yield
        return
    named = AbstractDevice(device.device_kind, getattr(device, "num_cores", None), device.platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=named)):
        yield
