"""A pytree of arrays in a folder and back, through Orbax, checked against what the reader expects.

Leaves are stored under the path of names that leads to them, so a saved tree does not depend on the classes of its
containers. Shapes and dtypes are compared before anything is read: Orbax itself would cast silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from rlhf_jax import processes
from rlhf_jax.errors import UserError
from rlhf_jax.types import PyTree

Description = dict[str, dict[str, Any]]
"""``{"params/dense/kernel": {"shape": [3, 2], "dtype": "float32"}, ...}``."""

_FOLDER = "arrays"
_SHOWN = 12


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a tree, with the sharding of arrays that were put somewhere on purpose."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if not isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)

    return jax.tree.map(of, tree)


def describe(tree: PyTree) -> Description:
    """Shape and dtype of every leaf, arrays or abstract ones, by path."""
    return {
        name: {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name} for name, leaf in _named(tree).items()
    }


def described(saved: Description, name: str) -> PyTree:
    """What was saved below a name: abstract arrays in nested dictionaries."""
    found = {path.removeprefix(f"{name}/"): leaf for path, leaf in saved.items() if path.startswith(f"{name}/")}
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in found.items()}, sep="/"
    )


def write_arrays(folder: Path, tree: PyTree) -> None:
    """Writes the leaves of a tree below ``folder``; of several processes, all call it."""
    stored = {name: _storable(leaf) for name, leaf in _named(tree).items() if leaf.size}  # Orbax refuses empty arrays.
    if stored:
        _orbax().save((folder / _FOLDER).absolute(), traverse_util.unflatten_dict(stored, sep="/"))


def read_arrays(folder: Path, target: PyTree) -> PyTree:
    """Reads leaves into the structure of ``target``, an abstract tree that ``expect_same`` has accepted.

    Leaves go where the target's sharding says, or else to the default device.
    """
    wanted = _named(target)
    args = {name: _restore_args(leaf) for name, leaf in wanted.items() if 0 not in leaf.shape}
    read: dict[str, Any] = {}
    if args:
        nested = _orbax().restore(
            (folder / _FOLDER).absolute(), restore_args=traverse_util.unflatten_dict(args, sep="/")
        )
        read = traverse_util.flatten_dict(nested, sep="/")
    leaves = [_placed(read.get(name), leaf) for name, leaf in wanted.items()]
    for (name, expected), leaf in zip(wanted.items(), leaves, strict=True):
        assert leaf.shape == expected.shape and leaf.dtype == expected.dtype, name
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def expect_same(saved: Description, target: PyTree, at: str) -> None:
    """Refuses a checkpoint of another architecture with a table of the leaves that differ."""
    expected = describe(target)
    rows = []
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved:
            rows.append(f"{name}: missing; expected {_shown(expected[name])}")
        elif name not in expected:
            rows.append(f"{name}: {_shown(saved[name])}; expected nothing of this name")
        elif saved[name] != expected[name]:
            rows.append(f"{name}: {_shown(saved[name])}; expected {_shown(expected[name])}")
    if not rows:
        return
    more = [f"... and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    table = "\n".join(f"  {row}" for row in rows[:_SHOWN] + more)
    raise UserError(
        f"checkpoint of another architecture, {len(rows)} of {len(saved | expected)} arrays differ:\n{table}\n ",
        at=at,
        expected="the arrays of the model and the optimizer as they are configured",
        fix="configure them as when this was saved, or start from another folder",
    )


def _named(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, in the order of the tree."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named or name.count("/") != max(len(path) - 1, 0):
            raise ValueError(f"{name!r} does not name one leaf; expected keys that differ as strings, without a slash")
        named[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return named


def _storable(leaf: Any) -> Any:
    """What only this process has is the same in all, and Orbax takes that as an array of numpy."""
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and processes.count() > 1
    return np.asarray(leaf) if local else leaf


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)


def _placed(value: Any, leaf: Any) -> jax.Array:
    if value is None:
        value = np.zeros(leaf.shape, leaf.dtype)
    # A copy: a donated array must not share memory with one of numpy.
    return value if isinstance(value, jax.Array) else jnp.array(value, copy=True)


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True))


def _shown(leaf: dict[str, Any]) -> str:
    return f"{leaf['dtype']}[{', '.join(map(str, leaf['shape']))}]"
