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

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

H200, TPU = "h200", "tpu"


@dataclass(frozen=True)
class Kernel:
    """One program to compile, which may hold several kernels (a forward and two of a backward, say).

    Args:
        name: how the table calls it: implementation, pass, head width, what is special.
        target: ``H200`` or ``TPU``.
        build: the function and its arguments as ``jax.ShapeDtypeStruct`` (any pytrees), made when it is compiled.
        mesh: sizes of mesh axes (``ops.meshes.AXES``) to compile it for, its arguments cut along rows and tokens; none
            for one device.
    """

    name: str
    target: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    mesh: tuple[tuple[str, int], ...] = ()


def gated(target: str) -> tuple[Kernel, ...]:
    """Gated attention, quadratic and chunked, forward and backward."""
    device = {H200: "hopper", TPU: "tpu"}[target]
    rows, length, width = 2, 2048, 128

    def shape(*sizes, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def quadratic(values: int, score_name: str):
        def build():
            from rlhf_jax.ops import gau_terms
            from rlhf_jax.ops.attention import Mask
            from rlhf_jax.ops.kernels import hopper_gau, tpu_gau
            from rlhf_jax.types import Context

            kernels, score = {H200: hopper_gau, TPU: tpu_gau}[target], getattr(gau_terms, score_name)()

            def both(q, k, v, context, divisor, cotangent):
                mask = Mask.ranges(context, context)

                def attended(q, k, v):
                    return kernels.attend(q, k, v, mask, divisor, None, score=score, scale=0.1)

                out, pull_back = jax.vjp(attended, q, k, v)
                return out, pull_back(cotangent)

            context = Context(shape(rows, length, dtype=jnp.int32), shape(rows, length, dtype=jnp.int32))
            narrow, wide = shape(rows, length, width), shape(rows, length, values)
            return both, (narrow, narrow, wide, context, shape(rows, length, dtype=jnp.float32), wide)

        return build

    def chunked(values: int, chunk: int, packed: bool):
        def build():
            from rlhf_jax.ops.gau_terms import Relu2
            from rlhf_jax.ops.kernels import hopper_flash, tpu_flash
            from rlhf_jax.types import Context

            kernels = {H200: hopper_flash, TPU: tpu_flash}[target]
            settings = {"chunk": chunk, "score": Relu2(), "scale": 0.1}

            def of_packed(tokens, context, divisor, cotangent):
                out, pull_back = jax.vjp(lambda *x: kernels.packed(*x, context, divisor, None, **settings), *tokens)
                return out, pull_back(cotangent)

            def of_whole(tokens, lengths, divisor, state, cotangents):
                def attended(*arguments):
                    return kernels.chunks(*arguments[:5], lengths, divisor, None, arguments[5], **settings)

                out, pull_back = jax.vjp(attended, *tokens, state)
                return out, pull_back(cotangents)

            wide, divisor = shape(rows, length, values), shape(rows, length, dtype=jnp.float32)
            tokens = (*(shape(rows, length, width),) * 4, wide)
            if packed:
                context = Context(shape(rows, length, dtype=jnp.int32), shape(rows, length, dtype=jnp.int32))
                return of_packed, (tokens, context, divisor, wide)
            state = shape(rows, width, values, dtype=jnp.float32)
            return of_whole, (tokens, shape(rows, dtype=jnp.int32), divisor, state, (wide, state))

        return build

    return (
        Kernel(f"{device} gau relu2 E=2048", target, quadratic(2048, "Relu2")),
        Kernel(f"{device} gau laplace E=2048", target, quadratic(2048, "Laplace")),
        Kernel(f"{device} gau relu2 E=384", target, quadratic(384, "Relu2")),
        Kernel(f"{device} flash C=256 E=2048", target, chunked(2048, 256, packed=False)),
        Kernel(f"{device} flash C=128 E=384 packed", target, chunked(384, 128, packed=True)),
    )


def portable(module: str, target: str, dtypes: tuple[Any, ...]) -> tuple[Kernel, ...]:
    """Softmax attention by the kernels of a module, forward and backward, plain and with everything at once."""

    def attention(width: int, dtype: Any, everything: bool):
        def build():
            from rlhf_jax.ops.attention import Mask, Rule, Terms
            from rlhf_jax.types import Context

            attend = importlib.import_module(f"rlhf_jax.ops.kernels.{module}").attend
            settings = {"window": 300, "rule": Rule(sinks=4)} if everything else {}

            def both(q, k, v, context, by_head, cotangent):
                extra = {"softcap": 30.0, "slopes": by_head, "sink_logits": by_head} if everything else {}
                mask, terms = Mask.ranges(context, context, **settings), Terms(scale=0.1, **extra)
                (out, lse), pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, terms), q, k, v)
                return out, lse, pull_back((cotangent, lse))

            rows, length, heads, kv_heads = 2, 2000, 8, 2
            numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
            q, k = (jax.ShapeDtypeStruct((rows, length, n, width), dtype) for n in (heads, kv_heads))
            return both, (q, k, k, Context(numbers, numbers), jax.ShapeDtypeStruct((heads,), jnp.float32), q)

        return build

    def name(width: int, dtype: Any, everything: bool) -> str:
        return f"{module} D={width} {jnp.dtype(dtype).name}{' everything' if everything else ''}"

    wanted = [(width, dtype, False) for width in (64, 128, 256) for dtype in dtypes] + [(128, dtypes[0], True)]
    return tuple(Kernel(name(*each), target, attention(*each)) for each in wanted)


def decoding(module: str, target: str, widths: tuple[int, ...]) -> tuple[Kernel, ...]:
    """One step of decoding over a cache."""

    def step(width: int, slots: int, everything: bool):
        def build():
            from rlhf_jax.ops.attention import Mask, Rule, Terms
            from rlhf_jax.types import Context

            attend = importlib.import_module(f"rlhf_jax.ops.kernels.{module}").attend
            settings = {"window": 300, "rule": Rule(sinks=4)} if everything else {}

            def decode(q, keys, values, queries, slots, by_head):
                extra = {"softcap": 30.0, "slopes": by_head, "sink_logits": by_head} if everything else {}
                return attend(q, keys, values, Mask.ranges(queries, slots, **settings), Terms(scale=0.1, **extra))

            rows, heads, kv_heads = 8, 32, 8
            one, all_slots = (jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (1, slots))
            q = jax.ShapeDtypeStruct((rows, heads, width), jnp.bfloat16)
            cache = jax.ShapeDtypeStruct((rows, kv_heads, slots, width), jnp.bfloat16)
            by_head = jax.ShapeDtypeStruct((heads,), jnp.float32)
            return decode, (q, cache, cache, Context(one, one), Context(all_slots, all_slots), by_head)

        return build

    wanted = [(width, 8192, False) for width in widths] + [(128, 5000, True), (64, 40, False)]
    return tuple(
        Kernel(
            f"{module} D={width} S={slots}{' everything' if everything else ''}", target, step(width, slots, everything)
        )
        for width, slots, everything in wanted
    )


def grouped(target: str) -> tuple[Kernel, ...]:
    """Rows sorted by expert times the expert's matrix, either way round, and the matrices' gradient."""
    module = {H200: "hopper_grouped", TPU: "tpu_grouped"}[target]

    def forward_and_backward(rows: int, depth: int, width: int, experts: int):
        def build():
            kernels = importlib.import_module(f"rlhf_jax.ops.kernels.{module}")

            def both(x, w, sizes, cotangent):
                out = kernels.grouped_matmul(x, w, sizes)
                dx = kernels.grouped_matmul(cotangent, w, sizes, transpose_w=True)
                return out, dx, kernels.grouped_outer(x, cotangent, sizes)

            def shape(*sizes, dtype=jnp.bfloat16) -> Any:
                return jax.ShapeDtypeStruct(sizes, dtype)

            numbers = shape(experts, dtype=jnp.int32)
            return both, (shape(rows, depth), shape(experts, depth, width), numbers, shape(rows, width))

        return build

    wanted = [(1 << 14, 4096, 14336, 8), (1 << 14, 2048, 768, 128), (100, 128, 384, 8)]
    return tuple(
        Kernel(f"{module} M={rows} K={k} N={n} E={experts}", target, forward_and_backward(rows, k, n, experts))
        for rows, k, n, experts in wanted
    )


def on_meshes(implementation: str, target: str, *meshes: dict[str, int]) -> tuple[Kernel, ...]:
    """Softmax attention of packed rows on several devices, forward and backward, keys gathered and in a ring."""

    def spread(across: str):
        def build():
            from rlhf_jax.ops.attention import Mask, attention
            from rlhf_jax.types import Context

            settings = {"scale": 0.1, "implementation": implementation, "across": across}

            def both(q, k, v, context, cotangent):
                mask = Mask.ranges(context, context)
                out, pull_back = jax.vjp(lambda q, k, v: attention(q, k, v, mask, **settings), q, k, v)
                return out, pull_back(cotangent)

            rows, length, heads, kv_heads, width = 8, 4096, 8, 2, 128
            numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
            q, k = (jax.ShapeDtypeStruct((rows, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
            return both, (q, k, k, Context(numbers, numbers), q)

        return build

    def name(mesh: dict[str, int], across: str) -> str:
        way = f" {across}" if "context" in mesh else ""
        return f"{implementation} on {' x '.join(f'{axis}={size}' for axis, size in mesh.items())}{way}"

    wanted = [(mesh, across) for mesh in meshes for across in (("gather", "ring") if "context" in mesh else ("auto",))]
    return tuple(Kernel(name(*each), target, spread(each[1]), tuple(each[0].items())) for each in wanted)


CASES: tuple[Kernel, ...] = (
    *gated(H200),
    *gated(TPU),
    *portable("hopper_attention", H200, (jnp.bfloat16, jnp.float16)),
    *portable("triton_attention", H200, (jnp.bfloat16, jnp.float32)),
    *portable("tpu_attention", TPU, (jnp.bfloat16, jnp.float32)),
    *decoding("hopper_decode", H200, (64, 128)),
    *decoding("decode_triton", H200, (64, 128, 256)),
    *decoding("decode_tpu", TPU, (64, 128, 256)),
    *grouped(H200),
    *grouped(TPU),
    *on_meshes("hopper", H200, {"fsdp": 2, "tensor": 4}, {"context": 4, "tensor": 2}),
    *on_meshes("tpu", TPU, {"fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2}),
)
