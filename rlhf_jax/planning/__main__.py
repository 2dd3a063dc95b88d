"""The process that plans, in the environment that a machine's compiler wants: from a file of JSON to another.

python -m rlhf_jax.planning REQUEST RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhf_jax import config
from rlhf_jax.errors import UserError
from rlhf_jax.planning import machines


def main() -> int:
    request, result = (Path(word) for word in sys.argv[1:3])
    try:
        found = _planned(json.loads(request.read_text(encoding="utf-8")))
    except UserError as fault:
        found = {"error": {"what": fault.what, "at": fault.at, "expected": fault.expected, "fix": fault.fix,
                           "exit_code": fault.exit_code}}  # fmt: skip
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


def _planned(request: dict[str, Any]) -> dict[str, Any]:
    import jax

    from rlhf_jax.experiment import Experiment
    from rlhf_jax.planning.compiling import described_devices
    from rlhf_jax.planning.plan import plan

    file = config.load(Path(request["file"]))
    experiment = config.override(file.config(), request["overrides"])
    if not isinstance(experiment, Experiment):
        raise UserError(f"config() gives a {type(experiment).__name__}", at=request["file"],
                        expected="an Experiment", fix="return one")  # fmt: skip
    machine, notes = machines.parse(request["on"]), []
    devices, compiler = jax.devices()[: machine.devices], False
    if not request["estimate"]:
        try:
            devices, compiler = described_devices(machine), True
        except RuntimeError as fault:
            notes.append(f"{fault}: estimated instead")

    def progress(words: str) -> None:
        print(f"planning {words}", file=sys.stderr, flush=True)

    found = plan(experiment, machine, devices, compiler=compiler, only=request["stage"],
                 responses=request["responses"], progress=progress)  # fmt: skip
    return found | {"notes": notes + found["notes"]}


if __name__ == "__main__":
    sys.exit(main())
