"""One contestant of attention.py in JAX: builds a case, checks it, times it. Answers on stdout (attention_pipe.py).

ours:NAME            an implementation of this package
jax.nn:cudnn, :xla   jax.nn.dot_product_attention
tokamax:NAME         tokamax.dot_product_attention with that implementation
pallas:triton        the flash attention that comes with JAX
judge                what the results should be, by the package's reference in fp32; and what the device can do
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import CHECKED, Case, numbers, sampled
from attention_pipe import Refused, serve

from rlhf_jax.ops.attention import IMPLEMENTATIONS, Mask, Terms, attention, decode_attention, reference
from rlhf_jax.ops.attention.decode import DECODERS
from rlhf_jax.ops.attention.terms import CannotServe
from rlhf_jax.ops.flash import FLASH_IMPLEMENTATIONS, flash_attention
from rlhf_jax.ops.gau import GAU_IMPLEMENTATIONS, Relu2, gau_attention
from rlhf_jax.types import Context

Compute = Callable[..., jax.Array]


def context_of(case: Case, rows: int | None = None) -> Context:
    shape = (case.rows if rows is None else rows, case.length)
    positions, segments = (jnp.broadcast_to(jnp.asarray(x), shape) for x in case.places())
    return Context(positions, segments, packed=case.mask == "packed")


def mask_of(case: Case, context: Context, queries: Context | None = None) -> Mask:
    window = case.window if case.mask == "window" else None
    return Mask.ranges(context if queries is None else queries, context, window=window)


def scale_of(case: Case) -> float:
    return case.width**-0.5


def ours(name: str, case: Case) -> Compute:
    """This package's function for a case, as a mixer would call it."""
    if case.kind in ("gau", "flash"):
        known = GAU_IMPLEMENTATIONS if case.kind == "gau" else FLASH_IMPLEMENTATIONS
        if name not in known:
            raise Refused(f"no implementation of {case.kind} has this name")
        return gated(name, case)
    if case.kind == "decode":
        if name not in DECODERS:
            raise Refused("has no decoder of its own")

        def decode(q, k, v, context):
            last = Context(jnp.full((case.rows, 1), case.length - 1), jnp.ones((case.rows, 1), jnp.int32))
            mask, terms = Mask.ranges(last, context), Terms(scale=scale_of(case))
            # The cache is kept in the order in which decoding reads it.
            return decode_attention(q[:, 0], k, v, mask, terms, name)[:, None]

        return decode
    if name not in IMPLEMENTATIONS:
        raise Refused("no implementation of attention has this name")

    def attend(q, k, v, context):
        return attention(q, k, v, mask_of(case, context), scale=scale_of(case), implementation=name)

    return attend


def gated(name: str, case: Case) -> Compute:
    """GAU's sum, or FLASH's, with one head."""
    options: dict[str, Any] = {"score": Relu2(), "scale": scale_of(case), "normaliser": float(case.chunk)}

    def gau(q, k, v, context):
        q, k, v = (x[:, :, 0] for x in (q, k, v))
        return gau_attention(q, k, v, mask_of(case, context), implementation=name, **options)[:, :, None]

    def flash(q, k, v, q_global, k_global, context):
        arrays = [x[:, :, 0] for x in (q, k, q_global / case.length, k_global, v)]
        return flash_attention(*arrays, context, chunk=case.chunk, implementation=name, **options)[:, :, None]

    return gau if case.kind == "gau" else flash


def rival(family: str, name: str, case: Case) -> Compute:
    """A function that others wrote, called as its ordinary user would for this case."""
    if case.kind in ("gau", "flash"):
        raise Refused(f"has no {case.kind}")
    if family == "pallas":
        from jax.experimental.pallas.ops.gpu.attention import mha

        if case.mask == "window" or case.kind == "decode" or case.heads != case.kv_heads:
            raise Refused("knows neither windows nor caches nor grouped heads")

        def pallas(q, k, v, context):
            segments = context.segments if case.mask == "packed" else None
            return mha(q, k, v, segments, sm_scale=scale_of(case), causal=True)

        return pallas
    if family == "tokamax":
        try:
            from tokamax import dot_product_attention  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise Refused(f"not installed here: {error}") from error
    else:
        from jax.nn import dot_product_attention

    def attend(q, k, v, context):
        options: dict[str, Any] = {"scale": scale_of(case), "implementation": name}
        if case.kind == "decode":
            return dot_product_attention(q, k, v, **options)
        if case.mask == "packed":
            options["mask"] = mask_of(case, context).dense()[:, None]
        else:
            options["is_causal"] = True
        if case.mask == "window":
            options["local_window_size"] = (case.window - 1, 0)
        return dot_product_attention(q, k, v, **options)

    return attend


class Worker:
    """The questions that a contestant answers, about one case at a time."""

    def __init__(self, contestant: str, scratch: Path, seconds: float) -> None:
        self.family, _, self.name = contestant.partition(":")
        self.scratch, self.seconds = scratch, seconds
        self.runs: dict[str, Callable[[], Any]] = {}
        self.repeats: dict[str, int] = {}

    def open(self, case: dict[str, Any]) -> dict[str, Any]:
        """Compile a case, run it once, leave the results to be checked; memory in bytes."""
        self.close()
        its = Case(**case)
        most = 1.5 if jax.default_backend() == "cpu" else 10.0
        if self.name in ("reference", "xla") and its.kind != "flash" and its.dense_bytes > most * 2**30:
            raise Refused(f"would hold logits of {its.dense_bytes / 2**30:.0f} GiB several times")
        # Rivals have no exception of their own for what they do not serve; any other of ours is a fault.
        refusals = (CannotServe,) if self.family == "ours" else (ValueError, NotImplementedError)
        try:
            compute = ours(self.name, its) if self.family == "ours" else rival(self.family, self.name, its)
            return self._prepare(its, compute)
        except refusals as reason:
            raise Refused(str(reason).strip()[:500]) from reason

    def _prepare(self, case: Case, compute: Compute) -> dict[str, Any]:
        arrays = {name: jnp.asarray(x, case.dtype) for name, x in numbers(case).items()}
        cotangent = arrays.pop("cotangent")
        if case.kind == "decode" and self.family == "ours":
            arrays |= {name: arrays[name].swapaxes(1, 2) for name in ("k", "v")}
        context = context_of(case)

        def both(arrays, context):
            return jax.vjp(lambda arrays: compute(**arrays, context=context), arrays)

        forward = jax.jit(lambda arrays, context: compute(**arrays, context=context)).lower(arrays, context).compile()
        self.runs["forward"] = lambda: forward(arrays, context)
        memory, results = _temporary(forward), {}
        out = forward(arrays, context)
        if "backward" in case.parts:
            # The pass that keeps what the backward needs; it is not timed apart.
            keeping = jax.jit(both).lower(arrays, context).compile()
            _, pull = keeping(arrays, context)
            backward = jax.jit(lambda pull, cotangent: pull(cotangent)[0]).lower(pull, cotangent).compile()
            self.runs["backward"] = lambda: backward(pull, cotangent)
            kept = sum(x.nbytes for x in jax.tree.leaves(pull)) - sum(x.nbytes for x in arrays.values())
            memory = max(_temporary(keeping), _temporary(backward)) + max(kept, 0)
            results |= {f"d{name}": x for name, x in backward(pull, cotangent).items()}
        results["out"] = out
        path = self.scratch / f"{self.family}-{self.name}.npz"
        np.savez(path, **_first_row(case, results))
        for part, run in self.runs.items():
            self.repeats[part] = max(1, min(200, int(self.seconds / max(_seconds(run, 1), 1e-6))))
        return {"memory": memory, "results": str(path)}

    def time(self, part: str) -> dict[str, Any]:
        """Seconds of one call, from as many as fill the time of a measurement, enqueued without waiting."""
        return {"seconds": _seconds(self.runs[part], self.repeats[part])}

    def close(self) -> dict[str, Any]:
        """Free what the case holds."""
        self.runs.clear()
        self.repeats.clear()
        jax.clear_caches()
        return {}

    def expect(self, case: dict[str, Any]) -> dict[str, Any]:
        """What the results of a case should be, from inputs rounded to its dtype and computed in fp32."""
        its = Case(**case)
        if its.kind in ("gau", "flash") and its.length > CHECKED:
            return {"results": None}
        first = {name: jnp.asarray(x[:1], its.dtype).astype(jnp.float32) for name, x in numbers(its).items()}
        with jax.default_matmul_precision("highest"):
            results = _expected(its, first)
        path = self.scratch / "expected.npz"
        np.savez(path, **{name: np.asarray(x, np.float32) for name, x in results.items()})
        return {"results": str(path)}

    def machine(self, dtype: str, size: int) -> dict[str, Any]:
        """What the device does here and now: products a second, and bytes read and written by a copy."""
        a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32), dtype)
        product = jax.jit(lambda a: a @ a)
        # Much larger than any cache.
        long = jnp.zeros(size * size * 16, jnp.float32)
        copy = jax.jit(lambda x: x + 1.0)
        times = {}
        for name, run in {"product": lambda: product(a), "copy": lambda: copy(long)}.items():
            once = max(_seconds(run, 1), _seconds(run, 1))
            times[name] = min(_seconds(run, max(1, int(self.seconds / once))) for _ in range(3))
        device = jax.devices()[0]
        return {
            "flops": 2 * size**3 / times["product"], "bytes": 2 * long.nbytes / times["copy"],
            "device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
        }  # fmt: skip


def _expected(case: Case, first: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Results of the first row: all of a short one, the sampled queries' of a long one."""
    cotangent, at = first.pop("cotangent"), sampled(case)
    context = context_of(case, rows=1)
    if case.kind in ("gau", "flash"):
        compute = gated("reference", case)
        out, pull = jax.vjp(lambda arrays: compute(**arrays, context=context), first)
        return {"out": out[0], **{f"d{name}": x[0] for name, x in pull(cotangent)[0].items()}}
    if case.kind == "decode":
        queries = Context(jnp.full((1, 1), case.length - 1), jnp.ones((1, 1), jnp.int32))
    else:
        queries = Context(context.positions[:, at], context.segments[:, at])
        first["q"], cotangent = first["q"][:, at], cotangent[:, at]
    mask = mask_of(case, context, queries)

    def attend(arrays):
        return reference.attend(arrays["q"], arrays["k"], arrays["v"], mask, Terms(scale=scale_of(case)))[0]

    out, pull = jax.vjp(attend, first)
    results = {"out": out[0]}
    if "backward" in case.parts:
        gradients = {f"d{name}": x[0] for name, x in pull(cotangent)[0].items()}
        # Keys and values of a long row have gradients from queries that were not drawn.
        results |= gradients if case.length <= CHECKED else {"dq": gradients["dq"]}
    return results


def _first_row(case: Case, results: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    at = sampled(case)
    whole = case.length <= CHECKED
    kept = {name: x[0] if whole else x[0, at] for name, x in results.items() if whole or name in ("out", "dq")}
    return {name: np.asarray(x.astype(jnp.float32)) for name, x in kept.items()}


def _temporary(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=0.03, help="of one measurement, at least")
    options = parser.parse_args()
    worker = Worker(options.contestant, options.scratch, options.seconds)
    questions = (worker.open, worker.time, worker.close, worker.expect, worker.machine)
    serve({each.__name__: each for each in questions})
