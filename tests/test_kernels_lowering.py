"""Every kernel of the table that is compiled for devices is lowered for its device here, where JAX can without one."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from attention_scenes import lowering_for  # noqa: E402
from kernel_cases import CASES, H200, TPU  # noqa: E402
from kernels_compile import Compiled, mosaic_kernels, triton_kernels  # noqa: E402

OF_MOSAIC_GPU = "hopper"
LOWERINGS = {H200: (("cuda",), "gpu", "NVIDIA H200"), TPU: (("tpu",), "tpu", "TPU v5")}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("kernel", CASES, ids=lambda kernel: kernel.name)
def test_every_kernel_lowers_for_its_device(kernel):
    if OF_MOSAIC_GPU in kernel.name and jax.__version_info__ < (0, 11, 1):
        pytest.skip("the Hopper kernels need JAX 0.11.1 or newer")
    platforms, platform, kind = LOWERINGS[kernel.target]
    function, arguments = kernel.build()
    with lowering_for(platform, kind):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()
    assert "custom_call" in text


def test_names_of_kernels_are_distinct():
    assert len({kernel.name for kernel in CASES}) == len(CASES)


PROGRAM = r"""
%1 = stablehlo.custom_call @mosaic_gpu_v2(%0) {module = "\00forward_mosaic_gpu_kernel\00"}
%2 = stablehlo.custom_call @mosaic_gpu_v2(%1) {module = "\00backward_mosaic_gpu_kernel\00"}
"""
# The compiler takes the kernels in another order than the program has them.
REPORT = """
Resources(smem_scratch_bytes=166912, tmem_scratch_cols=0, barrier_counts=Counter())
Resources(smem_scratch_bytes=2048, tmem_scratch_cols=0, barrier_counts=Counter())
ptxas info    : Compiling entry function 'backward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for backward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for forward_mosaic_gpu_kernel
    8 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_reports_of_compilers_are_read():
    assert mosaic_kernels(REPORT, PROGRAM) == [
        Compiled("backward", 90, 2048, 0),
        Compiled("forward", 168, 166912, 32),
    ]
    thunks = (
        "001: kCustomKernel [source] mha_forward grid: [8, 1, 4] threads: [256, 1, 1]  shared_memory: 163840 bytes\n"
        "002: kCustomKernel loop_broadcast_fusion grid: [8, 1, 1] threads: [256, 1, 1]  shared_memory: 0 bytes\n"
    )
    (kernel,) = triton_kernels(thunks)
    assert (kernel.name, kernel.shared) == ("mha_forward", 163840)
