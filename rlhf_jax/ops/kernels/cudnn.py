"""Attention by cuDNN, through ``jax.nn.dot_product_attention``, in the cases where it is known to be right.

Those are causal rows of one document each, whole or through a window, in bfloat16 or float16. What this way to cuDNN
computes from a dense mask or bias, rounds (its log-sum-exp comes back in the operands' type) or has computed silently
wrong (backward over more than 2^31 entries, packed rows with grouped heads before JAX 0.11.1) is refused.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention.masks import Mask, Rule
from rlhf_jax.ops.attention.terms import Case, Terms
from rlhf_jax.ops.kernels import tiles

LARGEST = (1 << 31) - 1
"""Entries of the queries up to which the gradient is right."""


def refusal(case: Case) -> str | None:
    """Why cuDNN cannot serve, or None."""
    if case.platform != "gpu":
        return f"it runs on NVIDIA GPUs, and JAX runs on {case.platform!r}"
    capability = tiles.compute_capability()
    if capability is None or capability < 8.0:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, and this is {case.device!r}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {case.dtype}"
    return _refused_mask(case) or _refused_terms(case) or _refused_shape(case, 256 if capability >= 9.0 else 128)


def _refused_mask(case: Case) -> str | None:
    if not case.aligned:
        return (
            "it is served rows of one document each, whose keys are the queries' own tokens, not packed rows or caches"
        )
    if not case.causal:
        return "it is served causal masks, and this one shows later tokens"
    if case.rule != Rule():
        return f"it knows windows and no other sparse patterns, got {case.rule}"
    return None


def _refused_terms(case: Case) -> str | None:
    for name, used in (("soft-caps", case.softcap), ("sink logits", case.sink_logits)):
        if used:
            return f"it has no {name}"
    if case.slopes:
        return "it would read ALiBi from a dense bias"
    if case.lse:
        return f"it returns the log-sum-exp rounded to {case.dtype} and without a gradient"
    return None


def _refused_shape(case: Case, widest: int) -> str | None:
    if case.width != case.value_width:
        return f"keys and values have one width, got {case.width} and {case.value_width}"
    if case.width > widest or case.width % 8:
        return f"heads are multiples of 8 up to {widest} wide on {case.device!r}, got {case.width}"
    entries = case.rows * case.length * case.heads * case.width
    if entries > LARGEST:
        return f"its gradient is wrong beyond {LARGEST} entries, and these queries have {entries}"
    return None


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """The output; the log-sum-exp is not computed, and NaN says so.

    Args:
        q: queries.
        k: keys; ``H`` is a multiple of ``K``.
        v: values.
        mask: aligned and causal, with or without a window.
        terms: the scale alone.
        interpret: take the same function's ordinary operations instead of cuDNN, on any device.
    """
    length = q.shape[1]
    # Its gradient refuses odd lengths.
    q, k, v = (tiles.padded(x, 1, 2) for x in (q, k, v))
    real = mask.query_segments != 0
    # A row of padding alone is given one token, whose output is then dropped.
    lengths = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q, k, v,
        scale=terms.scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        # A window counts the own token; this function counts the tokens before it.
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="xla" if interpret else "cudnn",
    )  # fmt: skip
    out = jnp.where(real[:, :, None, None], out[:, :length], 0)
    return out, jnp.full(out.shape[:3], jnp.nan, jnp.float32)
