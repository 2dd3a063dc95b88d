"""What one execution of a program takes on each device, and the least time that a machine needs for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.planning.counts import Collective
from rlhf_jax.planning.machines import Machine
from rlhf_jax.types import PyTree

Source = Literal["compiled", "continued", "estimated"]
"""Where a number is from: the machine's own compiler; the same at two smaller numbers of layers, continued in a
straight line; or a formula on shapes."""


@dataclass(frozen=True)
class Traffic:
    """Communication of one kind: how often, the bytes that it is about, those sent by a device, and the time."""

    times: float = 0.0
    payload: float = 0.0
    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.times + other.times, self.payload + other.payload, self.sent + other.sent,
                       self.seconds + other.seconds)  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """One execution, for each device.

    Args:
        source: of the memory.
        temporary: bytes that live while it runs.
        output: bytes of results that do not take the place of an argument.
        code: bytes of the program itself.
        flops: of matrix products.
        flops_source: of those; a kernel's own are not in a program's text.
        moved: bytes read and written in device memory.
        traffic: by kind of collective.
        notes: what the reader should know about these numbers.
    """

    source: Source
    temporary: int
    output: int
    code: int
    flops: float
    flops_source: Source
    moved: float
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Roofline:
    """Seconds that each limit takes alone; the program takes at least the longest of them."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """The limit that binds."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(numbers: Numbers, machine: Machine) -> Roofline:
    """The three times of one execution."""
    device = machine.device
    return Roofline(
        numbers.flops / device.flops, numbers.moved / device.bandwidth,
        sum(traffic.seconds for traffic in numbers.traffic.values()),
    )  # fmt: skip


def total_traffic(collectives: list[Collective], machine: Machine) -> dict[str, Traffic]:
    """Sums by kind, with the time on this machine's links."""
    found: dict[str, Traffic] = {}
    for each in collectives:
        seconds = each.sent / machine.speed(each.group) if len(each.group) > 1 else 0.0
        one = Traffic(each.times, each.times * each.payload, each.sent, seconds)
        found[each.kind] = found.get(each.kind, Traffic()) + one
    return found


def continued(first: Numbers, second: Numbers, sizes: tuple[int, int], wanted: int) -> Numbers:
    """The numbers at ``wanted`` layers from those at two smaller numbers of them, in a straight line."""
    step = (wanted - sizes[0]) / (sizes[1] - sizes[0])

    def line(a: float, b: float) -> float:
        return max(0.0, a + (b - a) * step)

    def lined(a: Traffic, b: Traffic) -> Traffic:
        return Traffic(*(line(getattr(a, name), getattr(b, name)) for name in ("times", "payload", "sent", "seconds")))

    kinds = [*first.traffic, *(kind for kind in second.traffic if kind not in first.traffic)]
    none = Traffic()
    return replace(
        second,
        source="continued",
        flops_source="estimated" if "estimated" in (first.flops_source, second.flops_source) else "continued",
        **{name: int(line(getattr(first, name), getattr(second, name))) for name in ("temporary", "output", "code")},
        **{name: line(getattr(first, name), getattr(second, name)) for name in ("flops", "moved")},
        traffic={kind: lined(first.traffic.get(kind, none), second.traffic.get(kind, none)) for kind in kinds},
    )


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree on one device; each distinct array is counted once."""
    return sum(map(_leaf_bytes, {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * item_bytes(leaf)


def item_bytes(leaf: Any) -> int:
    """Bytes of one entry; keys of random numbers are two words."""
    return 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else jnp.dtype(leaf.dtype).itemsize
