"""A model in a folder of its own: ``model.json`` (the model as a description) and ``params.safetensors``.

Names of tensors are paths in the parameters: ``stack/blocks_0/mixer/qkv``.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from rlhf_jax import config
from rlhf_jax.errors import BAD_DATA, MISSING_INPUT, UserError
from rlhf_jax.models.parameters import abstract_params
from rlhf_jax.types import PyTree

MODEL_FILE, PARAMS_FILE = "model.json", "params.safetensors"


def save_folder(folder: str | Path, model, params: PyTree) -> None:
    """Write the folder; ``model.json`` comes last, so a folder with it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {"/".join(path): np.ascontiguousarray(leaf) for path, leaf in flatten_dict(params).items()}
    draft = folder / f".{PARAMS_FILE}.tmp"
    save_file(flat, draft)
    draft.replace(folder / PARAMS_FILE)
    draft = folder / f".{MODEL_FILE}.tmp"
    draft.write_text(json.dumps({"model": config.describe(model), "notes": {}}, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / MODEL_FILE)


def load_folder(folder: str | Path):
    """The model and its parameters (numpy arrays) of a folder that ``save_folder`` wrote."""
    folder = Path(folder)
    for name in (MODEL_FILE, PARAMS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing", at=str(folder), expected="a folder written by `rlhf-jax import`",
                            exit_code=MISSING_INPUT)  # fmt: skip
    try:
        model = config.revive(json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))["model"])
    except (json.JSONDecodeError, KeyError, TypeError) as fault:
        raise UserError(f"damaged ({type(fault).__name__}: {fault})", at=str(folder / MODEL_FILE),
                        fix="import the model again", exit_code=BAD_DATA) from fault  # fmt: skip
    params = unflatten_dict({tuple(name.split("/")): leaf for name, leaf in load_file(folder / PARAMS_FILE).items()})
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(model))
    if jax.tree.map(np.shape, params) != expected:
        raise UserError("the parameters are not those of the model beside them", at=str(folder / PARAMS_FILE),
                        fix="import the model again", exit_code=BAD_DATA)  # fmt: skip
    return model, params
