"""``rlhf-jax doctor``: is this machine fit to run on, and if not, what is missing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.errors import IO, UserError
from rlhf_jax.runs.environment import environment
from rlhf_jax.runs.files import PROBE_BYTES, check_writable

LEAST_FREE_GB = 5.0


def examine(folder: Path) -> None:
    """Print one line for each check; a UserError if one of them failed.

    Checks are of the accelerator, of arithmetic after compilation, and of the disk below ``folder``.
    """
    facts = environment()
    table = Table(show_header=False, box=None, pad_edge=False)
    devices = ", ".join(sorted(set(facts["devices"])))
    table.add_row("python", f"{facts['python']} on {facts['platform']}, {facts['cores']} cores")
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    table.add_row("devices", f"{len(facts['devices'])} x {devices} ({facts['backend']})")
    table.add_row("flags", " ".join(f"{name}={value}" for name, value in facts["flags"].items()))
    faults = []
    for name, check in (("accelerator", _accelerator), ("compiler", _compile), ("disk", lambda: _disk(folder))):
        text, fine = _outcome(check)
        table.add_row(name, Text(text, style="" if fine else "bold red"))
        faults += [] if fine else [f"{name}: {text}"]
    Console(highlight=False).print(table)
    if faults:
        raise UserError("; ".join(faults), at="doctor", exit_code=IO)


def _outcome(check: Callable[[], str]) -> tuple[str, bool]:
    try:
        return check(), True
    except UserError as error:
        return str(error), False


def _accelerator() -> str:
    import jax

    backend = jax.default_backend()
    present = {"gpu": ("cuda", Path("/dev/nvidia0")), "tpu": ("tpu", Path("/dev/accel0"))}
    for kind, (extra, device) in present.items():
        if device.exists() and backend == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
            fix = f"pip install 'rlhf_jax[{extra}]'"
            raise UserError(f"this machine has a {kind} and JAX does not see it", expected=kind, fix=fix)
    return "none; everything runs on the processor" if backend == "cpu" else f"{backend} in use"


def _compile() -> str:
    import jax
    import jax.numpy as jnp

    start = time.monotonic()
    found = float(jax.jit(lambda x: jnp.sum(x @ x))(jnp.full((64, 64), 0.5)))
    expected = 64**3 * 0.25  # exact in float32
    if found != expected:
        raise UserError(f"a sum of products is {found}", expected=str(expected), fix="suspect the device or its driver")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    return f"compiled in {time.monotonic() - start:.2f} s; cache in {cache if cache else 'memory only'}"


def _disk(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError("no such folder", at=str(folder))
    start = time.monotonic()
    check_writable(folder)
    seconds = time.monotonic() - start
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{free:.1f} GB free in {folder.resolve()}, {PROBE_BYTES >> 20} MB written and synced in {seconds:.3f} s"
    if free < LEAST_FREE_GB:
        raise UserError(text, expected=f"at least {LEAST_FREE_GB:.0f} GB free", fix="free space before a run")
    return text
