"""The laws of decoders made of gated units, as functions that both test files call, and the units in plain numpy."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax import config
from rlhf_jax.models import Block, Transformer, boxed_abstract_params, empty_cache, init_params
from rlhf_jax.models.layers import Shared, Style
from rlhf_jax.models.positions import RoPE
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.scoring import response_logprobs
from rlhf_jax.types import Context, PromptBatch

VOCAB, WIDTH, LENGTH = 17, 12, 23
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def quick(function):
    """Compile with little optimisation: these programs run a few times, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def small(*mixers, **fields) -> Transformer:
    """A model whose weights are large enough that every path matters."""
    settings = {"max_length": 64, "init_std": 0.4, "scale_residual_init": False} | fields
    return Transformer(VOCAB, WIDTH, tuple(Block(mixer, None) for mixer in mixers), **settings)


@functools.cache
def prepared(model: Transformer):
    """Parameters, and the compiled forward pass."""

    def call(params, tokens, context, cache=None):
        return model.apply({"params": params}, tokens, context, cache)[:2]

    return init_params(model, jax.random.key(0)), quick(call)


TOKENS = np.random.default_rng(2).integers(0, VOCAB, (3, LENGTH)).astype(np.int32)


def whole(lengths) -> Context:
    return Context.of_lengths(jnp.array(lengths), LENGTH)


def check_pieces(model: Transformer, splits: tuple[int, ...]) -> None:
    """Ragged prompts in pieces that end at ``splits``, then decoding; each row goes on from its own end."""
    params, apply = prepared(model)
    wanted, _ = apply(params, TOKENS, whole([LENGTH] * 3))
    lengths, width = np.array([splits[-1], max(splits[-1] - 3, 1), 1]), splits[-1]
    prompt, cache, start = Context.of_lengths(jnp.array(lengths), width), empty_cache(model, 3, LENGTH + 3), 0
    padded = np.where(np.arange(width) < lengths[:, None], TOKENS[:, :width], 5)
    for stop in splits:
        piece = Context(prompt.positions[:, start:stop], prompt.segments[:, start:stop])
        logits, cache = apply(params, padded[:, start:stop], piece, cache)
        real = np.asarray(piece.segments) != 0
        np.testing.assert_allclose(np.asarray(logits)[real], np.asarray(wanted)[:, start:stop][real], **CLOSE)
        start = stop
    for step in range(LENGTH - width):
        place = (lengths + step)[:, None]
        # The last row pauses for a step, as a finished one would; it is not compared from there on.
        alive = np.array([[1], [1], [int(step < 5)]], np.int32)
        logits, cache = apply(params, np.take_along_axis(TOKENS, place, axis=1), Context(place, alive), cache)
        right = np.take_along_axis(np.asarray(wanted), place[..., None], axis=1)
        rows = alive[:, 0] != 0
        np.testing.assert_allclose(np.asarray(logits)[rows], right[rows], **CLOSE)


def check_causality(model: Transformer) -> None:
    """Bit for bit."""
    params, apply = prepared(model)
    before, _ = apply(params, TOKENS, whole([LENGTH, 20, 11]))
    for t in (3, 4, 8, 9):
        changed = TOKENS.copy()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after, _ = apply(params, changed, whole([LENGTH, 20, 11]))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.abs(after[:, t] - before[:, t]).max() > 1e-3


DOCUMENTS = (7, 1, 9, 3)


def packed_and_alone():
    """Four documents in one row with a gap of one and two tokens of padding behind, and in a row each."""
    gaps = (7, 1, 1, 9, 3, 2)
    positions = np.concatenate([np.arange(n) for n in gaps])
    segments = np.repeat([1, 2, 0, 3, 4, 0], gaps)
    starts = (0, 7, 9, 18)
    alone = np.zeros((4, LENGTH), np.int32)
    for row, (start, length) in enumerate(zip(starts, DOCUMENTS, strict=True)):
        alone[row, :length] = TOKENS[0, start : start + length]
    together = Context(jnp.array(positions[None], jnp.int32), jnp.array(segments[None], jnp.int32))
    return together, alone, Context.of_lengths(jnp.array(DOCUMENTS), LENGTH), starts


def check_packing(model: Transformer) -> None:
    """Values, and the gradient of every parameter."""
    params, _ = prepared(model)
    together, alone, separate, starts = packed_and_alone()
    weight = np.random.default_rng(5).normal(size=(4, LENGTH, VOCAB)).astype(np.float32)
    packed_weight = np.zeros((1, LENGTH, VOCAB), np.float32)
    for row, (start, length) in enumerate(zip(starts, DOCUMENTS, strict=True)):
        packed_weight[0, start : start + length] = weight[row, :length]

    def loss(params, tokens, context, weight):
        logits, _, _ = model.apply({"params": params}, tokens, context)
        return jnp.sum(jnp.tanh(logits) * weight * (context.segments != 0)[..., None]), logits

    gradient = quick(jax.grad(loss, has_aux=True))
    one, packed = gradient(params, TOKENS[:1], together, packed_weight)
    other, apart = gradient(params, alone, separate, weight)
    for row, (start, length) in enumerate(zip(starts, DOCUMENTS, strict=True)):
        np.testing.assert_allclose(packed[0, start : start + length], apart[row, :length], **CLOSE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max())), one, other
    )
    assert all(float(jnp.abs(leaf).max()) > 0.0 for leaf in jax.tree.leaves(one))


def check_padding(model: Transformer) -> None:
    """What stands in padding, and where, does not matter."""
    params, apply = prepared(model)
    context = whole([LENGTH, 14, 5])
    real = np.asarray(context.segments) != 0
    before, _ = apply(params, TOKENS, context)
    moved = context.replace(positions=jnp.where(real, context.positions, 9))
    after, _ = apply(params, np.where(real, TOKENS, 3), moved)
    np.testing.assert_array_equal(np.asarray(before)[real], np.asarray(after)[real])


def check_sampler(model: Transformer) -> None:
    """The sampler enlarges the cache of the prompts and repeats its rows; the scorer reads whole rows."""
    params, _ = prepared(model)
    prompts = PromptBatch(
        tokens=jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0]]), lengths=jnp.array([6, 3]), index=jnp.arange(2)
    )
    sampling = Sampling(max_new_tokens=11, samples_per_prompt=2)
    rollout = sample(model, params, prompts, sampling, jax.random.key(0), eos_id=0, pad_id=0)
    scored, _ = quick(lambda params, rollout: response_logprobs(model, params, rollout, sampling))(params, rollout)
    difference = np.where(rollout.response_mask, scored - rollout.logprobs, 0.0)
    assert np.abs(difference).max() < 1e-4 and rollout.response_mask.sum() > 20


def check_value(model: Transformer) -> None:
    """Every parameter has a name for each of its axes, and the model reads back from its description."""
    for leaf in jax.tree.leaves(boxed_abstract_params(model), is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert isinstance(leaf, nn.Partitioned) and len(leaf.names) == leaf.value.ndim
    assert config.revive(config.describe(model)) == model


def layer_and_numpy(mixer, position=RoPE(100.0)):
    """A layer's output on two documents of one row (float32), its parameters, and their inputs in float64."""
    style = Style(position=position, init_std=0.5, residual_std=0.5)
    x = np.random.default_rng(3).normal(size=(1, 16, WIDTH)).astype(np.float32)
    positions = np.concatenate([np.arange(11), np.arange(5)])[None]
    context = Context(jnp.array(positions, jnp.int32), jnp.array([[1] * 11 + [2] * 5]))
    shared = Shared(context, context, style=style)
    params = nn.unbox(quick(mixer.init)(jax.random.key(4), x, shared))
    # Offsets start at 0 and would hide a wrong sign.
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    out, _ = quick(lambda params, x: mixer.apply(params, x, shared))(params, x)
    values = {name: np.asarray(leaf, np.float64) for name, leaf in params["params"].items()}
    return np.asarray(out[0]), values, (x[0, :11].astype(np.float64), x[0, 11:].astype(np.float64))


def silu(x):
    return x / (1.0 + np.exp(-x))


def turn(x, base: float):
    """Half-split rotation of [T, D] by the row number, one pair after another."""
    out, half = np.zeros_like(x), x.shape[1] // 2
    for t in range(x.shape[0]):
        for i in range(half):
            angle = t * base ** (-2.0 * i / x.shape[1])
            a, b = x[t, i], x[t, i + half]
            out[t, i], out[t, i + half] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
    return out


def unit_inputs(values, x, base):
    """The gate, the values, and the turned versions of ``Z``."""
    u, v = silu(np.einsum("td,dpe->tpe", x, values["gates"])).transpose(1, 0, 2)
    z = silu(x @ values["keys"])
    copies = [z * (1.0 + scale) + bias for scale, bias in zip(values["use_scale"], values["use_bias"], strict=True)]
    return u, v, [turn(copy, base) for copy in copies]


def bias_by_hand(values, t: int, s: int) -> float:
    """Of ``Toeplitz`` or ``Rotary``, whichever the layer has."""
    if "bias_table" in values:
        return float(values["bias_table"][min(t - s, len(values["bias_table"]) - 1)])
    if "bias_vectors" in values:
        a, b = (np.tile(vector, (t + 1, 1)) for vector in values["bias_vectors"])
        return float(turn(a, 10_000.0)[t] @ turn(b, 10_000.0)[s])
    return 0.0
