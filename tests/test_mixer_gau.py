"""The gated attention unit: one layer against numpy, and the laws of decoders made of it."""

from __future__ import annotations

import math

import gated_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gau import score_by_hand

from rlhf_jax.models import GAU, DynamicNTK, RoPE, empty_cache, init_params
from rlhf_jax.models.mixers import Constant, Count, Length, Rotary, SoftmaxPlus, Toeplitz
from rlhf_jax.models.mixers.gated import document_lengths
from rlhf_jax.models.positions import ALiBi, YaRN
from rlhf_jax.ops.attention import IMPLEMENTATIONS
from rlhf_jax.ops.attention.decode import DECODERS
from rlhf_jax.ops.gau import Laplace, Relu2
from rlhf_jax.types import Context

MODELS = {
    "plain": laws.small(GAU(key_dim=6), repeats=2),
    "laplace-rotary-window": laws.small(GAU(key_dim=6, score=Laplace(), bias=Rotary(), window=4)),
    "table-constant": laws.small(GAU(1.5, 4, bias=Toeplitz(5), normaliser=Constant(6.0)), position=None),
    "softmax": laws.small(GAU(key_dim=6, score=SoftmaxPlus(5), bias=Rotary()), position=RoPE(scaling=YaRN(2.0, 8))),
    "blocked": laws.small(GAU(key_dim=6, implementation="blocked")),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.mark.parametrize(
    ("name", "splits"), [("plain", (1,)), *((name, (5, 11)) for name in list(MODELS)[:-1])], ids=str
)
def test_pieces_and_decoding_give_what_a_full_pass_gives(name, splits):
    laws.check_pieces(MODELS[name], splits)


def test_the_past_does_not_see_the_future(model):
    laws.check_causality(model)


def test_packed_documents_are_as_alone(model):
    laws.check_packing(model)


def test_contents_of_padding_do_not_matter(model):
    laws.check_padding(model)


def test_a_model_is_a_value_with_axes(model):
    laws.check_value(model)


@pytest.mark.parametrize("name", ["plain", "laplace-rotary-window"])
def test_sampler_and_scorer_agree(name):
    laws.check_sampler(MODELS[name])


@pytest.mark.parametrize(
    "mixer",
    [
        GAU(key_dim=6),
        GAU(key_dim=6, score=Laplace(), bias=Toeplitz(4), normaliser=Constant(3.0)),
        GAU(key_dim=6, bias=Rotary(), window=3),
        GAU(key_dim=6, score=Laplace(), normaliser=Length(), bias=Rotary()),
        GAU(key_dim=6, score=SoftmaxPlus(7), bias=Rotary()),
    ],
    ids=["plain", "table", "window", "length", "softmax"],
)
def test_a_layer_equals_numpy(mixer):
    found, values, documents = laws.layer_and_numpy(mixer)
    wanted = [layer_by_hand(mixer, values, x) for x in documents]
    np.testing.assert_allclose(found, np.concatenate(wanted), rtol=2e-4, atol=2e-4)


def layer_by_hand(mixer, values, x):
    u, v, (q, k) = laws.unit_inputs(values, x, base=100.0)
    mixed = np.zeros_like(v)
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if mixer.window is None or t - s < mixer.window]
        logits = {s: float(q[t] @ k[s]) / math.sqrt(mixer.key_dim) for s in seen}
        if isinstance(mixer.normaliser, Length):
            logits = {s: float(q[t] @ k[s]) / len(x) for s in seen}
        if isinstance(mixer.score, SoftmaxPlus):
            logits = {s: logit * math.log(len(seen)) / math.log(mixer.score.base) for s, logit in logits.items()}
        logits = {s: logit + laws.bias_by_hand(values, t, s) for s, logit in logits.items()}
        if isinstance(mixer.score, SoftmaxPlus):
            weights = {s: math.exp(logit) for s, logit in logits.items()}
            divisor = sum(weights.values())
        else:
            name = "laplace" if isinstance(mixer.score, Laplace) else "relu2"
            weights = {s: score_by_hand(name, logit) for s, logit in logits.items()}
            divisor = {Count: len(seen), Constant: 3.0, Length: 1.0}[type(mixer.normaliser)]
        for s, weight in weights.items():
            mixed[t] += weight / divisor * v[s]
    return (u * mixed) @ values["out"]


def test_the_length_of_each_tokens_document():
    context = Context(
        jnp.array([[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]]),
        jnp.array([[1, 1, 1, 2, 2, 2, 0, 0], [3] * 8]),
    )
    lengths = np.asarray(document_lengths(context))
    np.testing.assert_array_equal(lengths[0, :6], [3, 3, 3, 1, 2, 2])
    np.testing.assert_array_equal(lengths[1], 8)


def test_the_papers_normaliser_lets_the_future_change_the_past():
    """Why it cannot decode: with it, twice the text is another beginning; with the others it is the same."""
    x = np.random.default_rng(0).normal(size=(1, 64, laws.WIDTH)).astype(np.float32)

    def change(mixer):
        style = laws.Style(position=RoPE(), init_std=0.5, residual_std=0.5)

        @laws.quick
        def both(key):
            def run(params, length):
                context = Context.of_lengths(jnp.array([length]), length)
                return mixer.apply(params, x[:, :length], laws.Shared(context, context, style=style))[0]

            short = Context.of_lengths(jnp.array([32]), 32)
            params = laws.nn.unbox(mixer.init(key, x[:, :32], laws.Shared(short, short, style=style)))
            return run(params, 32), run(params, 64)[:, :32]

        once, twice = both(jax.random.key(1))
        return float(jnp.abs(once - twice).max() / jnp.abs(twice).max())

    assert change(GAU(key_dim=8, normaliser=Length())) > 2.0
    assert max(change(GAU(key_dim=8, normaliser=each)) for each in (Count(), Constant(32.0))) < 1e-6


def test_the_papers_normaliser_trains_and_refuses_to_decode():
    model = laws.small(GAU(key_dim=6, normaliser=Length()))
    laws.check_packing(model)
    with pytest.raises(ValueError, match=r"not known while decoding.*normaliser=Count\(\)"):
        empty_cache(model, 1, 8)


def test_the_state_is_one_key_and_one_value_a_token():
    def numbers(mixer, slots):
        state = mixer.empty_cache(1, slots, laws.WIDTH, jnp.float32)
        return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)

    per_token = 6 + 2 * laws.WIDTH
    assert [numbers(GAU(key_dim=6), slots) for slots in (8, 32)] == [8 * per_token, 32 * per_token]
    assert [numbers(GAU(key_dim=6, window=9), slots) for slots in (8, 32, 640)] == [
        8 * per_token, 9 * per_token, 9 * per_token,
    ]  # fmt: skip


def test_bfloat16_decodes_near_float32():
    exact = MODELS["plain"]
    model, params = exact.clone(dtype=jnp.bfloat16), init_params(exact, jax.random.key(0))
    context = laws.whole([laws.LENGTH] * 3)
    wanted, _ = laws.prepared(exact)[1](params, laws.TOKENS, context)
    apply = laws.prepared(model)[1]
    found, _ = apply(params, laws.TOKENS, context)
    cache, pieces = empty_cache(model, 3, laws.LENGTH), []
    for start in range(0, laws.LENGTH):
        piece = Context(context.positions[:, start : start + 1], context.segments[:, start : start + 1])
        logits, cache = apply(params, laws.TOKENS[:, start : start + 1], piece, cache)
        pieces.append(logits)
    scale = float(np.abs(wanted).max())
    assert np.abs(found - wanted).max() < 0.1 * scale
    assert np.abs(np.concatenate(pieces, axis=1) - found).max() < 0.1 * scale


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GAU(expansion=0.5), "expansion must be at least 1 .*, got 0.5"),
        (lambda: GAU(key_dim=0), "key_dim must be at least 1, got 0"),
        (lambda: GAU(window=0), "window must be at least 1"),
        (lambda: GAU(key_dim=5, bias=Rotary()), "take an even key_dim, got 5"),
        (lambda: GAU(score=SoftmaxPlus(), bias=Toeplitz()), "no table of biases in softmax"),
        (lambda: GAU(score=SoftmaxPlus(), normaliser=Length()), "normalises itself"),
        (lambda: GAU(score=SoftmaxPlus(), implementation="fast"), "unknown attention implementation 'fast'"),
        (lambda: GAU(implementation="fast"), "unknown gated attention implementation 'fast'"),
        (lambda: SoftmaxPlus(1), "at least 2 tokens, got 1"),
        (lambda: Constant(0.0), "must be positive, got 0.0"),
        (lambda: Toeplitz(0), "at least 1 entry, got 0"),
        (lambda: laws.small(GAU(expansion=1.3)), "expansion 1.3 of d_model 12 is not a whole number"),
        (lambda: GAU(key_dim=5).check_position(RoPE(), 12), "take an even key_dim, got 5"),
        (lambda: GAU().check_position(ALiBi(), 12), "gated units have one head"),
        (lambda: GAU().check_position(RoPE(scaling=DynamicNTK(8)), 12), "only softmax attention does"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_scores_are_values():
    assert GAU(score=Relu2()) == GAU() != GAU(score=Laplace())


def test_the_plan_names_what_each_use_gets():
    style = laws.Style()
    long = GAU(key_dim=6, window=8).plan(2, 4096, laws.WIDTH, style, "cpu", "cpu")
    assert long == {"training": "blocked", "prefill": "blocked", "decode": "reference"}
    named = GAU(key_dim=6, implementation="reference").plan(2, 4096, laws.WIDTH, style, "cpu", "cpu", packed=True)
    assert set(named.values()) == {"reference"}
    softmax = GAU(key_dim=6, score=SoftmaxPlus()).plan(2, 16, laws.WIDTH, style, "cpu", "cpu")
    assert {softmax.pop("training"), softmax.pop("prefill")} <= set(IMPLEMENTATIONS)
    assert softmax.keys() == {"decode"} and softmax["decode"] in DECODERS
