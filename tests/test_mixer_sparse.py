"""The laws of a decoder over the Sparse Transformer's layers: what they keep, and that it is enough."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax import config
from rlhf_jax.models import (
    MLP,
    Attention,
    Block,
    RoPE,
    Transformer,
    abstract_params,
    boxed_abstract_params,
    empty_cache,
    init_params,
)
from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.mixers import Fixed, Parallel, Strided
from rlhf_jax.models.positions import NTK, ALiBi, DynamicNTK
from rlhf_jax.ops.attention import Mask, Rule
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.scoring import response_logprobs
from rlhf_jax.types import Context, PromptBatch

VOCAB, WIDTH, LENGTH = 17, 16, 23


def quick(function):
    """Compile with little optimisation: these programs run a few times, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def small(*mixers, repeats=1, **fields):
    """A model whose weights are large enough that every path matters."""
    settings = {"max_length": 64, "init_std": 0.3, "scale_residual_init": False} | fields
    return Transformer(VOCAB, WIDTH, tuple(Block(mixer, MLP(24)) for mixer in mixers), repeats, **settings)


VARIANTS = {
    "strided": small(Strided(4, stride=4, kv_heads=2)),
    "fixed": small(Fixed(4, block=4, columns=2, kv_heads=1)),
    "alibi": small(Strided(4, stride=5, qk_norm=True), Fixed(4, block=5, columns=5, qk_norm=True), position=ALiBi()),
    "longer-than-rows": small(Strided(4, stride=30), Fixed(4, block=30, columns=3)),
    "parallel": small(Parallel((Attention(2, head_dim=4, window=3), Strided(1, 3, head_dim=4), Fixed(1, 3, 1, 1, 4)))),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    model = VARIANTS[request.param]
    return model, init_params(model, jax.random.key(0)), quick(functools.partial(call, model))


def call(model, params, tokens, context, cache=None):
    return model.apply({"params": params}, tokens, context, cache)[:2]


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (3, LENGTH), 0, VOCAB)


def piece(context, start, stop):
    return Context(context.positions[:, start:stop], context.segments[:, start:stop])


def whole(lengths):
    return Context.of_lengths(jnp.array(lengths), LENGTH)


@pytest.mark.parametrize("splits", [(1,), (4, 8), (5, 19)], ids=str)
def test_pieces_and_decoding_give_what_a_full_pass_gives(variant, tokens, splits):
    """A prompt in one or several pieces, then token by token; the ends of pieces cross blocks and windows."""
    model, params, apply = variant
    context = whole([LENGTH] * 3)
    wanted, _ = apply(params, tokens, context)
    cache, found, start = empty_cache(model, 3, LENGTH), [], 0
    for stop in (*splits, *range(splits[-1] + 1, LENGTH + 1)):
        logits, cache = apply(params, tokens[:, start:stop], piece(context, start, stop), cache)
        found.append(logits)
        start = stop
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), wanted, rtol=2e-4, atol=2e-4)


def test_ragged_prompts_in_two_pieces_decode_exactly(variant, tokens):
    """Rows of 12, 7 and 2 tokens, the last of which has no token in the second piece; each goes on from its own end."""
    model, params, apply = variant
    lengths, width, more = jnp.array([12, 7, 2]), 12, 8
    wanted, _ = apply(params, tokens, whole([LENGTH] * 3))
    prompt, cache = Context.of_lengths(lengths, width), empty_cache(model, 3, width + more)
    padded = jnp.where(prompt.segments != 0, tokens[:, :width], 5)
    _, cache = apply(params, padded[:, :5], piece(prompt, 0, 5), cache)
    _, cache = apply(params, padded[:, 5:], piece(prompt, 5, width), cache)
    for step in range(more):
        place = (lengths + step)[:, None]
        context = Context(place.astype(jnp.int32), jnp.ones_like(place, jnp.int32))
        logits, cache = apply(params, jnp.take_along_axis(tokens, place, axis=1), context, cache)
        right = jnp.take_along_axis(wanted, place[..., None], axis=1)
        np.testing.assert_allclose(logits, right, rtol=2e-4, atol=2e-4)


def test_a_full_pass_does_not_look_ahead(variant, tokens):
    _, params, apply = variant
    context = whole([LENGTH, 20, 11])
    before, _ = apply(params, tokens, context)
    for t in (4, 9, 12):
        after, _ = apply(params, tokens.at[:, t:].add(1) % VOCAB, context)
        assert jnp.array_equal(after[:, :t], before[:, :t])
        assert not jnp.array_equal(after[:, t:], before[:, t:])


def test_packed_documents_are_as_alone(variant, tokens):
    """Documents of 7, 1, 9 and 3 tokens in one row, and padding behind."""
    _, params, apply = variant
    lengths = (7, 1, 9, 3)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])
    segments = np.repeat([1, 2, 3, 4, 0], (*lengths, 3))
    context = Context(jnp.array(positions[None], jnp.int32), jnp.array(segments[None], jnp.int32))
    together, _ = apply(params, tokens[:1], context)
    starts = np.cumsum((0, *lengths[:-1]))
    alone = np.zeros((len(lengths), LENGTH), np.int32)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        alone[row, :length] = tokens[0, start : start + length]
    apart, _ = apply(params, jnp.array(alone), Context.of_lengths(jnp.array(lengths), LENGTH))
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        np.testing.assert_allclose(together[0, start : start + length], apart[row, :length], rtol=2e-4, atol=2e-4)


def test_sampler_and_scorer_agree(variant):
    """The sampler enlarges the cache of the prompts and repeats its rows; the scorer reads whole rows."""
    model, params, _ = variant
    if model in (VARIANTS["strided"], VARIANTS["fixed"]):
        pytest.skip("the same layers are in the longer patterns")
    prompts = PromptBatch(
        tokens=jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0]]), lengths=jnp.array([6, 3]), index=jnp.arange(2)
    )
    sampling = Sampling(max_new_tokens=11, samples_per_prompt=2)
    rollout = sample(model, params, prompts, sampling, jax.random.key(0), eos_id=0, pad_id=0)
    scored, _ = quick(lambda params, rollout: response_logprobs(model, params, rollout, sampling))(params, rollout)
    difference = jnp.where(rollout.response_mask, scored - rollout.logprobs, 0.0)
    assert jnp.abs(difference).max() < 1e-4 and rollout.response_mask.sum() > 20


@pytest.mark.parametrize("mixer", [Strided(4, 3, 2), Fixed(4, 8, 2, 2)], ids=["strided", "fixed"])
def test_a_layer_is_attention_under_another_mask(mixer, monkeypatch):
    """``Attention`` with the same parameters, whose mask is given the rule of the pattern."""
    context, x = whole([LENGTH, 20, 11]), jax.random.normal(jax.random.key(3), (3, LENGTH, WIDTH))
    shared = Shared(context, context, style=Style(position=RoPE(), init_std=0.5, residual_std=0.5))
    params = nn.unbox(mixer.init(jax.random.key(4), x, shared))
    found, _ = mixer.apply(params, x, shared)
    plain = Mask.ranges.__func__

    def ruled(cls, queries, keys, **ignored):
        if isinstance(mixer, Strided):
            return plain(cls, queries, keys, rule=Rule(stride=mixer.stride))
        mask = plain(cls, queries, keys, rule=Rule(block=mixer.block, columns=mixer.columns))
        return mask.replace(start=queries.positions // mixer.block * mixer.block)

    monkeypatch.setattr(Mask, "ranges", classmethod(ruled))
    wanted, _ = Attention(4, 2, implementation="reference").apply(params, x, shared)
    real = (context.segments != 0)[..., None]
    np.testing.assert_allclose(found * real, wanted * real, rtol=1e-4, atol=1e-4)


def kept_tokens(mixer, slots):
    state = mixer.empty_cache(1, slots, WIDTH, jnp.float32)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
    return numbers // (2 * WIDTH)


def test_caches_keep_what_can_still_be_seen():
    assert [kept_tokens(Strided(4, 8), slots) for slots in (5, 8, 60, 64)] == [5, 8, 64, 64]
    fixed = Fixed(4, block=8, columns=2)
    assert [kept_tokens(fixed, slots) for slots in (5, 6, 7, 8, 14, 15, 16, 80)] == [5, 6, 10, 10, 10, 12, 12, 28]


def test_decoding_reads_a_part_of_the_strided_cache():
    """The arrays that one step computes with are those of one residue class."""
    slots = 64

    def operations(mixer):
        model = small(mixer)
        params, cache = abstract_params(model), jax.eval_shape(lambda: empty_cache(model, 1, slots))
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        compiled = jax.jit(functools.partial(call, model)).lower(params, one, Context(one, one), cache).compile()
        return compiled.cost_analysis()["flops"]

    base = operations(Attention(4, window=1, implementation="reference"))
    strided = operations(Strided(4, stride=8, implementation="reference")) - base
    full = operations(Attention(4, implementation="reference")) - base
    assert strided < full / 3


@pytest.mark.parametrize("mixer", [Strided(4, 4, 2), Fixed(4, 4, 2, 2), Parallel((Strided(4, 4, 2), Fixed(4, 4, 2)))])
def test_every_parameter_has_axes_and_the_values_read_back(mixer):
    model = small(mixer)
    for leaf in jax.tree.leaves(boxed_abstract_params(model), is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim
    assert config.revive(config.describe(model)) == model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Strided(4, 0), "stride must be at least 1"),
        (lambda: Strided(0, 4), "at least one head"),
        (lambda: Strided(4, 4, 3), "4 query heads are not a multiple of 3"),
        (lambda: Fixed(4, 0, 1), "block must be at least 1"),
        (lambda: Fixed(4, 8, 9), "columns must be between 1 and block 8, got 9"),
        (lambda: Fixed(4, 8, 0), "columns must be between 1 and block 8, got 0"),
        (lambda: Fixed(4, 8, 1, implementation="fast"), "unknown attention implementation 'fast'"),
        (lambda: Parallel(()), "at least one"),
        (lambda: small(Strided(3, 4)), "d_model 16 is not a multiple of 3 heads"),
        (lambda: small(Parallel((Fixed(5, 4, 1),))), "d_model 16 is not a multiple of 5 heads"),
        (lambda: small(Fixed(16, 4, 1), position=RoPE()), "cannot be paired"),
        (lambda: small(Parallel((Strided(4, 4),)), position=RoPE(scaling=DynamicNTK(8))), "Strided does not"),
        (lambda: small(Strided(8, 4), position=RoPE(scaling=NTK(2.0))), "at least 4 dimensions"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()
