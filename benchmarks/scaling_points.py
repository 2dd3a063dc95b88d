"""The points of scaling.py: models, shapes, layouts and devices. Imports no JAX."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Kind = Literal["train", "ppo", "decode"]


@dataclass(frozen=True)
class Size:
    """A decoder with RoPE and RMSNorm, feed-forwards of width ``4 d`` (GELU, not gated), a tied unembedding.

    It has ``12 layers d_model^2 + vocab d_model`` numbers in matrices. Vocabularies divide by 64.
    """

    layers: int
    d_model: int
    heads: int
    vocab: int


SIZES = {
    "toy": Size(2, 32, 4, 128),
    "0.5M": Size(2, 128, 8, 1024),
    "3.4M": Size(4, 256, 8, 1024),
    "14.5M": Size(8, 384, 8, 1024),
    "124M": Size(12, 768, 12, 50_304),
    "350M": Size(24, 1024, 16, 50_304),
    "1.3B": Size(24, 2048, 16, 50_304),
}
"""By the names that points use; the last three have the shapes of GPT-3's models."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One thing to measure, in a process (or ``processes``) of its own.

    Args:
        panel: of the plot, and of the report's tables.
        kind: a step of training, an iteration of PPO by phases, or decoding.
        model: a key of ``SIZES``.
        rows: of one step; prompts of PPO and decoding.
        length: tokens of a row; of a prompt for PPO and decoding.
        new_tokens: of each response.
        devices: in all processes together.
        processes: that share them out.
        layout: the mesh's axes that are larger than 1.
        across: how attention reaches keys on other devices.
        attention: its implementation.
        experts: of each feed-forward, of which a token takes two of half the width; 0 for a dense one.
        expert_products: implementation of the experts' products.
        remat: as of ``Transformer``.
        dtype: of the computation.
        param_dtype: of the parameters, and of the optimizer's state.
        minibatch: rows of one update of PPO.
        target: share of the peak (training) or of the copy bandwidth (decoding) that is wanted.
    """

    panel: str
    kind: Kind = "train"
    model: str
    rows: int
    length: int
    new_tokens: int = 0
    devices: int = 1
    processes: int = 1
    layout: dict[str, int] = field(default_factory=dict)
    across: str = "auto"
    attention: str = "auto"
    experts: int = 0
    expert_products: str = "auto"
    remat: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    minibatch: int = 0
    target: float | None = None

    @property
    def title(self) -> str:
        """What is measured, less what all points of a table have in common."""
        shape = f"{self.rows} x {self.length}" + (f" + {self.new_tokens}" if self.new_tokens else "")
        experts = f", {self.experts} experts" if self.experts else ""
        chosen = [f"remat {self.remat}"] if self.remat else []
        chosen += [f"attention {self.attention}"] if self.attention != "auto" else []
        chosen += [f"products {self.expert_products}"] if self.expert_products != "auto" else []
        return ", ".join([f"{self.model}{experts}", shape, *chosen])

    @property
    def spread(self) -> str:
        """How it is spread, in words."""
        axes = " x ".join(f"{name}={size}" for name, size in self.layout.items()) or "one device"
        axes += f", {self.across}" if self.across != "auto" else ""
        return axes + (f", {self.processes} processes" if self.processes > 1 else "")

    def described(self) -> dict[str, Any]:
        return asdict(self)


Group = list[Point]
"""Points that are timed in turn; the first is what the others are compared with."""


def cpu_groups() -> list[Group]:
    """Layouts, processes, model sizes, lengths and experts, on simulated devices; fp32."""
    base = Point(panel="devices", model="3.4M", rows=8, length=256)
    groups = [
        [base, *(replace(base, devices=n, layout={axis: n}) for n in (2, 4, 8))]
        for axis in ("data", "fsdp", "tensor", "context")
    ]
    alone = replace(base, panel="processes")
    for axis in ("data", "fsdp"):
        groups.append([alone, *(replace(alone, devices=n, processes=n, layout={axis: n}) for n in (2, 4))])
    for model in ("0.5M", "3.4M", "14.5M"):
        one = replace(base, panel="model size", model=model)
        groups.append([one, replace(one, devices=8, layout={"fsdp": 8})])
    for length in (512, 1024, 2048, 4096):
        one = replace(base, panel="length", model="0.5M", rows=4096 // length, length=length)
        ways = [replace(one, devices=8, layout={"context": 8}, across=across) for across in ("gather", "ring")]
        groups.append([one, *ways])
    for experts in (0, 4, 8, 16):
        one = replace(base, panel="experts", experts=experts)
        groups.append([one, *([replace(one, devices=4, layout={"expert": 4})] if experts else [])])
    return groups


def gpu_groups(devices: int = 1) -> list[Group]:
    """Training, decoding and PPO of 124M to 1.3B, the most telling first: bf16 computation.

    Training and PPO keep parameters and optimizer in fp32; decoding alone has parameters in bf16.

    Args:
        devices: where there are several, the 1.3B model is also spread over all of them.
    """
    # What stays of a round of layers is its matrix products: the least traffic for the least that is computed again.
    big = Point(panel="training", model="1.3B", rows=16, length=2048, dtype="bfloat16", attention="hopper",
                remat="dots_with_no_batch_dims_saveable", target=0.5)  # fmt: skip
    decode = Point(panel="decode", kind="decode", model="1.3B", rows=8, length=512, new_tokens=128, dtype="bfloat16",
                   param_dtype="bfloat16", attention="hopper", target=0.6)  # fmt: skip
    ppo = Point(panel="ppo", kind="ppo", model="1.3B", rows=64, length=512, new_tokens=512, minibatch=16,
                dtype="bfloat16", attention="hopper", remat="nothing_saveable")  # fmt: skip
    groups = [
        [big],
        [replace(big, rows=8, remat=None)],
        [replace(big, remat="nothing_saveable")],
        [decode],
        [replace(decode, rows=64)],
        [ppo],
        [replace(big, attention="auto")],
        [replace(decode, rows=64, attention="auto")],
    ]
    small = replace(big, target=None)
    dense = replace(small, model="350M")
    mixed = replace(dense, experts=8)
    groups += [
        [dense],
        [mixed],
        [replace(mixed, expert_products="hopper")],
        [replace(small, rows=4, length=8192)],
        [replace(small, model="124M", rows=32)],
        [replace(small, model="124M", rows=8, length=8192)],
        [replace(dense, rows=4, length=8192)],
    ]
    if devices > 1:
        for axis in ("fsdp", "data", "tensor"):
            rows = 16 if axis == "tensor" else 16 * devices
            groups.append([replace(small, rows=rows, panel="devices", devices=devices, layout={axis: devices})])
    return groups


def shrunk(groups: list[Group]) -> list[Group]:
    """The same paths at sizes that take no time: whether everything runs, on any device."""

    def toy(point: Point) -> Point:
        served = {"attention": "auto", "expert_products": "auto"}  # kernels by name serve their own device alone
        parts = 2 if point.devices > 1 else 1
        return replace(
            point, model="toy", rows=4, length=32 if point.length <= 2048 else 64, devices=parts,
            processes=min(point.processes, parts), layout=dict.fromkeys(point.layout, parts),
            new_tokens=8 if point.new_tokens else 0, minibatch=2 if point.minibatch else 0,
            experts=4 if point.experts else 0, **served,
        )  # fmt: skip

    found: list[Group] = []
    for group in groups:
        small = list({str(toy(point)): toy(point) for point in group}.values())
        if small not in found:
            found.append(small)
    return found
