"""Named tensors of a folder of ``*.safetensors`` files, sharded or not, read one at a time and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.errors import BAD_DATA, MISSING_INPUT, REFUSED, UserError

INDEX_FILE = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise UserError(f"{path.name} is missing", at=str(path.parent), expected="a folder with a saved model",
                        exit_code=MISSING_INPUT)  # fmt: skip
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"not JSON ({fault})", at=str(path), exit_code=BAD_DATA) from fault
    if not isinstance(found, dict):
        raise UserError(f"holds a {type(found).__name__}", at=str(path), expected="an object", exit_code=BAD_DATA)
    return found


class Tensors:
    """Where each tensor of a folder lies, and which were read.

    Args:
        folder: holds the files.
        prefix: left out of names where the folder's names begin with it (``transformer.``, ``model.``).
    """

    def __init__(self, folder: Path, prefix: str):
        self.folder = folder
        self.files = _locate(folder)
        self.prefix = prefix if any(name.startswith(prefix) for name in self.files) else ""
        self.read: set[str] = set()

    def get(self, name: str, *shape: int) -> np.ndarray:
        """The tensor in fp32; its shape must be ``shape``."""
        full = name if name in self.files else self.prefix + name
        if full not in self.files:
            raise UserError(f"tensor {full!r} is missing", at=str(self.folder), exit_code=BAD_DATA)
        path = self.files[full]
        try:
            with safe_open(path, framework="np") as file:
                tensor = file.get_tensor(full)
        except (SafetensorError, OSError) as fault:
            raise UserError(f"cannot read tensor {full!r} ({fault})", at=str(path), fix="copy the file again",
                            exit_code=BAD_DATA) from fault  # fmt: skip
        if tensor.shape != shape:
            raise UserError(f"tensor {full!r} has shape {tensor.shape}", at=str(path),
                            expected=f"{shape}, as config.json says", exit_code=BAD_DATA)  # fmt: skip
        self.read.add(full)
        return np.asarray(tensor, np.float32)

    def check_all_read(self, ignored: tuple[str, ...]) -> None:
        """Refuse tensors that nobody asked for, but for names that end with one of ``ignored``."""
        left = sorted(name for name in self.files if name not in self.read and not name.endswith(ignored))
        if left:
            raise UserError(f"{len(left)} tensors have no place in the model, the first is {left[0]!r}",
                            at=str(self.folder), expected="the parameters that config.json describes",
                            exit_code=BAD_DATA)  # fmt: skip


def _locate(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (folder / INDEX_FILE).is_file():
        return _by_index(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        _refuse_pickles(folder)
        raise UserError("no *.safetensors file", at=str(folder), expected="model.safetensors or shards with an index",
                        exit_code=MISSING_INPUT)  # fmt: skip
    located: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                located |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as fault:
            raise UserError(f"not a safetensors file ({fault})", at=str(path), fix="copy the file again",
                            exit_code=BAD_DATA) from fault  # fmt: skip
    return located


def _by_index(folder: Path) -> dict[str, Path]:
    shards = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError("weight_map is missing", at=str(folder / INDEX_FILE), exit_code=BAD_DATA)
    for shard in sorted({str(shard) for shard in shards.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"names the file {shard!r}", at=str(folder / INDEX_FILE),
                            expected="*.safetensors files beside the index", exit_code=REFUSED)  # fmt: skip
        if not (folder / shard).is_file():
            raise UserError(f"shard {shard!r} is missing", at=str(folder), fix="copy it again",
                            exit_code=MISSING_INPUT)  # fmt: skip
    return {name: folder / shard for name, shard in shards.items()}


def _refuse_pickles(folder: Path) -> None:
    pickles = [path for ending in ("bin", "pt", "pth", "ckpt") for path in sorted(folder.glob(f"*.{ending}"))]
    if pickles:
        raise UserError(
            "the weights are a pickle, which can execute code when it is read", at=str(pickles[0]),
            expected="*.safetensors",
            fix="convert it where you trust it: transformers' `AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(other)` writes safetensors", exit_code=REFUSED,
        )  # fmt: skip
