"""Run a function of a test module in a process that sees several simulated devices; pytest's own process has one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
CALL = "import importlib, json, sys; module, name, given = sys.argv[1:4]; \
value = getattr(importlib.import_module(module), name)(*json.loads(given)); print('\\n' + json.dumps(value))"

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Compiling takes most of the time of such tests; this halves it, and again where the flag below is known."""
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def thoroughly(names: Any, some: Any) -> list[Any]:
    """Values of a parameter, of which all but ``some`` are left to ``pytest -m thorough``."""
    import pytest

    return [name if name in some else pytest.param(name, marks=pytest.mark.thorough) for name in names]


@dataclass(frozen=True)
class Ran:
    """What the function returned, and what the process wrote as warnings and errors (the compiler's too)."""

    value: Any
    log: str


def run_on(devices: int, module: str, name: str, *arguments: Any, timeout: float = 600.0) -> Ran:
    """``module.name(*arguments)`` on so many simulated CPU devices; arguments and result go through JSON.

    Args:
        devices: as ``jax.devices()`` will count them.
        module: a file of this folder, without its ending; it is imported where JAX has not been yet.
        name: a function in it.
        arguments: values of JSON.
        timeout: seconds.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} {QUICK}"
    path = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    # Threads for all devices of a collective: with fewer they wait for each other for ever.
    threads = os.environ.get("NPROC", "32")
    environment = {**os.environ, "NPROC": threads, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", CALL, module, name, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{module}.{name} on {devices} devices failed:\n{done.stderr[-6000:]}")
    return Ran(json.loads(done.stdout.splitlines()[-1]), done.stderr)
