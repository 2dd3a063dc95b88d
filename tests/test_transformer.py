"""The laws of the decoder, each over its variants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import (
    MLP,
    Attention,
    Block,
    LayerNorm,
    Learned,
    RMSNorm,
    RoPE,
    Sinusoidal,
    SwiGLU,
    Transformer,
    abstract_params,
    boxed_abstract_params,
    count_params,
    empty_cache,
    init_params,
)
from rlhf_jax.types import Context

VOCAB, WIDTH, LENGTH = 17, 16, 12


def small(mixer: Attention, *, ffn=SwiGLU(24), repeats=2, **fields) -> Transformer:
    """Weights large enough that every path matters."""
    settings = {"max_length": 32, "init_std": 0.3, "scale_residual_init": False} | fields
    return Transformer(VOCAB, WIDTH, (Block(mixer, ffn),), repeats, **settings)


VARIANTS = {
    "modern": small(Attention(4, 2)),
    "gpt2": small(
        Attention(4, qkv_bias=True, out_bias=True),
        ffn=MLP(32, bias=True),
        position=Learned(0.3),
        norm=LayerNorm(),
    ),
    "gpt1": small(
        Attention(4, qkv_bias=True, out_bias=True),
        ffn=MLP(32, activation="gelu", bias=True),
        position=Learned(0.3),
        norm=LayerNorm(),
        prenorm=False,
        final_norm=False,
    ),
    "mqa-window": small(Attention(4, 1, window=3), position=RoPE(interleaved=True), tie_embeddings=False),
    "caps-qknorm": small(
        Attention(2, head_dim=6, softcap=2.0, qk_norm=True),
        position=Sinusoidal(amplitude=1.0),
        logit_softcap=3.0,
        ffn=MLP(32, activation="relu"),
    ),
    "no-position-no-ffn": small(Attention(4), position=None, ffn=None),
    "pattern": Transformer(
        VOCAB,
        WIDTH,
        (Block(Attention(4, 2), SwiGLU(24)), Block(Attention(2, window=4), MLP(24, bias=True))),
        2,
        max_length=32,
        init_std=0.3,
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A model, its parameters (every bias and scale moved off its start) and its compiled forward pass."""
    model = VARIANTS[request.param]
    params = init_params(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    apply = jax.jit(lambda params, tokens, context, cache=None: model.apply({"params": params}, tokens, context, cache))
    return model, jax.tree.unflatten(tree, noise), apply


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (3, LENGTH), 0, VOCAB)


LENGTHS = jnp.array([12, 7, 4])


def part(context: Context, start: int, stop: int) -> Context:
    return Context(context.positions[:, start:stop], context.segments[:, start:stop])


@pytest.mark.parametrize("split", [1, 5, 11])
def test_prefill_and_decode_equal_one_full_pass(variant, tokens, split):
    model, params, apply = variant
    context = Context.of_lengths(LENGTHS, LENGTH)
    full, _, _ = apply(params, tokens, context)
    cache = empty_cache(model, 3, 16)
    first, cache, _ = apply(params, tokens[:, :split], part(context, 0, split), cache)
    pieces = [first]
    for at in range(split, LENGTH):
        logits, cache, _ = apply(params, tokens[:, at : at + 1], part(context, at, at + 1), cache)
        pieces.append(logits)
    seen = np.asarray(context.segments) > 0
    np.testing.assert_allclose(np.concatenate(pieces, 1)[seen], np.asarray(full)[seen], atol=2e-5)
    assert int(cache.next_slot) == LENGTH
