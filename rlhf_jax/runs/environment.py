"""What a run was made with: code revision, package versions, devices, flags; for environment.json and doctor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "rlhf_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "chex",
    "numpy",
    "scipy",
    "tokenizers",
    "safetensors",
    "pyarrow",
)
_FLAG_PREFIXES = ("XLA_", "JAX_", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "TF_CPP_", "NVIDIA_TF32")


def environment(source: Path | None = None) -> dict[str, Any]:
    """A JSON-able account of this process; ``source`` is the experiment file, whose repository is noted too."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "command": sys.argv,
        "packages": versions(),
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_FLAG_PREFIXES)},
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "code": revision(Path(__file__).parent),
        "experiment_code": revision(source.resolve().parent) if source is not None else None,
    }


def versions() -> dict[str, str]:
    """Installed version of each package that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def revision(folder: Path) -> dict[str, Any] | None:
    """Git commit of the folder's repository and whether its tracked files were changed; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or status is None else {"commit": commit, "dirty": status != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
