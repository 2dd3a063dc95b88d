"""Slots, and rows that leave, draw what all rows draw together, whatever the layers keep of the past."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import thoroughly

from rlhf_jax.errors import UserError
from rlhf_jax.models import Attention, Block, Learned, Transformer, abstract_params
from rlhf_jax.models.mixers import FLASH, GAU, Fixed, Parallel, Strided
from rlhf_jax.models.moe import MoE
from rlhf_jax.sampling import Sampling, sample, sample_compiled
from rlhf_jax.types import PromptBatch

V, EOS, PAD = 19, 1, 0
PLAIN = Sampling(max_new_tokens=11, samples_per_prompt=6, temperature=0.9, stop_tokens=(2,))
LENGTHS = np.array([1, 5, 3, 6, 2, 6, 4], np.int32)


def tiny(*blocks: Block, **options) -> Transformer:
    return Transformer(V, 8, blocks, **({"max_length": 32} | options))


MODELS = {
    "attention": tiny(
        Block(Attention(2, kv_heads=1), MoE(experts=4, top_k=2, width=4)), Block(Attention(1, window=3, sinks=1)),
        Block(Parallel((Strided(1, stride=4), Fixed(1, block=4, columns=2)))), position=Learned(),
    ),
    "gated": tiny(Block(GAU(key_dim=8)), Block(GAU(key_dim=8, window=4)), Block(FLASH(key_dim=8, chunk=4))),
}  # fmt: skip
SLOTS = {"attention": 16, "gated": 5}


def prompts_of(seed: int = 0) -> PromptBatch:
    tokens = np.random.default_rng(seed).integers(3, V, size=(len(LENGTHS), 6)).astype(np.int32)
    tokens[np.arange(6) >= LENGTHS[:, None]] = PAD
    return PromptBatch(tokens, LENGTHS, np.arange(len(LENGTHS), dtype=np.int32) + 40)


def params_of(model: Transformer):
    """Weights that are large enough for every path to matter, without a program that draws them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0.0, 0.4, x.shape).astype(np.float32), abstract_params(model))


def drawn(model: Transformer, sampling: Sampling):
    """A program that runs once: it is compiled without much optimisation."""

    def run(params, prompts, key):
        return sample_compiled(model, params, prompts, sampling, key, jnp.int32(3), (EOS, *sampling.stop_tokens), PAD)

    quick = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return quick(params_of(model), prompts_of(), jax.random.key(0))


@pytest.mark.parametrize("name", thoroughly(MODELS, {"attention", "gated"}))
def test_slots_change_nothing(name):
    """42 responses, few places: rows move in at different times, the ring comes round, and the last move together."""
    sampling = dataclasses.replace(PLAIN, record_routing=name == "attention")
    together, slots = (drawn(MODELS[name], dataclasses.replace(sampling, slots=n)) for n in (None, SLOTS[name]))
    lengths = np.asarray(together.response_lengths)
    assert lengths.min() < 4 and lengths.max() == 11 and lengths.sum() > 16 * 11, "the case is too easy"
    np.testing.assert_allclose(slots.logprobs, together.logprobs, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, slots.replace(logprobs=0), together.replace(logprobs=0))


@pytest.mark.parametrize(("name", "points"), [("attention", (8,)), ("gated", (3, 7, 20))])
def test_rows_that_leave_and_a_cache_that_grows_change_nothing(name, points):
    """42 responses; at each point fewer places are enough."""
    sampling = dataclasses.replace(PLAIN, record_routing=name == "attention")
    together, found = (drawn(MODELS[name], dataclasses.replace(sampling, regroup=each)) for each in ((), points))
    lengths = np.asarray(together.response_lengths)
    assert 0 < (lengths > points[1 % len(points)]).sum() <= 21 and lengths.max() == 11, "the case is too easy"
    np.testing.assert_allclose(found.logprobs, together.logprobs, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found.replace(logprobs=0), together.replace(logprobs=0))


@pytest.mark.parametrize("points", [(0, 4), (4, 4), (7, 4), (2.5,)])
def test_points_that_cannot_be_are_refused(points):
    with pytest.raises(UserError, match="Sampling.regroup"):
        Sampling(4, regroup=points)


def test_slots_and_points_do_not_go_together():
    with pytest.raises(UserError, match="Sampling.regroup.*with slots"):
        Sampling(4, slots=2, regroup=(2,))


def test_one_place_and_rows_that_fill_the_model():
    model = tiny(Block(Attention(1)), position=Learned())
    sampling = Sampling(max_new_tokens=26, greedy=True)
    together, found = (drawn(model, dataclasses.replace(sampling, slots=n)) for n in (None, 1))
    np.testing.assert_array_equal(found.tokens, together.tokens)
    np.testing.assert_array_equal(found.response_mask, together.response_mask)


def test_one_compilation_serves_all_prompts_of_a_shape():
    model = tiny(Block(Attention(1)), position=Learned())
    params = params_of(model)
    sampling = dataclasses.replace(PLAIN, slots=16)

    def draw(seed):
        return sample(model, params, prompts_of(seed), sampling, jax.random.key(seed), seed, eos_id=EOS, pad_id=PAD)

    draw(0)
    before = sample_compiled._cache_size()
    draws = [draw(seed) for seed in range(1, 4)]
    assert sample_compiled._cache_size() == before
    assert len({np.asarray(rollout.tokens).tobytes() for rollout in draws}) == 3


@pytest.mark.parametrize("slots", [0, -1, 2.5])
def test_slots_that_cannot_be_are_refused(slots):
    with pytest.raises(UserError, match="Sampling.slots"):
        Sampling(4, slots=slots)
