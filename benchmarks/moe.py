"""A mixture of experts beside a dense feed-forward of the same active work, and beside other ways to compute it.

    python benchmarks/moe.py                                          # what this machine has; prints a table
    python benchmarks/moe.py --out benchmarks/results/moe_cpu         # also writes .json, .md and .png

Time of a layer, forward and backward (gradients of parameters and input). All contestants run one after another in each
round, so what else the machine does meets all of them; ratios are taken inside a round, and once more from the time
that the processor worked, which other programs change less. The dense layer is SwiGLU of width ``top_k * width``: the
same products for each token. Routers are freshly drawn, MaxVio says how uneven they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.models import MoE, SwiGLU
from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.ops.attention.terms import CannotServe, this_device
from rlhf_jax.ops.routing import max_violation
from rlhf_jax.types import Context

TOP_K = 2
SIZES = {
    "cpu": ("256x512x4096", "512x1024x4096"),
    "gpu": ("2048x768x16384", "4096x1792x16384"),
    "tpu": ("2048x768x8192",),
}
EXPERTS = (8, 64)
OTHERS = {
    "cpu": ("reference", "ragged"),
    "gpu": ("hopper", "ragged", "reference"),
    "tpu": ("tpu", "ragged", "reference"),
}
"""Implementations that are measured beside the one that ``auto`` takes."""
MOST_BYTES = {"cpu": 1 << 30, "gpu": 24 << 30, "tpu": 4 << 30}
"""Of an intermediate array of ways that compute every expert for every row; their work grows with it."""


@dataclass(frozen=True)
class Size:
    """Of a layer and a batch: width of the model, width of each expert, tokens."""

    d_model: int
    width: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> Size:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"d={self.d_model}, width={self.width}, {self.tokens} tokens"


@dataclass(frozen=True)
class Contestant:
    name: str
    experts: int
    run: Callable[[], Any]
    max_violation: float = 0.0


def contestant(name: str, layer: nn.Module, size: Size, dtype: Any, experts: int = 0) -> Contestant:
    """The compiled layer with its gradients, warmed up."""
    rows = 8
    context = Context.of_lengths(jnp.full(rows, size.tokens // rows), size.tokens // rows)
    shared = Shared(context, context, style=Style(dtype=dtype))
    x = jax.random.normal(jax.random.key(0), (rows, size.tokens // rows, size.d_model), dtype)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x[:, :8], cut(shared, 8)))["params"]

    def loss(params, x):
        y, aux = layer.apply({"params": params}, x, shared)
        return (y.astype(jnp.float32) ** 2).sum(), aux.get("moe/load")

    program = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(params, x).compile()
    (_, load), _ = jax.block_until_ready(program(params, x))
    return Contestant(
        name, experts, lambda: program(params, x), 0.0 if load is None else float(max_violation(load.mean(0)))
    )


def cut(shared: Shared, length: int) -> Shared:
    context = Context(shared.queries.positions[:, :length], shared.queries.segments[:, :length])
    return shared.replace(queries=context, keys=context)  # pyright: ignore[reportAttributeAccessIssue]


def field(size: Size, dtype: Any, implementations: tuple[str, ...]) -> tuple[list[Contestant], list[str]]:
    """Who takes part, and who does not with the reason."""
    found, absent = [contestant("dense", SwiGLU(TOP_K * size.width), size, dtype)], []
    for experts in EXPERTS:
        for name in implementations:
            bytes_ = experts * TOP_K * size.tokens * max(size.d_model, 2 * size.width) * jnp.dtype(dtype).itemsize
            if name in ("reference", "ragged") and bytes_ > MOST_BYTES[this_device()[0]]:
                absent.append(
                    f"{name} with {experts} experts, {size}: it computes every expert for every row, {bytes_ >> 30} GiB"
                )
                continue
            layer = MoE(experts, TOP_K, size.width, implementation=name)
            try:
                found.append(contestant(f"{name}, {experts} experts", layer, size, dtype, experts))
            except CannotServe as refusal:
                absent.append(f"{name} with {experts} experts, {size}: {refusal}")
    return found, absent


def measure(size: Size, dtype: Any, implementations: tuple[str, ...], repeats: int) -> tuple[list[dict], list[str]]:
    contestants, absent = field(size, dtype, implementations)
    times: dict[str, list[float]] = {one.name: [] for one in contestants}
    processor: dict[str, list[float]] = {one.name: [] for one in contestants}
    for turn in range(repeats):
        for one in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
            start, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(one.run())
            times[one.name].append(time.perf_counter() - start)
            processor[one.name].append(time.process_time() - busy)
    rows = []
    for one in contestants:
        own, few = times[one.name], one.name.replace(f", {one.experts} experts", f", {EXPERTS[0]} experts")
        ratios = [mine / dense for mine, dense in zip(own, times["dense"], strict=True)]
        few = few if few in times else one.name
        rows.append({
            "size": str(size), "name": one.name, "experts": one.experts, "max_violation": one.max_violation,
            "ms": 1e3 * median(own), "ms_range": [1e3 * min(own), 1e3 * max(own)],
            "to_dense": median(ratios), "to_dense_range": [min(ratios), max(ratios)],
            "to_few": median(mine / other for mine, other in zip(own, times[few], strict=True)),
            "processor_ms": 1e3 * median(processor[one.name]),
            "processor_to_dense": median(processor[one.name]) / median(processor["dense"]),
            "processor_to_few": median(processor[one.name]) / median(processor[few]),
            "seconds": own,
        })  # fmt: skip
    return rows, absent


def table(result: dict) -> str:
    lines = [
        f"{result['device']}, {result['dtype']}, JAX {result['jax']}, {result['repeats']} rounds, load at the start "
        f"{result['load']:.1f} on {result['cores']} cores. Forward and backward of one layer, top {TOP_K}.",
        "",
        f"| size | layer | ms (range) | times dense (range) | times {EXPERTS[0]} experts | processor time | MaxVio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ms_range"]
        ratio = f"{row['to_dense']:.2f} ({row['to_dense_range'][0]:.2f}-{row['to_dense_range'][1]:.2f})"
        lines.append(f"| {row['size']} | {row['name']} | {row['ms']:.1f} ({low:.1f}-{high:.1f}) | {ratio} | "
                     f"{row['to_few']:.2f} | {row['processor_to_dense']:.2f}, {row['processor_to_few']:.2f} | "
                     f"{row['max_violation']:.2f} |")  # fmt: skip
    return "\n".join([*lines, *(f"\nNot measured: {line}." for line in result["absent"])]) + "\n"


def draw(result: dict, path: Path) -> None:
    """Bars of the ratios to the dense layer, with their ranges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 3.6), sharex=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        rows = [row for row in result["rows"] if row["size"] == size][::-1]
        ends = [
            [row["to_dense"] - row["to_dense_range"][0] for row in rows],
            [row["to_dense_range"][1] - row["to_dense"] for row in rows],
        ]
        axis.barh(
            [row["name"] for row in rows], [row["to_dense"] for row in rows], xerr=ends, color="#4878a8", capsize=2
        )
        axis.set(title=size, xscale="log", xlabel="time / time of the dense layer")
        axis.axvline(1.0, color="black", linewidth=0.8)
    figure.suptitle(f"{result['device']}, {result['dtype']}, top {TOP_K}: forward and backward")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    kind, device = this_device()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES[kind], help="d_model x width x tokens, such as 256x512x4096"
    )
    parser.add_argument("--implementations", nargs="+", default=None, help="auto and others of ops.experts")
    parser.add_argument("--dtype", default="float32" if kind == "cpu" else "bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="path without an ending")
    given = parser.parse_args()
    chosen = tuple(given.implementations) if given.implementations else ("auto", *OTHERS[kind])
    rows, absent, load = [], [], os.getloadavg()[0]
    for text in given.sizes:
        more, missing = measure(Size.of(text), jnp.dtype(given.dtype), chosen, given.repeats)
        rows, absent = rows + more, absent + missing
    result = {
        "device": f"{device} ({platform.machine()})", "dtype": given.dtype, "jax": jax.__version__,
        "repeats": given.repeats, "cores": os.cpu_count(), "load": load, "rows": rows, "absent": absent,
    }  # fmt: skip
    text = table(result)
    print(text)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(text)
        draw(result, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
