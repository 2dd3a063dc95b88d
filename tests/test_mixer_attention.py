"""The laws of softmax attention over its windows, sinks and positions, each against the forward pass in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from transformer_in_numpy import in_numpy

from rlhf_jax.models import (
    NTK,
    ALiBi,
    Attention,
    Block,
    DynamicNTK,
    Linear,
    RoPE,
    Sinusoidal,
    Transformer,
    YaRN,
    abstract_params,
    boxed_abstract_params,
    empty_cache,
    init_params,
    plan,
)
from rlhf_jax.models.mixers import attention as mixer_module
from rlhf_jax.ops.attention import decode, dispatch
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.scoring import response_logprobs
from rlhf_jax.types import Context, PromptBatch

VOCAB, WIDTH, LENGTH = 17, 16, 24
LENGTHS = jnp.array([24, 17, 3])


def model_of(mixer: Attention, position, repeats: int = 1, **fields) -> Transformer:
    """Layers that matter: a row of them, without a feed-forward."""
    settings = {"max_length": 64, "init_std": 0.4, "scale_residual_init": False} | fields
    return Transformer(VOCAB, WIDTH, (Block(mixer),), repeats, position=position, **settings)


VARIANTS = {
    "ring": model_of(Attention(4, 2, window=5), RoPE(), repeats=2),
    "sinks": model_of(Attention(4, 1, window=4, sinks=3), RoPE(interleaved=True)),
    "window-of-one": model_of(Attention(2, window=1, sinks=1, sink_logits=True), None),
    "wide-window": model_of(Attention(4, window=40, sinks=4), RoPE(scaling=Linear(2.0))),
    "alibi": model_of(Attention(4, 2, sink_logits=True), ALiBi()),
    "alibi-ring": model_of(Attention(4, 2, window=4, sinks=1, softcap=2.0, qk_norm=True), ALiBi()),
    "dynamic": model_of(Attention(4, 2, qkv_bias=True, out_bias=True), RoPE(scaling=DynamicNTK(7)), repeats=2),
    "dynamic-ring": model_of(Attention(2, window=5, sinks=2, sink_logits=True), RoPE(100.0, True, DynamicNTK(7, 2.0))),
    "yarn": model_of(Attention(4, 2), RoPE(100.0, scaling=YaRN(4.0, 8, fast=1.0, slow=0.1))),
}


def quick(function):
    """Compile with little optimisation: these programs run a few times, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def call(model: Transformer):
    return lambda params, tokens, context, cache=None: model.apply({"params": params}, tokens, context, cache)[:2]


def draw_params(model: Transformer):
    """All weights at random: biases and sink logits too; scales around 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(("scale" in str(path[-1])) + 0.4 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    model = VARIANTS[request.param]
    return model, draw_params(model), quick(call(model))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (3, LENGTH), 0, VOCAB)


WHOLE = Context.of_lengths(jnp.full(3, LENGTH), LENGTH)


def part(context: Context, start: int, stop: int) -> Context:
    return Context(context.positions[:, start:stop], context.segments[:, start:stop])


def test_logits_equal_a_forward_pass_in_numpy(variant, tokens):
    model, params, apply = variant
    logits, _ = apply(params, tokens, WHOLE)
    np.testing.assert_allclose(logits[1], in_numpy(model, params, np.asarray(tokens[1])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 1, 1, 1, 8, 1, 1, 1, 1, 1), (1,) * LENGTH], ids=str)
def test_prefill_and_decode_equal_one_full_pass(variant, tokens, widths):
    """Ragged rows, in chunks that cross windows and in single tokens; rings of 4 and 5 wrap up to six times."""
    model, params, apply = variant
    context = Context.of_lengths(LENGTHS, LENGTH)
    full, _ = apply(params, tokens, context)
    cache, pieces, at = empty_cache(model, 3, LENGTH + 6), [], 0
    for width in widths:
        logits, cache = apply(params, tokens[:, at : at + width], part(context, at, at + width), cache)
        pieces.append(logits)
        at += width
    seen = np.asarray(context.segments) > 0
    np.testing.assert_allclose(np.concatenate(pieces, 1)[seen], np.asarray(full)[seen], atol=2e-5)


def test_ragged_prompts_decode_each_at_its_own_place(variant, tokens):
    model, params, apply = variant
    prompts = jnp.array([8, 5, 1])
    full, _ = apply(params, tokens, WHOLE)
    _, cache = apply(params, tokens[:, :8], Context.of_lengths(prompts, 8), empty_cache(model, 3, LENGTH + 6))
    for step in range(12):
        at = (prompts + step)[:, None]
        context = Context(at, jnp.ones_like(at))
        logits, cache = apply(params, jnp.take_along_axis(tokens, at, axis=1), context, cache)
        expected = jnp.take_along_axis(full, at[:, :, None], axis=1)
        np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_bfloat16_decodes_as_well_as_it_reads(tokens):
    """Errors against fp32 are those of a full pass; decoding adds none of its own."""
    model = VARIANTS["sinks"].clone(dtype=jnp.bfloat16)
    params, apply = draw_params(model), quick(call(model))
    full, _ = apply(params, tokens, WHOLE)
    cache, pieces = empty_cache(model, 3, LENGTH), []
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"bfloat16", "int32"}
    for at, width in ((0, 16), *((at, 1) for at in range(16, LENGTH))):
        logits, cache = apply(params, tokens[:, at : at + width], part(WHOLE, at, at + width), cache)
        pieces.append(logits)
    exact, _ = quick(call(VARIANTS["sinks"]))(params, tokens, WHOLE)
    decoded, full, exact = (jax.nn.log_softmax(x) for x in (jnp.concatenate(pieces, 1), full, exact))
    assert np.abs(decoded - full).max() < 5e-2
    assert np.abs(decoded - exact).mean() < 1.25 * np.abs(full - exact).mean() < 0.02


def test_finished_rows_leave_their_state_alone(variant, tokens):
    """Tokens of segment 0 are neither kept nor seen, whatever they hold."""
    model, params, apply = variant
    _, cache = apply(params, tokens[:, :8], part(WHOLE, 0, 8), empty_cache(model, 3, LENGTH + 6))
    pause = Context(jnp.array([[8], [3], [30]]), jnp.array([[1], [0], [0]]))
    _, paused = apply(params, tokens[:, 8:9], pause, cache)
    after, _ = apply(params, tokens[:, 8:9], part(WHOLE, 8, 9), paused)
    expected, _ = apply(params, tokens[:, 8:9], part(WHOLE, 8, 9), cache)
    np.testing.assert_allclose(after[1:], expected[1:], atol=1e-6)


def test_the_past_does_not_see_the_future(variant, tokens):
    _, params, apply = variant
    before, _ = apply(params, tokens, WHOLE)
    for at in (1, 9, LENGTH - 1):
        after, _ = apply(params, tokens.at[:, at:].set((tokens[:, at:] + 1) % VOCAB), WHOLE)
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
        assert np.abs(before[:, at:] - after[:, at:]).max() > 1e-3


@pytest.fixture(scope="module")
def packed():
    """Documents of 13, 8 and 3 tokens in three rows, and how to pack rows alike into one."""
    lengths = (13, 8, 3)

    def pack(rows):
        row = jnp.concatenate([rows[row, :length] for row, length in enumerate(lengths)])[None]
        return jnp.concatenate([row, jnp.zeros((2, *row.shape[1:]), row.dtype)])

    alone = Context.of_lengths(jnp.array(lengths), LENGTH)
    return alone, Context(pack(alone.positions), pack(jnp.array([[1], [2], [3]]) * alone.segments)), pack


def test_packed_documents_equal_separate_ones(variant, tokens, packed):
    _, params, apply = variant
    alone, together, pack = packed
    separate, _ = apply(params, tokens, alone)
    logits, _ = apply(params, pack(tokens), together)
    np.testing.assert_allclose(logits[0], pack(separate)[0], atol=2e-5)


@pytest.mark.parametrize("name", ["sinks", "alibi-ring", "dynamic-ring"])
def test_packed_documents_give_the_gradients_of_separate_ones(name, tokens, packed):
    model, (alone, together, pack) = VARIANTS[name], packed
    params, weight = draw_params(model), jax.random.normal(jax.random.key(3), (3, LENGTH, VOCAB))

    @quick
    @jax.grad
    def gradient(params, tokens, context, weight):
        return (jnp.tanh(call(model)(params, tokens, context)[0]) * weight * (context.segments > 0)[..., None]).sum()

    one = gradient(params, tokens, alone, weight)
    other = gradient(params, pack(tokens), together, pack(weight))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * float(jnp.abs(a).max()))


def test_contents_of_padding_do_not_matter(variant, tokens):
    _, params, apply = variant
    context = Context.of_lengths(LENGTHS, LENGTH)
    seen = np.asarray(context.segments) > 0
    before, _ = apply(params, tokens, context)
    moved = context.replace(positions=jnp.where(seen, context.positions, 9))
    after, _ = apply(params, jnp.where(seen, tokens, 3), moved)
    np.testing.assert_array_equal(np.asarray(before)[seen], np.asarray(after)[seen])


def test_every_parameter_names_an_axis_for_each_dimension():
    for model in VARIANTS.values():
        boxes = jax.tree.leaves(boxed_abstract_params(model), is_leaf=lambda x: isinstance(x, nn.Partitioned))
        assert all(isinstance(box, nn.Partitioned) and len(box.names) == box.value.ndim for box in boxes)
    mixer = boxed_abstract_params(VARIANTS["alibi"])["stack"]["blocks_0"]["mixer"]
    assert mixer["sink_logits"].names == ("layers", "heads")


@pytest.mark.parametrize("name", ["sinks", "dynamic-ring"])
def test_the_sampler_agrees_with_the_scorer(name):
    """Through a cache that is made for the prompts, repeated for each sample, and enlarged for the responses."""
    model, prompts = VARIANTS[name], jnp.array([4, 3])
    params = draw_params(model)
    batch = PromptBatch(jax.random.randint(jax.random.key(5), (2, 4), 0, VOCAB), prompts, jnp.arange(2))
    sampling = Sampling(max_new_tokens=14, samples_per_prompt=2, temperature=0.9)
    rollout = sample(model, params, batch, sampling, jax.random.key(6), eos_id=0, pad_id=1)
    scored, _ = response_logprobs(model, params, rollout, sampling, entropy=False)
    assert int(rollout.response_mask.sum()) > 20
    np.testing.assert_allclose(scored, rollout.logprobs, atol=5e-5)


def cache_bytes(model: Transformer, slots: int) -> int:
    layers = jax.eval_shape(lambda: empty_cache(model, 2, slots)).layers
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))


def test_the_state_of_a_window_does_not_grow():
    ring = model_of(Attention(4, 2, window=8, sinks=4), RoPE(), max_length=10_000)
    # Keys and values of 2 heads of 4 in fp32, position and segment, in 12 slots of 2 rows.
    assert cache_bytes(ring, 12) == cache_bytes(ring, 10_000) == 2 * 12 * (2 * 2 * 4 * 4 + 8)
    assert cache_bytes(ring, 5) == 2 * 5 * (2 * 2 * 4 * 4 + 8)
    dense = model_of(Attention(4, 2), RoPE(), max_length=10_000)
    assert cache_bytes(dense, 10_000) == 2 * 10_000 * 2 * 2 * 4 * 4


@pytest.mark.parametrize(("window", "sinks"), [(LENGTH, 0), (LENGTH - 3, 3), (LENGTH + 100, 7)])
def test_a_window_that_shows_all_is_none(tokens, window, sinks):
    plain = model_of(Attention(4, 2), RoPE())
    params = draw_params(plain)
    wide = model_of(Attention(4, 2, window=window, sinks=sinks), RoPE(), max_length=256)
    expected, _ = quick(call(plain))(params, tokens, WHOLE)
    logits, _ = quick(call(wide))(params, tokens, WHOLE)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    cached, _ = quick(call(wide))(params, tokens, WHOLE, empty_cache(wide, 3, LENGTH))
    np.testing.assert_allclose(cached, expected, atol=1e-5)


def test_sink_logits_start_at_zero_train_and_vanish_far_below(tokens):
    sunk, plain = model_of(Attention(4, 2, sink_logits=True), RoPE()), model_of(Attention(4, 2), RoPE())
    params = init_params(sunk, jax.random.key(0))
    mixer = params["stack"]["blocks_0"]["mixer"]
    assert mixer["sink_logits"].shape == (1, 4) and not mixer["sink_logits"].any()
    gradient = quick(jax.grad(lambda p: call(sunk)(p, tokens, WHOLE)[0][..., 0].sum()))(params)
    assert np.abs(gradient["stack"]["blocks_0"]["mixer"]["sink_logits"]).min() > 1e-4
    rest = {name: leaf for name, leaf in mixer.items() if name != "sink_logits"}
    expected, _ = quick(call(plain))(params | {"stack": {"blocks_0": params["stack"]["blocks_0"] | {"mixer": rest}}},
                                     tokens, WHOLE)  # fmt: skip
    mixer["sink_logits"] = mixer["sink_logits"] - 200.0
    logits, _ = quick(call(sunk))(params, tokens, WHOLE)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_dynamic_gradients_equal_a_difference(tokens):
    """The gradient through keys that each query turns, against the slope along a random direction."""
    model = VARIANTS["dynamic"]
    params = draw_params(model)
    weight = jax.random.normal(jax.random.key(3), (3, LENGTH, VOCAB)) / LENGTH
    loss = quick(lambda p: (jnp.tanh(call(model)(p, tokens, WHOLE)[0]) * weight).sum())
    gradient = quick(jax.grad(lambda p: (jnp.tanh(call(model)(p, tokens, WHOLE)[0]) * weight).sum()))(params)
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    step = 1e-3
    up, down = (loss(jax.tree.map(lambda p, d, s=s: p + s * step * d, params, direction)) for s in (1, -1))
    slope = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=0.02)


def test_dynamic_keys_are_kept_unturned_and_change_with_the_length(tokens):
    """The law above holds although the scale moves: without it, the same tokens give other logits."""
    model = VARIANTS["dynamic"]
    params = draw_params(model)
    scaled, _ = quick(call(model))(params, tokens, WHOLE)
    plain, _ = quick(call(model.clone(position=RoPE())))(params, tokens, WHOLE)
    np.testing.assert_allclose(scaled[:, :7], plain[:, :7], atol=1e-5)
    assert np.abs(scaled[:, 7:] - plain[:, 7:]).max() > 1e-2
    longer = model.clone(max_length=256)
    _, cache = quick(call(longer))(params, tokens, WHOLE, empty_cache(longer, 3, LENGTH))
    _, other = quick(call(longer.clone(position=None)))(params, tokens, WHOLE, empty_cache(longer, 3, LENGTH))
    np.testing.assert_allclose(cache.layers[0]["keys"], other.layers[0]["keys"], atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic-ring", "sinks"])
def test_dropout_acts_in_every_path(name, tokens):
    plain = VARIANTS[name]
    mixer = plain.pattern[0].mixer
    assert isinstance(mixer, Attention)
    model = plain.clone(pattern=(Block(mixer.clone(dropout=0.5)),))
    params = draw_params(model)
    run = quick(lambda key: model.apply({"params": params}, tokens, WHOLE, None, False, rngs={"dropout": key})[0])
    one, same, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    exact, _ = quick(call(plain))(params, tokens, WHOLE)
    still, _ = quick(call(model))(params, tokens, WHOLE)
    np.testing.assert_array_equal(still, exact)


class Still(nn.Module):
    """A mixer that has nothing to choose."""

    def check(self, d_model):
        pass


def test_a_plan_names_what_runs():
    """What ``auto`` gets on a CPU, from the sizes of each use; a mixer without a choice is left out."""
    long, small = (plan(VARIANTS["ring"], 2, length, device=("cpu", "cpu")) for length in (4096, 24))
    assert small == {"0 Attention": {"training": "reference", "prefill": "reference", "decode": "reference"}}
    assert long["0 Attention"] == {"training": "blocked", "prefill": "blocked", "decode": "reference"}
    turning = plan(VARIANTS["dynamic"], 2, 4096, device=("cpu", "cpu"))["0 Attention"]
    assert turning["training"] == "reference", "one query at a time"
    dropping = model_of(Attention(4, dropout=0.1), RoPE())
    assert plan(dropping, 2, 4096, device=("cpu", "cpu"))["0 Attention"]["training"] == "reference"
    assert plan(Transformer(VOCAB, WIDTH, (Block(Still()),)), 2, 4096) == {}


@pytest.mark.parametrize("name", ["sinks", "alibi", "dynamic-ring"])
def test_a_plan_is_about_what_attention_meets(name, monkeypatch, tokens):
    """Its cases are those of the calls in training, prefill and decode; keys that each query turns meet one query."""
    met, planned, model = [], [], VARIANTS[name]
    for module, cases in ((dispatch, met), (mixer_module, planned)):
        monkeypatch.setattr(module, "choose", lambda _, case, cases=cases: cases.append(case) or "reference")
    for module, cases in ((decode, met), (mixer_module, planned)):
        monkeypatch.setattr(module, "choose_decoder", lambda _, case, cases=cases: cases.append(case) or "reference")
    plan(model, 3, LENGTH)
    params = draw_params(model)
    jax.eval_shape(call(model), params, tokens, WHOLE)
    training = met[-1]
    _, cache = jax.eval_shape(call(model), params, tokens, WHOLE, empty_cache(model, 3, LENGTH))
    prefill = met[-1]
    jax.eval_shape(call(model), params, tokens[:, :1], part(WHOLE, 0, 1), cache)
    assert [training, prefill, met[-1]] == planned


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(4, window=0), "window must be at least 1 .*got 0"),
        (lambda: Attention(4, window=4, sinks=-1), "sinks must not be negative, got -1"),
        (lambda: Attention(4, sinks=4), "4 sinks need a window"),
        (lambda: Attention(4, head_dim=0), "head_dim must be at least 1, got 0"),
        (lambda: model_of(Attention(4, head_dim=5), RoPE()), "heads of 5 cannot be paired; set an even head_dim"),
        (lambda: model_of(Attention(8), RoPE(scaling=NTK(2.0))), "heads of at least 4 dimensions, got 2"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_odd_heads_are_fine_without_rotation():
    assert model_of(Attention(4, head_dim=5), Sinusoidal()).layers == 1
