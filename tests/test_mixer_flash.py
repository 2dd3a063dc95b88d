"""FLASH (which is not FlashAttention) as a layer: against numpy, and the laws of decoders made of it."""

from __future__ import annotations

import math

import gated_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gau import score_by_hand

from rlhf_jax.models import FLASH, GAU, DynamicNTK, RoPE
from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.mixers import Constant, Count, Length, Rotary, SoftmaxPlus, Toeplitz
from rlhf_jax.models.positions import ALiBi
from rlhf_jax.ops.gau import Laplace
from rlhf_jax.types import Context

MODELS = {
    "plain": laws.small(FLASH(key_dim=6, chunk=4), repeats=2),
    "laplace-rotary": laws.small(FLASH(key_dim=6, chunk=5, score=Laplace(), bias=Rotary())),
    "table-constant": laws.small(FLASH(1.5, 4, 3, bias=Toeplitz(2), normaliser=Constant(3.0)), position=None),
    "long-chunk": laws.small(FLASH(key_dim=6, chunk=64)),
    "reference": laws.small(FLASH(key_dim=6, chunk=4, implementation="reference")),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        *(("plain", (length,)) for length in (3, 4, 5, 11)),
        *((name, (5, 11)) for name in MODELS if name != "reference"),
    ],
    ids=str,
)
def test_pieces_and_decoding_give_what_a_full_pass_gives(name, splits):
    """Prompts that end before, at and behind the edge of a chunk (of 4) and in a later one; and in several pieces."""
    laws.check_pieces(MODELS[name], splits)


@pytest.mark.parametrize("name", ["plain", "laplace-rotary", "table-constant"])
def test_the_past_does_not_see_the_future(name):
    laws.check_causality(MODELS[name])


def test_packed_documents_are_as_alone(model):
    laws.check_packing(model)


@pytest.mark.parametrize("name", ["plain", "reference"])
def test_contents_of_padding_do_not_matter(name):
    laws.check_padding(MODELS[name])


def test_a_model_is_a_value_with_axes(model):
    laws.check_value(model)


@pytest.mark.parametrize("name", ["plain"])
def test_sampler_and_scorer_agree(name):
    laws.check_sampler(MODELS[name])


@pytest.mark.parametrize(
    "mixer",
    [
        FLASH(key_dim=6, chunk=4),
        FLASH(key_dim=6, chunk=3, score=Laplace(), bias=Toeplitz(2), normaliser=Constant(3.0)),
        FLASH(key_dim=6, chunk=5, bias=Rotary()),
    ],
    ids=["plain", "table", "rotary"],
)
def test_a_layer_equals_numpy(mixer):
    found, values, documents = laws.layer_and_numpy(mixer)
    wanted = [layer_by_hand(mixer, values, x) for x in documents]
    np.testing.assert_allclose(found, np.concatenate(wanted), rtol=2e-4, atol=2e-4)


def layer_by_hand(mixer, values, x):
    u, v, (q_local, k_local, q_global, k_global) = laws.unit_inputs(values, x, base=100.0)
    mixed = np.zeros_like(v)
    for t in range(len(x)):
        first = t // mixer.chunk * mixer.chunk
        here, before = (t + 1 - first, first) if isinstance(mixer.normaliser, Count) else (3.0, 3.0)
        for s in range(t + 1):
            if s < first:
                mixed[t] += float(q_global[t] @ k_global[s]) / before * v[s]
            else:
                logit = float(q_local[t] @ k_local[s]) / math.sqrt(mixer.key_dim) + laws.bias_by_hand(values, t, s)
                name = "laplace" if isinstance(mixer.score, Laplace) else "relu2"
                mixed[t] += score_by_hand(name, logit) / here * v[s]
    return (u * mixed) @ values["out"]


def test_rows_within_one_chunk_are_the_quadratic_unit():
    """With the two uses of ``Z`` that serve the local part, the global one being empty."""
    context = Context.of_lengths(jnp.array([9, 4]), 9)
    shared = Shared(context, context, style=Style(position=RoPE(), init_std=0.5, residual_std=0.5))
    x = np.random.default_rng(1).normal(size=(2, 9, laws.WIDTH)).astype(np.float32)
    chunked, whole = FLASH(key_dim=6, chunk=9, bias=Toeplitz(4)), GAU(key_dim=6, bias=Toeplitz(4))
    params = laws.nn.unbox(laws.quick(chunked.init)(jax.random.key(0), x, shared))
    fewer = {"params": {**params["params"]}}
    for name in ("use_scale", "use_bias"):
        fewer["params"][name] = params["params"][name][:2]
    one, _ = laws.quick(chunked.apply)(params, x, shared)
    other, _ = laws.quick(whole.apply)(fewer, x, shared)
    real = np.asarray(context.segments)[..., None] != 0
    np.testing.assert_allclose(one * real, other * real, rtol=1e-5, atol=1e-5)


def test_the_state_does_not_grow():
    mixer = FLASH(key_dim=6, chunk=8)
    size = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(mixer.empty_cache(1, slots, laws.WIDTH, jnp.bfloat16)))
        for slots in (8, 64, 2**20)
    ]
    width = 2 * laws.WIDTH
    assert set(size) == {4 * 6 * width + 2 * 8 * (2 * 6 + width) + 4}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FLASH(chunk=0), "chunk must be at least 1 token, got 0"),
        (lambda: FLASH(expansion=0.5), "expansion must be at least 1 .*, got 0.5"),
        (lambda: FLASH(key_dim=0), "key_dim must be at least 1, got 0"),
        (lambda: FLASH(key_dim=5, bias=Rotary()), "take an even key_dim, got 5"),
        (lambda: FLASH(score=SoftmaxPlus()), "scores by Relu2.* or Laplace"),
        (lambda: FLASH(normaliser=Length()), r"Count\(\) or Constant\(tokens\).*prefill and decoding differ"),
        (lambda: FLASH(implementation="fast"), "unknown gated attention implementation 'fast'"),
        (lambda: laws.small(FLASH(expansion=1.3)), "expansion 1.3 of d_model 12 is not a whole number"),
        (lambda: laws.small(FLASH(key_dim=5)), "take an even key_dim, got 5"),
        (lambda: laws.small(FLASH(), position=ALiBi()), "gated units have one head"),
        (lambda: laws.small(FLASH(), position=RoPE(scaling=DynamicNTK(8))), "only softmax attention does"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_plan_names_what_each_use_gets():
    for packed in (False, True):
        plan = FLASH(key_dim=6, chunk=8).plan(2, 30, laws.WIDTH, Style(), "cpu", "cpu", packed=packed)
        assert plan == {"training": "blocked", "prefill": "blocked"}
