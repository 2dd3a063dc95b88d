"""Ask for a plan: in a process of its own, since a machine's compiler wants its settings before JAX is loaded.

Imports no JAX, and allocates nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.planning import machines
from rlhf_jax.planning.settings import environment


def ask(
    file: Path,
    on: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    stage: str | None = None,
    responses: int = 2,
    estimate: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The plan of an experiment file, as ``planning.plan`` makes it.

    Args:
        file: with ``config()``.
        on: the machine, such as ``h200:8``.
        overrides: of the configuration.
        stage: this one alone.
        responses: K of rankings.
        estimate: by formulas alone, without a compiler.
        progress: is told what is being compiled.

    Raises:
        UserError: as the experiment, the machine or the layout asks for it.
    """
    machine = machines.parse(on)
    request = {"file": str(file.resolve()), "on": on, "overrides": dict(overrides or {}), "stage": stage,
               "responses": responses, "estimate": estimate}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "rlhf_jax.planning", str(asked), str(answer)]
        settings = os.environ | environment(machine)
        with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            said = []
            for line in child.stderr:
                if line.startswith("planning "):
                    progress(line.strip())
                else:
                    said.append(line)
        if not answer.exists():
            raise RuntimeError(f"planning ended with {child.returncode}:\n{''.join(said[-40:])}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        fault = found["error"]
        raise UserError(fault.pop("what"), **fault)
    return found
