"""Which implementation each layer of a model gets on a device, before anything runs."""

from __future__ import annotations

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.ops.attention.terms import this_device

Plan = dict[str, dict[str, str]]
"""By layer of the pattern, and by use: "training", "prefill" or "decode"."""


def plan(
    model: Transformer, rows: int, length: int, *, packed: bool = False, device: tuple[str, str] | None = None
) -> Plan:
    """What each layer of the pattern will be computed by; layers whose mixer has no choice are left out.

    Args:
        model: the model.
        rows: of a batch.
        length: of a row, and slots of the cache.
        packed: whether rows may hold several documents in training.
        device: platform and name; None for the one that JAX runs on by default.

    Raises:
        ValueError: a named implementation cannot serve.
    """
    platform, name = this_device() if device is None else device
    return {
        f"{at} {type(block.mixer).__name__}": block.mixer.plan(
            rows, length, model.d_model, model.style, platform, name, packed=packed
        )
        for at, block in enumerate(model.pattern)
        if hasattr(block.mixer, "plan")
    }
