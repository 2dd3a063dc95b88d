"""Updates that read each prompt once: the same losses and gradients as reading it with every response."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import thoroughly

from rlhf_jax.models import GAU, Attention, Block, LayerNorm, Learned, SwiGLU, Transformer, abstract_params
from rlhf_jax.objectives.critic_free import GroupOptimization, PolicyAlone
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.shared_prompts import SharedPrompts
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.sampling import Sampling
from rlhf_jax.training.step import init_state, make_train_step
from rlhf_jax.types import Rollout, Scores

V, P, N, COPIES, ROWS = 11, 5, 8, 2, 8
MODELS = {
    "attention": Transformer(V, 8, (Block(Attention(2, kv_heads=1), SwiGLU(8)),), repeats=2, max_length=P + N),
    "window": Transformer(
        V, 8, (Block(Attention(2, window=4, sinks=1), SwiGLU(8)),), position=Learned(), norm=LayerNorm(),
        max_length=P + N,
    ),
    "gau": Transformer(V, 8, (Block(GAU(key_dim=4)),), unroll=True, remat="nothing_saveable", max_length=P + N),
}  # fmt: skip
RESPONSES = {"ragged": [1, 8, 4, 5, 7, 2, 8, 3], "short": [1, 2, 3, 4, 4, 1, 2, 3]}
CHOICES = GroupPolicy(aggregation="seq-mean-token-sum-norm", kl=FixedKL(0.1))


def weights(model: Transformer, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.4, x.shape), jnp.float32), abstract_params(model))


def rollout_of(responses: list[int], width: int = N) -> tuple[Rollout, Scores]:
    rng, lengths = np.random.default_rng(3), np.array(responses)
    rows = len(lengths)
    prompts = np.repeat(rng.integers(1, P + 1, rows // COPIES), COPIES).astype(np.int32)
    tokens = rng.integers(1, V, (rows, P + width)).astype(np.int32)
    for row in range(rows):
        tokens[row, : prompts[row]] = tokens[row - row % COPIES, : prompts[row]]
    tokens[np.arange(P + width) >= (prompts + lengths)[:, None]] = 0
    mask = np.arange(width) < lengths[:, None]
    rollout = Rollout(
        tokens=tokens, prompt_lengths=prompts, response_mask=mask,
        logprobs=np.where(mask, rng.normal(-2.0, 0.2, (rows, width)), 0.0).astype(np.float32),
        finished=lengths < width, index=np.arange(rows) // COPIES, policy_step=np.int32(0),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, (rollout, Scores(rng.normal(size=rows).astype(np.float32))))


def objective(model: Transformer, **others) -> GroupOptimization:
    return GroupOptimization(CHOICES, PolicyAlone(model), Sampling(N, samples_per_prompt=COPIES), **others)


def step_of(loss, model: Transformer):
    return make_train_step(loss.loss, optax.sgd(1.0), with_weights=loss.with_weights, conclude=loss.conclude)


@pytest.mark.parametrize("name", thoroughly(MODELS, ["attention", "gau"]))
def test_a_step_is_the_same(name):
    """Gradients are what SGD with a rate of 1 subtracts; experience too is made with prompts read once."""
    model = MODELS[name]
    params, reference = weights(model, 0), weights(model, 1)
    plain, shared = objective(model), objective(model, share_prompts=True, rows=4, lengths=(4,))
    steps = [step_of(plain, model), step_of(SharedPrompts(shared, COPIES, lengths=(4,), parts=4), model)]
    makers = [jax.jit(lambda *given, each=each: each.prepare(*given, each.start())) for each in (plain, shared)]
    for responses in RESPONSES.values():
        made = [make(params, reference, *rollout_of(responses)) for make in makers]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *made)
        (wanted, metrics), (state, found) = (
            step(init_state(params, optax.sgd(1.0)), experience, jax.random.key(0))
            for step, experience in zip(steps, made, strict=True)
        )
        assert metrics["grad_norm"] > 0.01 and metrics["ppo/kl_loss"] > 1e-4
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), state.params, wanted.params)
        assert found.keys() == metrics.keys()
        for each in metrics.keys() - {"ppo/ratio_max_deviation"}:  # maxima of parts add up to an upper bound
            np.testing.assert_allclose(found[each], metrics[each], rtol=1e-4, atol=1e-5, err_msg=each)
    assert steps[1]._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_responses_of_one_token():
    model = MODELS["attention"]
    given = *rollout_of([1] * 4, width=1), objective(model).start()
    made = objective(model).prepare(weights(model, 0), weights(model, 1), *given)
    losses = [
        jax.jit(lambda params, each=each: each.loss(params, each.with_weights(made))[0])(weights(model, 0))
        for each in (objective(model), SharedPrompts(objective(model), COPIES))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert abs(losses[0]) > 1e-3


def test_a_prompt_is_read_once():
    """Operations of an update where prompts are nearly all there is: those of a few rows, not of all."""
    model = Transformer(V, 16, (Block(Attention(2), SwiGLU(32)),), max_length=70)
    rows, width, new = 16, 64, 2
    tokens = jax.ShapeDtypeStruct((rows, width + new), jnp.int32)
    short = jax.ShapeDtypeStruct((rows, new), jnp.float32)
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    rollout = Rollout(tokens, number, short, short, number, number, jax.ShapeDtypeStruct((), jnp.int32))  # pyright: ignore
    choices = GroupPolicy(aggregation="token-mean")
    plain = GroupOptimization(choices, PolicyAlone(model), Sampling(new, samples_per_prompt=8))

    def operations(loss) -> float:
        def step(params, rollout, score):
            rollout = dataclasses.replace(
                rollout, response_mask=rollout.response_mask > 0, finished=rollout.finished > 0
            )
            made = plain.prepare(params, None, rollout, Scores(score), plain.start())
            return jax.grad(lambda params: loss.loss(params, loss.with_weights(made))[0])(params)

        score = jax.ShapeDtypeStruct((rows,), jnp.float32)
        costs = jax.jit(step).lower(abstract_params(model), rollout, score).compile().cost_analysis()
        return costs["flops"]  # pyright: ignore

    assert operations(SharedPrompts(plain, 8)) < 0.25 * operations(plain)


def test_bad_rows_and_lengths():
    model = MODELS["attention"]
    with pytest.raises(ValueError, match="lengths are"):
        SharedPrompts(objective(model), COPIES, lengths=(4, 2))
    rollout, scores = rollout_of(RESPONSES["short"])
    made = objective(model).prepare(weights(model, 0), weights(model, 1), rollout, scores, objective(model).start())
    with pytest.raises(ValueError, match="8 rows; expected whole groups of 3"):
        SharedPrompts(objective(model), 3).loss(weights(model, 0), made)


@pytest.mark.parametrize(
    "changed, said",
    [({"minibatch": 3}, "a multiple of samples_per_prompt"), ({"critic": "policy"}, "share_prompts")],
)
def test_what_a_stage_refuses(changed, said):
    from tiny_experiment import config

    stage = next(stage for stage in config().stages if type(stage).__name__ == "Reinforce")
    sampling = dataclasses.replace(stage.sampling, samples_per_prompt=4)
    fields = {"critic": None, "ppo": GroupPolicy(), "sampling": sampling, "prompts_per_iteration": 3, "minibatch": 12}
    fine = dataclasses.replace(stage, **fields, microbatches=1, ptx=None, share_prompts=True)
    assert fine.share_prompts
    if "critic" in changed:
        changed = {**changed, "ppo": stage.ppo}
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(fine, **changed)
