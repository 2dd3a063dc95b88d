"""The mixers that the checks go through: at least one of each kind, and of each state that it can keep."""

from __future__ import annotations

from rlhf_jax.checks.mixers import Sample
from rlhf_jax.models.mixers import FLASH, GAU, Attention, Fixed, Parallel, Rotary, SoftmaxPlus, Strided, Toeplitz
from rlhf_jax.models.positions import ALiBi, DynamicNTK, Learned, RoPE, Sinusoidal
from rlhf_jax.ops.gau import Laplace

SAMPLES: dict[str, Sample] = {
    "grouped heads": Sample((Attention(4, 2),)),
    "window": Sample((Attention(4, 1, window=3),), RoPE(interleaved=True)),
    "window and sinks": Sample((Attention(4, 2, window=4, sinks=2),)),
    "sink logits, cap, norms": Sample(
        (Attention(2, window=5, sink_logits=True, softcap=2.0, qk_norm=True),), Learned(0.3)
    ),
    "dense and banded": Sample((Attention(4), Attention(4, window=4)), Sinusoidal(amplitude=1.0)),
    "ALiBi": Sample((Attention(4, 2),), ALiBi()),
    "dynamic NTK": Sample((Attention(2),), RoPE(scaling=DynamicNTK(5))),
    "strided": Sample((Strided(4, stride=3, kv_heads=2),)),
    "fixed": Sample((Fixed(4, block=4, columns=1),)),
    "strided beside window": Sample((Parallel((Strided(2, stride=3), Attention(2, window=3))),)),
    "GAU": Sample((GAU(key_dim=8),)),
    "GAU, laplace, window": Sample((GAU(key_dim=8, score=Laplace(), bias=Toeplitz(6), window=4),)),
    "GAU, softmax": Sample((GAU(key_dim=8, score=SoftmaxPlus(), bias=Rotary()),)),
    "FLASH": Sample((FLASH(key_dim=8, chunk=4),)),
    "FLASH, laplace, bias": Sample((FLASH(key_dim=8, chunk=5, score=Laplace(), bias=Rotary()),)),
}  # fmt: skip
