"""Where updates with a KL penalty end, against formulas: one state, three actions, groups of three, no sampling.

All 27 groups are enumerated and weighted by their probability, so the gradients are exact expectations of the
objectives' own. Maximising ``E r - beta KL(pi, ref)`` ends at ``pi ~ ref exp(r / beta)``.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.types import Rollout

REWARD = np.asarray([1.0, 0.0, 0.4])
REF = np.asarray([0.2, 0.5, 0.3])
BETA, K = 0.5, 3
GROUPS = jnp.asarray(list(itertools.product(range(3), repeat=K)))
IN_REWARD = dict(kl=FixedKL(BETA), kl_estimator="k1", kl_placement="reward")


def gibbs(beta: float) -> np.ndarray:
    """``ref exp(r / beta)``, normalised."""
    weights = REF * np.exp(REWARD / beta)
    return weights / weights.sum()


def reverse(beta: float) -> np.ndarray:
    """The optimum of ``E r - beta KL(ref, pi)``: ``beta ref / (c - r)``, with c such that it adds up to one."""
    low, high = REWARD.max(), REWARD.max() + beta
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(beta * REF / (middle - REWARD)) > 1 else (low, middle)
    return beta * REF / (high - REWARD)


def rollout(logprobs: jax.Array) -> Rollout:
    rows = len(logprobs)
    return Rollout(
        tokens=jnp.zeros((rows, 2), jnp.int32),
        prompt_lengths=jnp.ones(rows, jnp.int32),
        response_mask=jnp.ones((rows, 1), bool),
        logprobs=logprobs[:, None],
        finished=jnp.ones(rows, bool),
        index=jnp.zeros(rows, jnp.int32),
        policy_step=jnp.asarray(0),
    )


def group_loss(group: GroupPolicy, logits: jax.Array) -> jax.Array:
    """The expectation of the loss over groups that the present policy draws."""
    logprobs = jax.nn.log_softmax(logits)
    drawn = jax.lax.stop_gradient(logprobs)[GROUPS]
    actions, weights = GROUPS.ravel(), jnp.repeat(jnp.exp(drawn.sum(axis=1)), K) / K
    ref, score = jnp.log(jnp.asarray(REF))[actions, None], jnp.asarray(REWARD)[actions]
    experience = group.prepare(rollout(drawn.ravel()), score, K, group.start(), ref_logprobs=ref)
    experience = dataclasses.replace(group.with_weights(experience), weights=weights[:, None])
    return group.policy_loss(logprobs[actions, None], jnp.zeros((len(actions), 1)), experience)[0]


def ppo_loss(ppo: PPO, logits: jax.Array) -> jax.Array:
    """The same of PPO with a perfect critic: single actions, and the value of the state."""
    logprobs = jax.nn.log_softmax(logits)
    drawn, ref = jax.lax.stop_gradient(logprobs), jnp.log(jnp.asarray(REF))
    value = jnp.sum(jnp.exp(drawn) * (jnp.asarray(REWARD) - BETA * (drawn - ref)))
    experience = ppo.prepare(
        rollout(drawn), jnp.asarray(REWARD), ref[:, None], jnp.full((3, 1), value), BETA,
    )  # fmt: skip
    experience = dataclasses.replace(ppo.with_weights(experience), weights=jnp.exp(drawn)[:, None])
    return ppo.policy_loss(logprobs[:, None], jnp.zeros((3, 1)), experience)[0]


def optimum(loss) -> np.ndarray:
    """The policy after many small steps from the reference."""
    step = jax.grad(loss)
    logits = jax.jit(lambda x: jax.lax.fori_loop(0, 4000, lambda _, x: x - 0.1 * step(x), x))(jnp.log(jnp.asarray(REF)))
    return np.asarray(jax.nn.softmax(logits))


IN_LOSS = dict(kl=FixedKL(BETA), kl_estimator="k2", scale="none")
CASES = {
    "RLOO": (GroupPolicy(baseline="leave-one-out", scale="none", **IN_REWARD), gibbs(BETA)),
    "RLOO, sequences": (
        GroupPolicy(baseline="leave-one-out", scale="none", ratio="sequence-sum", **IN_REWARD), gibbs(BETA)
    ),
    "REINFORCE": (GroupPolicy(baseline="none", scale="none", **IN_REWARD), gibbs(BETA)),
    "group mean": (GroupPolicy(scale="none", **IN_REWARD), gibbs(BETA)),
    # at the optimum all penalised rewards are equal, whatever they are divided by
    "group mean and deviation": (GroupPolicy(epsilon=0.05, **IN_REWARD), gibbs(BETA)),
    "RLOO, k2 in the loss": (GroupPolicy(baseline="leave-one-out", **IN_LOSS), gibbs(BETA)),
    # a mean that contains the response itself shrinks its advantage by (K - 1) / K, and the penalty not
    "group mean, k2 in the loss": (GroupPolicy(**IN_LOSS), gibbs(BETA * K / (K - 1))),
    # the gradient of k3 on samples is that of KL(ref, pi)
    "RLOO, k3 in the loss": (
        GroupPolicy(baseline="leave-one-out", **(IN_LOSS | {"kl_estimator": "k3"})), reverse(BETA)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_group_methods_end_where_the_formula_says(name):
    group, expected = CASES[name]
    np.testing.assert_allclose(optimum(lambda logits: group_loss(group, logits)), expected, atol=1e-4)


def test_ppo_ends_there_too():
    ppo = PPO(kl=FixedKL(BETA), whiten_advantages=None, lam=1.0)
    np.testing.assert_allclose(optimum(lambda logits: ppo_loss(ppo, logits)), gibbs(BETA), atol=1e-4)


def test_the_formulas_are_optima_and_differ():
    def objective(pi, divergence):
        return pi @ REWARD - BETA * divergence(pi)

    rng = np.random.default_rng(0)
    for pi, divergence in (
        (gibbs(BETA), lambda p: p @ np.log(p / REF)),
        (reverse(BETA), lambda p: REF @ np.log(REF / p)),
    ):
        assert pi.sum() == pytest.approx(1) and (pi > 0).all()
        near = pi * np.exp(0.05 * rng.normal(size=(100, 3)))
        assert all(objective(p / p.sum(), divergence) <= objective(pi, divergence) + 1e-12 for p in near)
    assert np.abs(gibbs(BETA) - reverse(BETA)).max() > 0.02
