"""Masks and terms that every attention kernel is held to, and the comparison with the reference in float64."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from rlhf_jax.ops.attention import Mask, Rule, Terms, alibi_slopes, reference
from rlhf_jax.types import Context


def documents(*rows: tuple[int, ...], width: int, shuffle: int | None = None) -> Context:
    """Rows of documents of these lengths, padding behind; the slots in a random order where ``shuffle`` is given."""
    positions, segments = np.zeros((2, len(rows), width), np.int32)
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, at : at + length], segments[row, at : at + length] = range(length), number
            at += length
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(width)
        positions, segments = positions[:, order], segments[:, order]
    return Context(jnp.asarray(positions), jnp.asarray(segments))


def lowering_for(platform: str, kind: str) -> contextlib.AbstractContextManager:
    """Pallas asks for the device that it lowers for, where it is not the one that JAX runs on."""
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, platform)))


def pretend_a_gpu(monkeypatch, capability: str) -> None:
    """Let refusals see a GPU of this compute capability."""

    class Device:
        compute_capability = capability
        device_kind = f"GPU of {capability}"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])


@dataclass(frozen=True)
class Problem:
    """One attention: shapes, mask and terms."""

    queries: Context
    keys: Context
    heads: int = 2
    kv_heads: int = 1
    width: int = 16
    value_width: int = 16
    window: int | None = None
    prefix: int = 0
    rule: Rule = Rule()
    softcap: float | None = None
    slopes: bool = False
    sinks: bool = False

    @property
    def mask(self) -> Mask:
        return Mask.ranges(self.queries, self.keys, window=self.window, prefix=self.prefix, rule=self.rule)

    def terms(self, sinks) -> Terms:
        slopes = alibi_slopes(self.heads) if self.slopes else None
        return Terms(scale=self.width**-0.5, softcap=self.softcap, slopes=slopes, sink_logits=sinks)

    def arrays(self, dtype) -> dict:
        """Queries, keys, values, sink logits, and the cotangents of both outputs."""
        (rows, length), slots = self.queries.positions.shape, self.keys.positions.shape[1]
        shapes = {
            "q": (rows, length, self.heads, self.width),
            "k": (rows, slots, self.kv_heads, self.width),
            "v": (rows, slots, self.kv_heads, self.value_width),
            "out": (rows, length, self.heads, self.value_width),
            "lse": (rows, length, self.heads),
        }
        keys = jax.random.split(jax.random.key(0), len(shapes))
        drawn = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
        drawn |= {name: drawn[name].astype(dtype) for name in ("q", "k", "v")}
        if self.sinks:
            drawn["sinks"] = jnp.linspace(-1.0, 2.0, self.heads)
        return drawn


PACKED = documents((20, 13, 9), (5,), (), width=45)
CACHE = documents((20, 13, 9), (44,), (), width=50, shuffle=1)
LATE = Context(positions=PACKED.positions + 1, segments=PACKED.segments)
PROBLEMS = {
    "heads": Problem(PACKED, PACKED, heads=6, kv_heads=2, width=8, value_width=24),
    "window": Problem(PACKED, PACKED, kv_heads=2, window=4, rule=Rule(sinks=3), softcap=1.5),
    "stride": Problem(PACKED, PACKED, rule=Rule(stride=5), slopes=True),
    "columns": Problem(PACKED, PACKED, window=3, rule=Rule(block=8, columns=2), slopes=True, softcap=2.0),
    "prefix": Problem(PACKED, PACKED, prefix=11, sinks=True),
    "cache": Problem(LATE, CACHE, window=12, slopes=True, sinks=True),
}
"""Lengths cross the tiles of 16 that tests choose, and end between them; one row is all padding."""


def values_and_gradients(attend, problem: Problem, dtype, **options) -> dict[str, np.ndarray]:
    """Both outputs and the gradients of q, k, v and the sinks, in float64."""

    def loss(trained, arrays):
        out, lse = attend(
            trained["q"], trained["k"], trained["v"], problem.mask, problem.terms(trained.get("sinks")), **options
        )
        # A query that sees nothing has a huge negative number there.
        seen = jnp.where(lse > -1e29, lse, 0.0)
        total = jnp.sum(out.astype(lse.dtype) * arrays["out"]) + jnp.sum(seen * arrays["lse"])
        return total, {"out": out, "lse": lse}

    def run(arrays):
        trained = {name: arrays[name] for name in ("q", "k", "v", "sinks") if name in arrays}
        gradients, values = jax.grad(loss, has_aux=True)(trained, arrays)
        return values | {f"d {name}": value for name, value in gradients.items()}

    arrays = problem.arrays(dtype)
    if attend is reference.attend:
        with jax.enable_x64(True):
            wide = {name: jnp.asarray(np.asarray(value, np.float64)) for name, value in arrays.items()}
            return {name: np.asarray(value) for name, value in jax.jit(run)(wide).items()}
    return {name: np.asarray(value, np.float64) for name, value in jax.jit(run)(arrays).items()}


def check(attend, problem: Problem, dtype, tolerance: float, **options) -> None:
    """Values and gradients against the reference in float64, relative to the largest entry of each."""
    expected = values_and_gradients(reference.attend, problem, dtype)
    for name, value in values_and_gradients(attend, problem, dtype, **options).items():
        assert np.isfinite(value).all(), name
        seen = expected[name] > -1e29
        np.testing.assert_array_equal(value > -1e29, seen, err_msg=name)
        bound = tolerance * max(1.0, np.abs(expected[name][seen]).max())
        np.testing.assert_allclose(value[seen], expected[name][seen], rtol=0, atol=bound, err_msg=name)
