"""Softmax attention: the mask as a value, and several implementations of the same mathematics."""

from rlhf_jax.ops.attention.decode import decode_attention
from rlhf_jax.ops.attention.dispatch import (
    IMPLEMENTATIONS,
    attention,
    check_implementation,
    choose,
    merge,
    partial_attention,
)
from rlhf_jax.ops.attention.masks import Mask, Rule, alibi_slopes
from rlhf_jax.ops.attention.partitioned import check_across
from rlhf_jax.ops.attention.terms import Case, Terms

__all__ = [
    "IMPLEMENTATIONS",
    "Case",
    "Mask",
    "Rule",
    "Terms",
    "alibi_slopes",
    "attention",
    "check_across",
    "check_implementation",
    "choose",
    "decode_attention",
    "merge",
    "partial_attention",
]
