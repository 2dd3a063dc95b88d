"""The kernels of this package as they are compiled for a device: one entry each of ``make kernels-compile``.

A new kernel joins by one more group in ``CASES``: a function that returns ``Kernel`` values. Kernels are imported
inside ``build``, so that reading the table needs no GPU or TPU library:

    def hopper_decode() -> tuple[Kernel, ...]:
        def build():
            from rlhf_jax.ops.kernels import hopper_decode

            q = jax.ShapeDtypeStruct((8, 16, 128), jnp.bfloat16)
            return hopper_decode.attend, (q, ...)

        return (Kernel("hopper decode D=128", H200, build),)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

H200, TPU = "h200", "tpu"


@dataclass(frozen=True)
class Kernel:
    """One program to compile, which may hold several kernels (a forward and two of a backward, say).

    Args:
        name: how the table calls it: implementation, pass, head width, what is special.
        target: ``H200`` or ``TPU``.
        build: the function and its arguments as ``jax.ShapeDtypeStruct`` (any pytrees), made when it is compiled.
    """

    name: str
    target: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


CASES: tuple[Kernel, ...] = ()
