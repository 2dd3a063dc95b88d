"""Compile every kernel for an H200 and for a TPU on a machine that has neither; fail where one spills registers.

    make kernels-compile                       everything, in the environment that it needs
    make kernels-compile ARGS="--only hopper"  the kernels whose name contains a word

XLA compiles for a device of which it only has a description, and what comes out is the real executable: the kernels
went through the real compilers (ptxas, Mosaic). Nothing can be run, so this says that a kernel compiles, how many
registers and how much shared memory it takes, and that nothing is spilled; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kernel_cases import CASES, H200, TPU, Kernel

H200_DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
CHILD = "RLHF_JAX_KERNELS_COMPILE"
XLAS_OWN = re.compile("fusion|^wrapped_|^sort_")
TPU_SLICE = "v5p:2x2x1"
GPUS = 8
"""Of one machine, for programs on a mesh."""
SETTINGS = {
    H200: {
        "CUDA_VISIBLE_DEVICES": "-1",
        # There is no device to time candidates on.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
    },
    TPU: {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"},
}
"""What each compiler wants in the environment before JAX is loaded."""


@dataclass(frozen=True)
class Compiled:
    """One kernel of a program after its compiler. ``spilled`` counts bytes; None where a compiler does not say."""

    name: str
    registers: int | None = None
    shared: int | None = None
    spilled: int | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile the programs whose name contains this")
    parser.add_argument("--target", choices=(H200, TPU), help="compile for this device alone")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    chosen = [kernel for kernel in CASES if options.only in kernel.name and options.target in (None, kernel.target)]
    if not chosen:
        print(f"no kernel's name contains {options.only!r}", file=sys.stderr)
        return 1
    targets = {kernel.target for kernel in chosen}
    if os.environ.get(CHILD) is None:
        # A process of its own for each device: their settings must be there before JAX is loaded.
        here = [sys.executable, __file__, "--only", options.only, "--target"]
        common = {**os.environ, CHILD: "1", "JAX_PLATFORMS": "cpu"}
        codes = [subprocess.run([*here, each], env=common | SETTINGS[each]).returncode for each in sorted(targets)]
        return max(map(abs, codes))
    return compile_all(options.target, chosen)


def compile_all(target: str, kernels: list[Kernel]) -> int:
    """Compile and print a line per kernel; 1 when one fails or spills."""
    topology = topology_of(target)
    print(f"{'for ' + topology.devices[0].device_kind:58} {'registers':>9} {'shared KiB':>10} {'spilled':>8} {'s':>6}")
    bad = 0
    for kernel in kernels:
        started = time.monotonic()
        try:
            parts = compile_one(kernel, topology_of(target, GPUS) if kernel.mesh else topology)
        except Exception as error:
            print(f"{kernel.name:58} FAILED: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            bad += 1
            continue
        for part in parts:
            spilled = bool(part.spilled)
            bad += spilled
            shared = "" if part.shared is None else f"{part.shared / 1024:.1f}"
            cells = ["" if x is None else x for x in (part.registers, shared, part.spilled)]
            seconds = time.monotonic() - started
            name = f"{kernel.name}: {part.name}" if len(parts) > 1 else kernel.name
            print(f"{name:58} {cells[0]:>9} {cells[1]:>10} {cells[2]:>8} {seconds:6.1f}{'  SPILLS' if spilled else ''}")
    print(f"{len(kernels)} programs, {bad} bad", flush=True)
    return 1 if bad else 0


def topology_of(target: str, gpus: int = 1):
    """The description of the devices that JAX compiles for; a TPU's is of a whole slice."""
    from jax.experimental import topologies

    if target == H200:
        return topologies.get_topology_desc(platform="cuda", target_config=H200_DESCRIPTION, topology=f"1x{gpus}x1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TPU_SLICE)


def compile_one(kernel: Kernel, topology) -> list[Compiled]:
    """The kernels of one program, as their compilers report them."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from rlhf_jax.ops.meshes import token_spec
    from rlhf_jax.sharding import Layout

    function, arguments = kernel.build()
    if kernel.mesh:
        mesh = Layout(**dict(kernel.mesh)).mesh(topology.devices)
        lowering = jax.set_mesh(mesh)
    else:
        mesh, lowering = Mesh(topology.devices[:1], ("one",)), target_device(kernel.target)

    def placed(x):
        spec = token_spec(mesh, x.shape) if kernel.mesh else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    arguments = jax.tree.map(placed, arguments)
    with tempfile.TemporaryDirectory() as folder, captured() as log:
        with lowering:
            lowered = jax.jit(function).lower(*arguments)
        if kernel.target == TPU:
            lowered.compile()
            return [Compiled(kernel.name)]
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        # Dumped before and after the last passes over it.
        thunks = max(path.read_text() for path in Path(folder).glob("*thunk_sequence*"))
        return mosaic_kernels(log.read(), lowered.as_text()) + triton_kernels(thunks)


@contextlib.contextmanager
def target_device(target: str):
    """Pallas Triton asks for the device while it lowers."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    if target != H200:
        yield
        return
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))):
        yield


@contextlib.contextmanager
def captured():
    """What compilers write to the standard streams from C++, readable while and after the block."""
    with tempfile.TemporaryFile("w+") as log:

        class Log:
            def read(self) -> str:
                log.seek(0)
                return log.read()

        sys.stdout.flush(), sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            yield Log()
        except Exception as error:
            raise RuntimeError(f"{error}\n{Log().read()[-3000:]}") from error
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            os.close(saved[0]), os.close(saved[1])


def mosaic_kernels(log: str, program: str) -> list[Compiled]:
    """From what Mosaic GPU prints: resources of kernels in the program's order, then ptxas's reports in any order."""
    sizes = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", log)]
    reports = re.findall(
        r"entry function '(\S+?)(?:_mosaic_gpu_kernel)?' for.*?bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    names = sorted({name for name, *_ in reports}, key=len, reverse=True)
    shared: dict[str, list[int]] = {name: [] for name in names}
    for call, size in zip(program.split("@mosaic_gpu_v2(")[1:], sizes, strict=True):
        shared[next(name for name in names if name in call)].append(size)
    return [
        Compiled(name, int(registers), shared[name].pop(0), int(stores) + int(loads))
        for name, stores, loads, registers in reports
    ]


def triton_kernels(thunks: str) -> list[Compiled]:
    """From XLA's list of launches, which knows the shared memory alone; without XLA's own kernels."""
    launches = re.findall(r"kCustomKernel[^\n]*?(\S+) grid:[^\n]*shared_memory: (\d+) bytes", thunks)
    return [Compiled(name, shared=int(shared)) for name, shared in launches if not XLAS_OWN.search(name)]


if __name__ == "__main__":
    sys.exit(main())
