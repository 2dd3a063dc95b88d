"""The GPT family as published: architectures and initialisation; weights come from ``models.huggingface``.

GPT-2's and GPT-3's papers name no dropout; GPT-1's 0.1 acts everywhere. Change a field with
``gpt2().clone(dtype=jnp.bfloat16)``. GPT-3's layers alternate between dense and banded attention as published;
``banded=False`` makes all of them dense, with the same parameters.
"""

from __future__ import annotations

from rlhf_jax.models.blocks import Block
from rlhf_jax.models.ffn import MLP
from rlhf_jax.models.layers import LayerNorm
from rlhf_jax.models.mixers import Attention
from rlhf_jax.models.positions import Learned
from rlhf_jax.models.transformer import Transformer

GPT3_WINDOW = 256
"""Width of GPT-3's banded layers: our choice, after the Sparse Transformer's strides, as the paper does not give it."""


def gpt1() -> Transformer:
    """Radford et al. 2018: norms after the layers and none at the end, weights and positions from N(0, 0.02²)."""
    attention = Attention(heads=12, qkv_bias=True, out_bias=True, dropout=0.1)
    return Transformer(
        vocab_size=40_478,
        d_model=768,
        pattern=(Block(attention, MLP(4 * 768, bias=True)),),
        repeats=12,
        position=Learned(std=0.02),
        norm=LayerNorm(),
        prenorm=False,
        final_norm=False,
        max_length=512,
        dropout=0.1,
        scale_residual_init=False,
    )


def gpt2() -> Transformer:
    """124,439,808 parameters (Radford et al. 2019)."""
    return _gpt2(layers=12, d_model=768, heads=12)


def gpt2_medium() -> Transformer:
    """354,823,168 parameters."""
    return _gpt2(layers=24, d_model=1024, heads=16)


def gpt2_large() -> Transformer:
    """774,030,080 parameters."""
    return _gpt2(layers=36, d_model=1280, heads=20)


def gpt2_xl() -> Transformer:
    """1,557,611,200 parameters."""
    return _gpt2(layers=48, d_model=1600, heads=25)


def gpt3_small(banded: bool = True) -> Transformer:
    """125.2 million parameters (Brown et al. 2020, table 2.1)."""
    return _gpt3(layers=12, d_model=768, heads=12, banded=banded)


def gpt3_medium(banded: bool = True) -> Transformer:
    """355.9 million parameters."""
    return _gpt3(layers=24, d_model=1024, heads=16, banded=banded)


def gpt3_large(banded: bool = True) -> Transformer:
    """760.3 million parameters."""
    return _gpt3(layers=24, d_model=1536, heads=16, banded=banded)


def gpt3_xl(banded: bool = True) -> Transformer:
    """1,315.7 million parameters, with 16 heads of 128: the table's 24 heads would give 1,517 million, not 1.3."""
    return _gpt3(layers=24, d_model=2048, heads=16, banded=banded)


def gpt3_2_7b(banded: bool = True) -> Transformer:
    """2,651.6 million parameters."""
    return _gpt3(layers=32, d_model=2560, heads=32, banded=banded)


def gpt3_6_7b(banded: bool = True) -> Transformer:
    """6,658 million parameters."""
    return _gpt3(layers=32, d_model=4096, heads=32, banded=banded)


def gpt3_13b(banded: bool = True) -> Transformer:
    """12,853 million parameters, 5120 wide: the table's 5140 is not 40 heads of 128."""
    return _gpt3(layers=40, d_model=5120, heads=40, banded=banded)


def gpt3_175b(banded: bool = True) -> Transformer:
    """174.6 billion parameters."""
    return _gpt3(layers=96, d_model=12_288, heads=96, banded=banded)


def _gpt2(layers: int, d_model: int, heads: int) -> Transformer:
    attention = Attention(heads, qkv_bias=True, out_bias=True)
    return Transformer(
        vocab_size=50_257,
        d_model=d_model,
        pattern=(Block(attention, MLP(4 * d_model, bias=True)),),
        repeats=layers,
        position=Learned(std=0.01),
        norm=LayerNorm(),
        max_length=1024,
    )


def _gpt3(layers: int, d_model: int, heads: int, banded: bool) -> Transformer:
    """GPT-2 with a context of 2048, in which every second layer sees a band only."""
    model = _gpt2(layers, d_model, heads).clone(max_length=2048)
    if not banded:
        return model
    (dense,) = model.pattern
    assert isinstance(dense.mixer, Attention)
    return model.clone(pattern=(dense, dense.clone(mixer=dense.mixer.clone(window=GPT3_WINDOW))), repeats=layers // 2)
