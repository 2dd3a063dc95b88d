"""The environment of a process that compiles for a machine. Imports no JAX."""

from __future__ import annotations

import os

from rlhf_jax.planning.machines import Machine


def environment(machine: Machine) -> dict[str, str]:
    """What must stand in the environment before JAX is loaded."""
    flags = os.environ.get("XLA_FLAGS", "")
    common = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    simulated = f"{flags} --xla_force_host_platform_device_count={machine.devices}"
    if machine.device.platform == "gpu":
        # There is no device to time candidates on.
        flags = f"{simulated} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        return common | {"CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": flags}
    if machine.device.platform == "tpu":
        waits = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
        return common | waits | {"XLA_FLAGS": simulated}
    return common | {"XLA_FLAGS": simulated}
