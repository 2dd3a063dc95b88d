"""The presets against what the systems' own functions return on one small batch.

``EXPECTED`` was computed with each system's code on the batch below (scores 1.5, -0.5, 7). The whole reference file,
where it is beside the checkout, is compared to 1e-5 as well.
"""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import presets
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops import kl, losses, returns
from rlhf_jax.ops.kl import AdaptiveKL, FixedKL
from rlhf_jax.types import Rollout

MASK = np.arange(6) < np.array([[6], [4], [3]])
LOGP_OLD = [[-1.0, -0.5, -2.0, -1.5, -0.7, -0.9], [-0.3, -1.2, -0.8, -0.4, 0, 0], [-2.5, -0.6, -1.1, 0, 0, 0]]
LOGP_REF = [[-1.2, -0.4, -2.5, -1.0, -0.9, -1.3], [-0.5, -1.0, -1.4, -0.6, 0, 0], [-2.0, -0.9, -1.0, 0, 0, 0]]
LOGP_NEW = [[-0.9, -0.6, -1.6, -1.5, -0.75, -1.2], [-0.2, -1.5, -0.8, -0.35, 0, 0], [-2.4, -0.6, -0.8, 0, 0, 0]]
VALUE_OLD = [[0.1, 0.2, 0.0, -0.1, 0.3, 0.5], [0.4, 0.1, -0.2, 0.6, 0, 0], [-0.3, 0.2, 0.7, 0, 0, 0]]
VALUE_NEW = [[0.5, 0.1, 0.1, -0.4, 0.2, 0.9], [0.3, 0.5, -0.2, 0.3, 0, 0], [-0.2, 0.1, 0.2, 0, 0, 0]]
SCORE = [1.5, -0.5, 7.0]

# The batch's own numbers, in place of each system's defaults.
BATCH = dict(kl=FixedKL(0.1), gamma=1.0, lam=0.95, clip=0.2, clip_high=None, value_clip=0.2)
PRESETS = {
    "OpenRLHF": presets.openrlhf,
    "verl(use_kl_in_reward, kl=k1)": presets.verl,
    "TRL<=v1.10 PPOTrainer (score at first PAD slot; value at that slot assumed 0.25 old/0.30 new)": presets.trl,
    "trlx": presets.trlx,
    "DeepSpeed-Chat": presets.deepspeed_chat,
    "safe-rlhf PPO": presets.safe_rlhf,
    "ColossalChat": presets.colossalchat,
    "NeMo-Aligner (|k1| KL)": presets.nemo_aligner,
    "NeMo-RL (use_kl_in_reward, k1)": dataclasses.replace(presets.nemo_rl, kl_placement="reward", kl_estimator="k1"),
}
SLOT_AFTER = {name: (0.25, 0.30) for name in PRESETS if name.startswith("TRL")}
EXPECTED = {  # policy loss, value loss, advantages used in row 1 (None: the system stops before that)
    "OpenRLHF": (-0.03977794, 5.53573157, [-0.99241355, -0.88475819, -0.78703449, -1.08190964, 0, 0]),
    "verl(use_kl_in_reward, kl=k1)": (-0.03821741, 5.53573122, [-0.9534801, -0.85004818, -0.75615828, -1.03946517]),
    list(SLOT_AFTER)[0]: (-0.03830715, 5.89142638, [-0.96912967, -0.8594789, -0.7598519, -1.05775053]),
    "trlx": (-0.25071168, 5.53573122, [-0.87075331, -0.75461228, -0.64918574, -0.96730371]),
    "DeepSpeed-Chat": (-1.40881276, 2.7719087, [-0.85697563, -0.5652375, -0.30025, -1.095, -0.5]),
    "safe-rlhf PPO": (-2.51470874, 7.7252556, [-0.87841, -0.5878, -0.324, -1.12]),
    "ColossalChat": (-4.55352581, 19.24735753, [-2.30466, -1.5628, -0.824, -1.12]),
}


def rollout(finished=(True, True, True)) -> Rollout:
    return Rollout(
        tokens=jnp.ones((3, 8), jnp.int32),
        prompt_lengths=jnp.full(3, 2),
        response_mask=jnp.asarray(MASK),
        logprobs=jnp.asarray(LOGP_OLD),
        finished=jnp.asarray(finished),
        index=jnp.arange(3),
        policy_step=jnp.asarray(0),
    )


def with_slot_after(values, value) -> np.ndarray:
    """``values`` with ``value`` in the slot behind each row's last token."""
    out = np.array(values, np.float32)
    out[1, 4] = out[2, 3] = value
    return out


def run(name: str, ppo: PPO):
    old, new = SLOT_AFTER.get(name, (0.0, 0.0))
    values, new_values = with_slot_after(VALUE_OLD, old), with_slot_after(VALUE_NEW, new)
    experience = ppo.prepare(rollout(), jnp.asarray(SCORE), jnp.asarray(LOGP_REF), values, ppo.kl.coef)
    experience = ppo.with_weights(experience)
    policy, metrics = ppo.policy_loss(jnp.asarray(LOGP_NEW), jnp.zeros((3, 6)), experience)
    value, more = ppo.value_loss(new_values, experience)
    return experience, policy, value, metrics | more


@pytest.mark.parametrize("name", EXPECTED)
def test_preset_reproduces_its_system_by_hand_entered_numbers(name):
    experience, policy, value, _ = run(name, dataclasses.replace(PRESETS[name], **BATCH))
    expected_policy, expected_value, row = EXPECTED[name]
    np.testing.assert_allclose(policy, expected_policy, atol=1e-5)
    np.testing.assert_allclose(value, expected_value, atol=1e-5)
    np.testing.assert_allclose(experience.advantages[1, : len(row)], row, atol=1e-5)


def test_four_agreeing_systems_by_hand_entered_numbers():
    experience, _, _, metrics = run("OpenRLHF", dataclasses.replace(presets.openrlhf, **BATCH))
    raw = experience.returns - experience.values
    np.testing.assert_allclose(experience.rewards[0], [-0.02, 0.01, -0.05, 0.05, -0.02, 1.46], atol=1e-6)
    np.testing.assert_allclose(raw[0], [1.0393846, 1.0098785, 1.26303, 1.4874, 1.092, 0.96], atol=1e-5)
    np.testing.assert_allclose(raw[2], [6.691275, 6.4645, 6.31, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(metrics["ppo/clip_fraction"], 3 / 13, atol=1e-6)
    np.testing.assert_allclose(metrics["ppo/approx_kl"], -0.02307692, atol=1e-6)


AGGREGATIONS = {
    "token-mean": -0.03821741,
    "seq-mean-token-sum": -0.16560876,
    "seq-mean-token-mean": -0.23417384,
    "seq-mean-token-sum-norm": -0.08280438,
}


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregations_of_verl(mode):
    ppo = dataclasses.replace(presets.verl, **BATCH, aggregation=mode)
    np.testing.assert_allclose(run("verl", ppo)[1], AGGREGATIONS[mode], atol=1e-6)


@pytest.fixture(scope="module")
def cases(shared):
    return json.loads((shared / "parity" / "preference_optimization_cases.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reproduces_every_number_of_its_system(cases, name):
    expected = cases["systems"][name]
    experience, policy, value, metrics = run(name, dataclasses.replace(PRESETS[name], **BATCH))
    k1 = kl.k1(experience.logprobs, experience.ref_logprobs)
    got = {
        "kl": k1,
        "token_rewards": experience.rewards,
        "adv_raw": experience.returns - experience.values,
        "returns": experience.returns,
        "adv_used": experience.advantages,
        "policy_loss": policy,
        "value_loss": value,
        "clipfrac": metrics["ppo/clip_fraction"],
        "ppo_kl": metrics["ppo/approx_kl"],
        "max_ratio": jnp.max(metrics["ppo/ratio_max_deviation"]) + 1,
    }
    compared = [key for key in expected if key in got]
    assert len(compared) >= 3
    for key in compared:
        np.testing.assert_allclose(got[key], expected[key], atol=1e-5, err_msg=f"{name}: {key}")


def test_inputs_are_those_of_the_reference(cases):
    inputs = cases["inputs"]
    for mine, key in [(LOGP_OLD, "logp_old"), (LOGP_REF, "logp_ref"), (LOGP_NEW, "logp_new"), (MASK, "mask"),
                      (VALUE_OLD, "value_old"), (VALUE_NEW, "value_new"), (SCORE, "score")]:  # fmt: skip
        np.testing.assert_array_equal(np.asarray(mine, float), inputs[key], err_msg=key)


def test_aggregations_of_the_reference(cases):
    verl = cases["systems"]["verl(use_kl_in_reward, kl=k1)"]
    assert {mode: verl[f"policy_loss[{mode}]"] for mode in AGGREGATIONS} == pytest.approx(AGGREGATIONS, abs=1e-8)


def test_miscellaneous_numbers_of_the_reference(cases):
    misc = cases["misc"]
    x, everywhere = jnp.arange(1.2, 2.05, 0.1).reshape(3, 3), jnp.ones((3, 3), bool)
    for variance in ("biased", "unbiased"):
        whitened = returns.whiten(x, everywhere, shift_mean=False, variance=variance)
        np.testing.assert_allclose(whitened, misc[f"whiten_{variance}_shift_mean_false"], atol=1e-5)
    case = misc["kl_k1_k2_k3_unclamped"]
    logprobs, ref = jnp.asarray(case["logp"], jnp.float32), jnp.asarray(case["ref"], jnp.float32)
    for name, estimator in {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}.items():
        # float32 holds 420.5 and exp(29) - 30 to seven digits
        np.testing.assert_allclose(estimator(logprobs, ref), case[name], rtol=1e-6)
    case = misc["adaptive_kl"]
    controller = AdaptiveKL(case["init"], case["target"], case["horizon"])
    coef, coefs = controller.init(), []
    for current in case["currents"]:
        coef = controller.update(coef, jnp.asarray(float(current)), case["n_steps"])
        coefs.append(float(coef))
    np.testing.assert_allclose(coefs, case["values"], atol=1e-7)


def test_reward_model_numbers_of_the_reference(cases):
    case = cases["extra"]["rm_pairwise"]
    chosen, rejected, margin = (jnp.asarray(case[key]) for key in ("chosen", "rejected", "margin"))
    assert jnp.mean(losses.pairwise_loss(chosen, rejected)) == pytest.approx(case["OpenRLHF/TRL no margin"], abs=1e-6)
    assert jnp.mean(losses.pairwise_loss(chosen, rejected, margin)) == pytest.approx(
        case["OpenRLHF/TRL margin"], abs=1e-6
    )
    case = cases["extra"]["rm_kway_analytic"]
    scores = jnp.asarray([case["scores best->worst"]] * 2)
    mean, tied = losses.ranking_loss(scores, jnp.asarray([[0, 1, 2, 3], [0, 1, 1, 2]]))
    assert mean == pytest.approx(case["InstructGPT mean over C(4,2)=6 pairs"], abs=1e-6)
    assert mean * 6 == pytest.approx(case["sum over pairs"], abs=1e-5)
    assert tied == pytest.approx(case["with tie between ranks 2,3 dropped (5 pairs mean)"], abs=1e-6)
