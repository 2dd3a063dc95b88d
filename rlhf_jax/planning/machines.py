"""Kinds of accelerators: what one device can do, and how a number of them is named. Imports no JAX.

Figures are the vendors' own: NVIDIA, "H100 Tensor Core GPU" and "H200 Tensor Core GPU" data sheets (SXM; dense bf16,
half of the figure with sparsity; NVLink 900 GB/s in both directions together; 8 GPUs in a node of DGX, one 400 Gbit/s
port of InfiniBand for each GPU) and Google, "Cloud TPU" system architecture pages of v4, v5e, v5p and v6e (bf16, HBM,
bidirectional interconnect of a chip, tori of two or three axes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_jax.errors import UserError

RESERVE = 0.08
"""Share of a device's memory that a plan leaves to the runtime, its kernels' scratch, and fragments."""


@dataclass(frozen=True)
class Device:
    """One device of a kind.

    Args:
        name: as JAX calls it (``device_kind``).
        platform: "cpu", "gpu" or "tpu".
        flops: peak of dense bf16 matrix products, in FLOP/s.
        memory: bytes.
        bandwidth: of that memory, in bytes/s.
        link: bytes/s that a device can send to the others of its group, in one direction. TPUs: both directions of
            the ring along one axis of the torus, which is what one mesh axis gets.
        node: devices that reach each other at ``link``; 0 for all.
        network: bytes/s that a device can send to other nodes.
    """

    name: str
    platform: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    node: int = 0
    network: float = 0.0


GIB = 2**30
_H200 = Device("NVIDIA H200", "gpu", 989.4e12, 150_754_820_096, 4.8e12, 450e9, 8, 50e9)
_V5E = Device("TPU v5 lite", "tpu", 197e12, 16 * GIB, 819e9, 100e9)
DEVICES: dict[str, Device] = {
    "cpu": Device("cpu", "cpu", 1e11, 16 * GIB, 2e10, 1e10),
    "h100": replace(_H200, name="NVIDIA H100 80GB HBM3", memory=85_520_809_984, bandwidth=3.35e12),
    "h200": _H200,
    "v4": Device("TPU v4", "tpu", 275e12, 32 * GIB, 1228e9, 100e9),
    "v5e": _V5E,
    "v5p": Device("TPU v5", "tpu", 459e12, 95 * GIB, 2765e9, 200e9),
    "v6e": replace(_V5E, name="TPU v6 lite", flops=918e12, memory=32 * GIB, bandwidth=1640e9, link=200e9),
}
"""By the word of ``--on``. The figures of "cpu" are those of no machine: they only put the numbers on a scale."""

AXES = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
"""How many numbers name a TPU slice."""


@dataclass(frozen=True)
class Machine:
    """So many devices of one kind.

    Args:
        kind: a key of ``DEVICES``.
        shape: of the slice for TPUs, the number of devices otherwise.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def device(self) -> Device:
        return DEVICES[self.kind]

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def usable(self) -> int:
        """Bytes of a device that a plan may fill."""
        return int(self.device.memory * (1 - RESERVE))

    def speed(self, group: Sequence[int]) -> float:
        """Bytes/s at which a device of a group (ids in the order of the mesh) passes on what all of it exchanges.

        Where the group spans nodes, its members of one node share their ports to the network.
        """
        device = self.device
        if not device.node or len({each // device.node for each in group}) <= 1:
            return device.link
        together = sum(each // device.node == group[0] // device.node for each in group)
        return min(device.link, device.network * together)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Machine:
    """``h200:8``, ``v5p:4x4x8``, ``cpu:8``.

    Raises:
        UserError: no such kind, or not the right number of sizes.
    """
    kind, _, sizes = text.partition(":")
    if kind not in DEVICES:
        raise UserError(
            f"no figures of {kind!r}", at="--on", expected=f"one of {', '.join(map(_example, DEVICES))}",
            fix="take a kind that is listed, or add its figures to rlhf_jax/planning/machines.py",
        )  # fmt: skip
    wanted = AXES.get(kind, 1)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != wanted:
        raise UserError(f"{text!r}", at="--on", fix="correct it",
                        expected=f"{kind} and {wanted} sizes, such as {_example(kind)}" if wanted > 1
                        else f"{kind} and a number of devices, such as {_example(kind)}")  # fmt: skip
    machine = Machine(kind, tuple(map(int, sizes.split("x"))))
    node = machine.device.node
    if node and machine.devices > node and machine.devices % node:
        raise UserError(f"{machine.devices} devices in nodes of {node}", at="--on", fix="correct it",
                        expected=f"at most {node}, or a multiple of it")  # fmt: skip
    return machine


def _example(kind: str) -> str:
    return f"{kind}:{'x'.join(['4'] * AXES[kind]) if kind in AXES else 8}"
