"""Decoder language models as frozen values with pure ``init`` and ``apply``."""

from rlhf_jax.models.blocks import Aux, Block
from rlhf_jax.models.ffn import MLP, GeGLU, SwiGLU
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.models.layers import LayerNorm, RMSNorm
from rlhf_jax.models.mixers import FLASH, GAU, Attention
from rlhf_jax.models.moe import MoE
from rlhf_jax.models.parameters import abstract_params, boxed_abstract_params, count_params, init_params
from rlhf_jax.models.plans import Plan, plan
from rlhf_jax.models.positions import NTK, ALiBi, DynamicNTK, Learned, Linear, Llama3, RoPE, Sinusoidal, YaRN
from rlhf_jax.models.stacks import BELOW, join_lower, split_lower, split_rounds
from rlhf_jax.models.transformer import Transformer, empty_cache

__all__ = [
    "BELOW",
    "FLASH",
    "GAU",
    "MLP",
    "NTK",
    "ALiBi",
    "Attention",
    "Aux",
    "Block",
    "DynamicNTK",
    "GeGLU",
    "LayerNorm",
    "Learned",
    "Linear",
    "Llama3",
    "MoE",
    "Plan",
    "RMSNorm",
    "RoPE",
    "ScalarModel",
    "Sinusoidal",
    "SwiGLU",
    "Transformer",
    "YaRN",
    "abstract_params",
    "boxed_abstract_params",
    "count_params",
    "empty_cache",
    "init_params",
    "plan",
    "join_lower",
    "split_lower",
    "split_rounds",
]
