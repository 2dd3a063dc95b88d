"""Group advantages against loops, hand numbers and what other systems' own functions return."""

from __future__ import annotations

import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import groups
from rlhf_jax.ops.groups import Correction, MovingAverage
from rlhf_jax.ops.returns import whiten

SCORES = [[1.0, 2.0, 6.0, 4.0], [0.0, 0.0, 0.0, 1.0]]
BY_SYSTEM = {  # computed with each system's own code on SCORES
    "verl_grpo(std unbiased,+1e-6)": (
        dict(epsilon=1e-6),
        [-1.01472168, -0.56373427, 1.24021539, 0.33824056, -0.499999, -0.499999, -0.499999, 1.499997],
    ),
    "verl_dr_grpo(no std)": (dict(scale="none"), [-2.25, -1.25, 2.75, 0.75, -0.25, -0.25, -0.25, 0.75]),
    "verl_rloo": (
        dict(baseline="leave-one-out", scale="none"),
        [-3.0, -1.66666667, 3.66666667, 1.0, -0.33333333, -0.33333333, -0.33333333, 1.0],
    ),
    "OpenRLHF group_norm(std unbiased,+1e-9)": (
        dict(epsilon=1e-9),
        [-1.01472214, -0.56373452, 1.24021595, 0.33824071, -0.5, -0.5, -0.5, 1.5],
    ),
    "TRL grpo(scale_rewards=group, +1e-4)": (
        dict(epsilon=1e-4),
        [-1.01467638, -0.5637091, 1.24016002, 0.33822546, -0.49990002, -0.49990002, -0.49990002, 1.49970006],
    ),
    "TRL grpo(scale_rewards=batch)": (
        dict(epsilon=1e-4, scale="batch"),
        [-1.02846445, -0.57136914, 1.2570121, 0.34282148, -0.11427383, -0.11427383, -0.11427383, 0.34282148],
    ),
    "NeMo-RL grpo(leave_one_out=True)": (
        dict(baseline="leave-one-out", scale="leave-one-out", flat="keep"),
        [-1.49999925, -0.66226592, 2.40039522, 0.37796433, -0.57734927, -0.57734927, -0.57734927, 1.0],
    ),
    "NeMo-RL grpo(leave_one_out=False)": (
        dict(flat="keep"),
        [-1.01472167, -0.56373426, 1.24021537, 0.33824056, -0.49999899, -0.49999899, -0.49999899, 1.49999698],
    ),
}


@pytest.fixture(scope="module")
def cases(shared):
    path = shared / "parity" / "preference_optimization_cases.json"
    if not path.is_file():
        pytest.skip("there is no file of other systems' numbers beside this checkout")
    return json.loads(path.read_text())


@pytest.mark.parametrize("system", BY_SYSTEM)
def test_advantages_of_other_systems(system):
    choices, expected = BY_SYSTEM[system]
    np.testing.assert_allclose(groups.group_advantages(jnp.asarray(SCORES), **choices).ravel(), expected, atol=1e-5)


def test_every_group_number_of_the_reference(cases):
    case = cases["extra"]["group_advantages"]
    scores = jnp.asarray(case["rewards"]).reshape(2, 4)
    np.testing.assert_array_equal(scores, SCORES)
    assert case["groups"] == [0] * 4 + [1] * 4
    compared = {"rewards", "groups"}
    for name, (_, expected) in BY_SYSTEM.items():
        assert case[name] == expected
        compared.add(name)
    for loo, of in ((True, "leave-one-out"), (False, "group")):
        for what, got in zip(("baseline", "std"), groups.moments(scores, of=of), strict=True):
            name = f"NeMo-RL {what}(loo={loo})"
            np.testing.assert_allclose(got.ravel(), case[name], atol=1e-5, err_msg=name)
            compared.add(name)
    assert compared == set(case)


def test_groups_of_different_sizes_of_the_reference(cases):
    case = cases["misc"]["rloo_baseline"]
    assert case["prompts"] == [[1], [1], [1], [2], [2]] and all(case["mask"])
    reward, mask = case["reward"], jnp.asarray([[True, True, True], [True, True, False]])
    baseline, _ = groups.moments(jnp.asarray([reward[:3], [*reward[3:], jnp.nan]]), mask, "leave-one-out")
    np.testing.assert_allclose(baseline[mask], case["baseline"], atol=1e-5)


def test_reinforce_plus_plus_of_the_reference(cases):
    case = cases["extra"]["reinforce_pp_verl"]
    mask = jnp.asarray(case["mask"], bool)
    to_go = groups.reward_to_go(jnp.asarray(case["token_rewards"]), mask, case.get("gamma", 1.0))
    np.testing.assert_allclose(to_go, case["returns"], atol=1e-5)
    np.testing.assert_allclose(whiten(to_go, mask), case["advantages"], atol=1e-5)


def test_reward_to_go_by_hand_steps_over_gaps():
    rewards, mask = jnp.asarray([[1.0, 9.0, 2.0, 4.0]]), jnp.asarray([[True, False, True, True]])
    np.testing.assert_allclose(groups.reward_to_go(rewards, mask, 0.5), [[3.0, 0, 4.0, 4.0]])


def plain(rows, of, variance):
    """Mean and deviation of each score by the book; None where the score does not exist."""
    deviation = statistics.stdev if variance == "unbiased" else statistics.pstdev
    everything = [x for row in rows for x in row]
    out = []
    for row in rows:
        out.append([])
        for k in range(len(row)):
            chosen = {"group": row, "leave-one-out": row[:k] + row[k + 1 :], "batch": everything}[of]
            enough = len(chosen) > (1 if variance == "unbiased" else 0)
            out[-1].append((statistics.fmean(chosen) if chosen else 0.0, deviation(chosen) if enough else 0.0))
    return out


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("of", ["group", "leave-one-out", "batch"])
def test_moments_of_ragged_groups_are_those_of_plain_python(of, variance):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=n).tolist() for n in (4, 3, 1, 2)]
    mask = np.arange(4) < np.asarray([[len(row)] for row in rows])
    scores = np.full((4, 4), np.nan, np.float32)
    scores[mask] = np.concatenate(rows)
    mean, std = groups.moments(jnp.asarray(scores), jnp.asarray(mask), of, variance)
    expected = np.asarray([pair for row in plain(rows, of, variance) for pair in row])
    np.testing.assert_allclose(np.stack([mean[mask], std[mask]], -1), expected, atol=1e-6)
    advantages = groups.group_advantages(jnp.asarray(scores), jnp.asarray(mask), baseline=of, scale=of)
    assert not advantages[~mask].any() and np.isfinite(advantages).all()


@pytest.mark.parametrize("of", ["group", "leave-one-out"])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e6])
def test_equal_scores_have_no_advantage_however_small_epsilon_is(value, of):
    scores = jnp.full((2, 7), value)
    assert not groups.moments(scores, of=of)[1].any()
    assert not groups.group_advantages(scores, baseline=of, scale=of, epsilon=1e-12).any()
    # the winner's rest is flat: its difference is kept as it is
    lifted = scores.at[0, 0].add(1.0)
    kept = groups.group_advantages(lifted, baseline="leave-one-out", scale="leave-one-out", flat="keep")
    assert kept[0, 0] == lifted[0, 0] - value


def test_given_baselines_and_moving_average_by_hand():
    greedy = jnp.asarray([[2.0], [1.0]])  # ReMax
    np.testing.assert_array_equal(
        groups.group_advantages(jnp.asarray(SCORES), baseline=greedy, scale="none"),
        [[-1, 0, 4, 2], [-1, -1, -1, 0]],
    )
    average = MovingAverage(decay=0.75, start=1.0)
    baseline = average.update(average.init(), jnp.asarray(5.0))
    assert baseline == 2.0
    np.testing.assert_array_equal(
        groups.group_advantages(jnp.asarray([[1.0, 4.0]]), baseline=baseline, scale="none"), [[-1, 2]]
    )


def test_leave_one_out_is_the_group_mean_times_k_over_k_less_one():
    scores = jax.random.normal(jax.random.key(0), (5, 6))
    loo = groups.group_advantages(scores, baseline="leave-one-out", scale="none")
    np.testing.assert_allclose(loo, groups.group_advantages(scores, scale="none") * 6 / 5, atol=1e-5)


def test_groups_with_signal():
    scores = jnp.asarray([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(groups.carries_signal(scores), [False, True, True])
    mask = jnp.asarray([[True] * 3, [True] * 3, [True, True, False]])
    np.testing.assert_array_equal(groups.carries_signal(scores, mask), [False, True, False])


def test_overlong_penalty_by_hand():
    # limit 20, buffer 4: free up to 16, then -1/4 a token, no more than -1
    lengths = jnp.asarray([1, 16, 17, 18, 20, 25])
    np.testing.assert_allclose(groups.overlong_penalty(lengths, 20, 4, 2.0), [0, 0, -0.5, -1, -2, -2])


MASK = jnp.asarray([[True, True, True], [True, False, False], [False] * 3])


def test_sequence_ratios_by_hand():
    old = jnp.where(MASK, jnp.asarray([[-1.0, -2.0, -3.0]]), jnp.nan)
    new = old + jnp.asarray([[0.3, -0.6, 0.9], [0.5, 7, 7], [7, 7, 7]])
    for level, expected in {
        "token": [[0.3, -0.6, 0.9], [0.5, 0, 0], [0] * 3],
        "sequence-mean": [[0.2] * 3, [0.5, 0, 0], [0] * 3],
        "sequence-sum": [[0.6] * 3, [0.5, 0, 0], [0] * 3],
    }.items():
        np.testing.assert_allclose(groups.sequence_log_ratio(new, old, MASK, level), expected, atol=1e-6)


def test_corrections_by_hand():
    sampler = jnp.zeros((3, 3))
    old = jnp.log(jnp.asarray([[0.5, 3.0, 1.5], [1e-3, 1, 1], [9, 9, 9]]))
    np.testing.assert_allclose(
        Correction(high=2.0)(old, sampler, MASK), [[0.5, 2, 1.5], [1e-3, 1, 1], [1, 1, 1]], rtol=1e-5
    )
    banded = Correction(high=2.0, low=0.4, mode="mask")
    np.testing.assert_allclose(banded(old, sampler, MASK), [[0.5, 0, 1.5], [0, 1, 1], [1, 1, 1]], rtol=1e-5)
    whole = Correction(high=9.0, level="sequence-sum")  # 0.5 * 3 * 1.5
    np.testing.assert_allclose(whole(old, sampler, MASK)[0], [2.25] * 3, rtol=1e-5)
    assert np.isfinite(Correction(mode="mask")(old + 1e4, sampler, MASK)).all()


def test_unknown_words_are_named():
    for call in (
        lambda: groups.moments(jnp.ones((1, 2)), of="row"),  # pyright: ignore[reportArgumentType]
        lambda: groups.moments(jnp.ones((1, 2)), variance="row"),  # pyright: ignore[reportArgumentType]
        lambda: groups.group_advantages(jnp.ones((1, 2)), flat="row"),  # pyright: ignore[reportArgumentType]
        lambda: Correction(mode="row"),  # pyright: ignore[reportArgumentType]
        lambda: Correction(level="row"),  # pyright: ignore[reportArgumentType]
        lambda: groups.sequence_log_ratio(*[jnp.ones((1, 2))] * 2, jnp.ones((1, 2), bool), "row"),  # pyright: ignore
    ):
        with pytest.raises(ValueError, match="'row'"):
            call()
    with pytest.raises(ValueError, match="low"):
        Correction(low=3.0)
    with pytest.raises(ValueError, match="decay"):
        MovingAverage(decay=1.0)
