"""The mesh that a program is traced for: its axes, and where rows and tokens of an activation go.

The axes have fixed names and meanings. Which of them a *parameter* is split over is a rule of the run
(``rlhf_jax.sharding``); which of them hold rows and tokens is not, so activations are constrained here, and the
partitioner finds the rest from the parameters. Without a mesh every function here does nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax.types import PyTree

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""``data``: rows, with a copy of the parameters each. ``fsdp``: rows, with parameters split (ZeRO-3). ``expert``: rows
in dense layers, experts in mixtures. ``context``: tokens of a row. ``tensor``: heads, feed-forward widths,
vocabulary."""
ROWS = ("data", "fsdp", "expert")
"""Axes that the rows of a batch are split over."""
CONTEXT, TENSOR, EXPERT = "context", "tensor", "expert"


def active_mesh() -> AbstractMesh | None:
    """The mesh of ``jax.set_mesh``; None where there is none, and inside ``shard_map``, where each device is alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    return mesh


def ways(mesh: AbstractMesh | jax.sharding.Mesh, axes: Any) -> int:
    """Into how many parts a dimension over these axes (a name, several, or None) is cut."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def token_spec(mesh: AbstractMesh | jax.sharding.Mesh, shape: tuple[int, ...], rest: Any = None) -> P:
    """How an array with leading axes of rows and tokens lies; a dimension that does not divide is not cut.

    Args:
        mesh: with all ``AXES``.
        shape: of the array; with one axis it has rows only.
        rest: the entry of all further dimensions: None for whole, ``P.UNCONSTRAINED`` for as the partitioner likes.
    """
    cuts = [axes if size % ways(mesh, axes) == 0 else None for size, axes in zip(shape, (ROWS, CONTEXT), strict=False)]
    return P(*cuts, *[rest] * (len(shape) - len(cuts)))


def constrain_tokens(tree: PyTree) -> PyTree:
    """Split leading axes ``[B, T]`` over the mesh; what follows is left to the partitioner."""
    mesh = active_mesh()
    if mesh is None:
        return tree

    def constrained(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, token_spec(mesh, x.shape, P.UNCONSTRAINED))

    return jax.tree.map(lambda x: constrained(x) if x.ndim else x, tree)


def constrain_rows(tree: PyTree) -> PyTree:
    """Split the leading axis of every array over the mesh; what follows is left to the partitioner."""
    mesh = active_mesh()
    if mesh is None:
        return tree

    def constrained(x: jax.Array) -> jax.Array:
        spec = token_spec(mesh, x.shape[:1])
        return jax.lax.with_sharding_constraint(x, P(*spec, *[P.UNCONSTRAINED] * (x.ndim - 1)))

    return jax.tree.map(lambda x: constrained(x) if x.ndim else x, tree)


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """Gather one axis of an array; the others are left to the partitioner."""
    if active_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None if i == axis else P.UNCONSTRAINED for i in range(x.ndim)]))
