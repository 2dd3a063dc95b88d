"""How an iteration comes to its rollout: greedy baselines, further batches for signal; and a critic that warms up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

from rlhf_jax.errors import UserError
from rlhf_jax.experiment import run
from rlhf_jax.objectives import group_presets
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.runs.files import read_rows
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.collecting import against_greedy, chosen_rows, once, until_signal
from rlhf_jax.stages.outputs import load_output
from rlhf_jax.types import Rollout, Scores

TINY = tiny_experiment.config()


def rollout(index) -> Rollout:
    index = jnp.asarray(index)
    mask = jnp.ones((len(index), 1), bool)
    tokens = jnp.stack([index, index], axis=1)
    return Rollout(tokens, jnp.ones_like(index), mask, jnp.zeros(mask.shape), mask[:, 0], index, jnp.asarray(5))


def respond(params, prompts, key, step):
    """Two responses to each of three prompts; prompts whose number three divides have scores that are all equal."""
    index = np.repeat(prompts, 2)
    score = np.where(index % 3 == 0, 1.0, np.arange(6) % 2 + index)
    return lambda: (rollout(index), Scores(score), {"gold": float(index[0])})


def stream(*starts):
    return iter([np.arange(start, start + 3) for start in starts])


def test_groups_with_signal_come_first_in_the_order_in_which_they_were_drawn():
    signal = np.array([False, True, True, False, False, True])
    np.testing.assert_array_equal(chosen_rows(signal, 3, 2), [2, 3, 4, 5, 10, 11])
    np.testing.assert_array_equal(chosen_rows(signal, 4, 2), [0, 1, 2, 3, 4, 5, 10, 11])


@pytest.mark.parametrize("more, batches, groups", [(0, 1, [0, 1, 2]), (1, 2, [1, 2, 10]), (5, 2, [1, 2, 10])], ids=str)
def test_further_batches_replace_groups_without_signal(more, batches, groups):
    prompts, keys = stream(0, 9, 18), []

    def noted(params, batch, key, step):
        keys.append(tuple(np.asarray(jax.random.key_data(key))))
        return respond(params, batch, key, step)

    collect = until_signal(noted, 2, more, Placement())
    found, scores, metrics = collect(None, prompts, jax.random.key(0), jnp.asarray(5))()
    np.testing.assert_array_equal(found.index, np.repeat(groups, 2))
    np.testing.assert_array_equal(found.tokens[:, 0], np.repeat(groups, 2))
    assert scores.score.shape == (6,) and int(found.policy_step) == 5
    assert metrics["group/batches"] == batches and metrics["gold"] == np.mean([0, 9][:batches])
    assert len(set(keys)) == len(keys) == batches
    assert next(prompts)[0] == [0, 9, 18][batches]


def test_responses_without_a_score_carry_no_signal():
    def dropped(params, batch, key, step):
        found, scores, metrics = respond(params, batch, key, step)()
        used = np.array([True, True, True, False, True, True])
        return lambda: (found, dataclasses.replace(scores, used=used), metrics)

    collect = until_signal(dropped, 2, 1, Placement())
    found, _, metrics = collect(None, stream(0, 9), jax.random.key(0), jnp.asarray(5))()
    # Of the first three groups one has equal scores and one a single score; of the next, the second a single one.
    np.testing.assert_array_equal(found.index, np.repeat([0, 2, 11], 2))
    assert metrics["group/batches"] == 2


def test_the_greedy_score_stands_beside_every_sample():
    def greedy(params, prompts, key, step):
        return lambda: (rollout(prompts), Scores(prompts * 10.0), {})

    collect = once(against_greedy(respond, greedy, 2))
    _, scores, metrics = collect(None, stream(3), jax.random.key(0), jnp.asarray(0))()
    np.testing.assert_array_equal(scores.baseline, [30, 30, 40, 40, 50, 50])
    assert metrics == {"gold": 3.0, "group/greedy_score": 40.0}


def stage(**changes):
    plain = {"policy": "pretrain", "reward": tiny_experiment.TASK, "gold": None, "ptx": None, "ema_decay": None}
    return dataclasses.replace(TINY.stages[3], **plain | changes)


def experiment(**changes):
    return dataclasses.replace(TINY, stages=(TINY.stages[0], stage(**changes)), evaluation=None)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    run(dataclasses.replace(TINY, stages=TINY.stages[:1], evaluation=None), folder / "run")
    return folder / "run/pretrain"


def finished(start, folder, **changes):
    run(dataclasses.replace(TINY, stages=(stage(policy=str(start), **changes),), evaluation=None), folder)
    return read_rows(folder / "ppo/metrics.jsonl")


def test_remax_and_dynamic_sampling_in_a_stage(start, tmp_path):
    rows = finished(start, tmp_path / "remax", critic=None, ppo=group_presets.remax)
    assert all({"group/greedy_score", "ppo/score"} <= row.keys() for row in rows)
    assert rows[-1]["ppo/first_ratio_deviation"] <= 1e-4
    rows = finished(start, tmp_path / "dapo", critic=None, ppo=GroupPolicy(signal_only=True), more_batches=3)
    assert all(1 <= row["group/batches"] <= 4 for row in rows) and max(row["group/batches"] for row in rows) > 1


def test_the_policy_waits_while_the_critic_warms_up(start, tmp_path):
    rows = finished(start, tmp_path / "run", critic="policy", ppo=PPO(), critic_warmup=3, iterations=4)
    assert all(abs(row["kl/k3"]) < 1e-9 and row["ppo/ratio_max_deviation"] < 1e-4 for row in rows[:3])
    assert rows[2]["ppo/value_mean"] != 0 and rows[3]["ppo/ratio_max_deviation"] > 1e-4
    finished(start, tmp_path / "whole", critic="policy", ppo=PPO(), critic_warmup=4)
    before, after = (load_output(path).params for path in (start / "output", tmp_path / "whole/ppo/output"))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"critic": "shared", "ppo": PPO(), "critic_warmup": 1}, "critic_warmup=1.*critic of its own"),
        ({"critic": "policy", "ppo": PPO(), "critic_warmup": 5}, "critic_warmup=5.*number of iterations"),
        ({"critic": "policy", "ppo": PPO(), "more_batches": 1}, "more_batches=1.*GroupPolicy"),
        ({"critic": None, "ppo": GroupPolicy(), "more_batches": -1}, "more_batches=-1.*0 or more"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        stage(**changes)
