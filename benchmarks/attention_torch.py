"""One contestant of attention.py in PyTorch: scaled_dot_product_attention, or flash-attn. Answers on stdout.

torch:sdpa     torch.nn.functional.scaled_dot_product_attention, which chooses its kernel itself
torch:flash    flash_attn, where it is installed
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attention_cases import CHECKED, Case, numbers, sampled
from attention_pipe import Refused, serve

try:
    import torch
except ImportError as error:
    torch = None
    MISSING = f"not installed here: {error}"


def sdpa(case: Case, device: str) -> Callable[..., Any]:
    """Causal without a mask, everything else with a dense one, which is what its users have."""
    mask = None
    if case.kind == "attention" and case.mask != "causal":
        positions, segments = (torch.as_tensor(x, device=device) for x in case.places())
        mask = (segments[:, None] == segments) & (positions[:, None] >= positions)
        if case.mask == "window":
            mask &= positions[:, None] - positions < case.window
    causal = mask is None and case.kind == "attention"

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = case.heads != case.kv_heads
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=case.width**-0.5, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    return attend


def flash(case: Case, device: str) -> Callable[..., Any]:
    """flash-attn's own function for each kind of mask."""
    try:
        import flash_attn
    except ImportError as error:
        raise Refused(f"not installed here: {error}") from error
    scale = case.width**-0.5
    if case.mask == "packed":
        ends = np.cumsum(case.documents * case.rows)
        starts = torch.as_tensor(np.concatenate([[0], ends]), dtype=torch.int32, device=device)
        longest = max(case.documents)

        def packed(q, k, v):
            shape = q.shape
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = flash_attn.flash_attn_varlen_func(
                q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True
            )
            return out.reshape(shape[0], shape[1], *out.shape[1:])

        return packed
    window = (case.window - 1, 0) if case.mask == "window" else (-1, -1)

    def attend(q, k, v):
        return flash_attn.flash_attn_func(
            q, k, v, softmax_scale=scale, causal=case.kind == "attention", window_size=window
        )

    return attend


class Worker:
    """The questions that a contestant answers, about one case at a time."""

    def __init__(self, contestant: str, scratch: Path, seconds: float, device: str) -> None:
        self.name = contestant.partition(":")[2]
        self.scratch, self.seconds, self.device = scratch, seconds, device
        self.runs: dict[str, Callable[[], Any]] = {}
        self.repeats: dict[str, int] = {}

    def open(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run a case once and leave the results to be checked; memory in bytes (on a GPU)."""
        self.close()
        if torch is None:
            raise Refused(MISSING)
        its = Case(**case)
        if its.kind in ("gau", "flash"):
            raise Refused(f"has no {its.kind}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Refused("this PyTorch sees no GPU")
        compute = {"sdpa": sdpa, "flash": flash}[self.name](its, self.device)
        dtype = getattr(torch, its.dtype)
        arrays = {name: torch.as_tensor(x, device=self.device).to(dtype) for name, x in numbers(its).items()}
        cotangent = arrays.pop("cotangent")
        before = self._memory()
        with torch.no_grad():
            results = {"out": compute(**arrays)}

        def forward():
            with torch.no_grad():
                return compute(**arrays)

        self.runs["forward"] = forward
        if "backward" in its.parts:
            for x in arrays.values():
                x.requires_grad_()
            out = compute(**arrays)
            self.runs["backward"] = lambda: torch.autograd.grad(
                out, list(arrays.values()), cotangent, retain_graph=True
            )
            results |= {f"d{name}": x for name, x in zip(arrays, self.runs["backward"](), strict=True)}
        at, whole = sampled(its), its.length <= CHECKED
        kept = {name: x[0] if whole else x[0, at] for name, x in results.items() if whole or name in ("out", "dq")}
        path = self.scratch / f"torch-{self.name}.npz"
        np.savez(path, **{name: x.detach().float().cpu().numpy() for name, x in kept.items()})
        for part, run in self.runs.items():
            self.repeats[part] = max(1, min(200, int(self.seconds / max(self._seconds(run, 1), 1e-6))))
        return {"memory": self._memory() - before if self.device == "cuda" else None, "results": str(path)}

    def time(self, part: str) -> dict[str, Any]:
        """Seconds of one call, from as many as fill the time of a measurement, enqueued without waiting."""
        return {"seconds": self._seconds(self.runs[part], self.repeats[part])}

    def close(self) -> dict[str, Any]:
        """Free what the case holds."""
        self.runs.clear()
        self.repeats.clear()
        if torch is not None and self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return {}

    def _memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def _seconds(self, run: Callable[[], Any], repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=0.03)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    worker = Worker(options.contestant, options.scratch, options.seconds, options.device)
    serve({each.__name__: each for each in (worker.open, worker.time, worker.close)})
