"""Safe RLHF as stages: tiny runs on the fireworks, resumed bit for bit, their page of metrics, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import test_reinforcement as loop
from test_metrics_table import documented

from rlhf_jax import experiment as programs
from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.safety import SafetyPairs, SafetyRankings
from rlhf_jax.data.tasks.base import TaskCosts, TaskPrompts, TaskRankings, TaskSafety, TaskTexts
from rlhf_jax.data.tasks.fireworks import ALPHABET, Fireworks
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, ScalarModel, Transformer, count_params
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.lagrangian import LagrangianOptimization, TwoCritics
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.objectives.scaling import RunningScale
from rlhf_jax.ops.kl import AdaptiveKL
from rlhf_jax.ops.lagrange import Lagrangian, Shaping
from rlhf_jax.overview import stage_size
from rlhf_jax.planning.programs import stage_programs
from rlhf_jax.rewards.base import Values
from rlhf_jax.rewards.verdict import Verdict
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.cost import TrainCost
from rlhf_jax.stages.costs import Cost, with_costs
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.outputs import load_output
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.types import Scores

TASK = Fireworks(4)
COSTS = TaskCosts(TASK)
METHOD = Lagrangian(threshold=0.1, start=0.5, rate=0.4, window=12)
PLACES = (TaskPrompts(TASK, 8),)


def training() -> Training:
    return Training(steps=2, batch=4, length=8, optimizer=Optimizer(1e-2), log_every=1, save_every=2)


def safe(**changes) -> Reinforce:
    values = dict(
        policy="clone", prompts=PLACES, prompt_length=1, sampling=Sampling(max_new_tokens=5),
        ppo=PPO(kl=AdaptiveKL(0.1, target=1e-3, horizon=100)), optimizer=Optimizer(1e-2, groups={"cost_critic": 2e-2}),
        iterations=3, prompts_per_iteration=8, minibatch=4, epochs=1, save_every=2, name="safe",
        cost=Cost(by=METHOD, gold=COSTS),
    )  # fmt: skip
    return Reinforce(**(values | changes))


CLONE = Pretrain(name="clone", train=training(), data=(TaskTexts(TASK, 20),))
MODELS = (
    TrainReward(init="clone", train=training(), data=(TaskRankings(TASK, 8),)),
    TrainCost(init="clone", train=training(), data=(TaskSafety(TASK, 8),), heldout=(TaskSafety(TASK, 6, seed=5),)),
)  # fmt: skip


def experiment(*stages, **changes) -> Experiment:
    model = Transformer(vocab_size=len(ALPHABET) + 2, d_model=8, pattern=(Block(Attention(heads=1), MLP(16)),),
                        max_length=8, init_std=0.1)  # fmt: skip
    values = dict(name="safe", tokenizer=CharTokenizer(ALPHABET), chat=PLAIN, model=model, stages=stages)
    return Experiment(**(values | changes))


EVALUATION = Evaluation(
    prompts=PLACES, prompt_length=1, sampling=Sampling(max_new_tokens=5), gold=TASK, cost=COSTS, baseline="clone",
    rankings=(TaskRankings(TASK, 4, seed=7),), ranking_length=8, batch=8,
)  # fmt: skip
WHOLE = experiment(CLONE, *MODELS, safe(), evaluation=EVALUATION)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "safe"
    return folder, programs.run(WHOLE, folder)


def test_a_run_with_learned_models_learns_from_the_policy_that_sampled(finished):
    folder, _ = finished
    rows = read_metrics(folder / "safe" / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["ppo/first_ratio_deviation"] <= 1e-4
        assert all(math.isfinite(value) for value in row.values())


def test_multiplier_and_window_follow_the_costs(finished):
    rows = read_metrics(finished[0] / "safe" / "metrics.jsonl")
    log_multiplier = math.log(0.5)
    for i, row in enumerate(rows):
        if i == 0:  # the window holds one rollout and a half
            assert row["cost/window"] == pytest.approx(row["cost/mean"], rel=1e-4)
        log_multiplier += 0.4 * math.exp(log_multiplier) * (row["cost/window"] - 0.1)
        assert row["cost/multiplier"] == pytest.approx(math.exp(log_multiplier), rel=1e-5)
    assert rows[-1]["cost/multiplier"] != pytest.approx(0.5, rel=1e-4)


def test_every_metric_is_documented(finished):
    folder, summary = finished
    logged = {name for row in read_metrics(folder / "safe" / "metrics.jsonl") for name in row} - {"step"}
    of_cost = {name for name in logged if name.startswith("cost/")}
    assert of_cost == set(documented("Costs")) - {"cost/unshaped_score"}
    assert logged - of_cost <= {name.replace("STAGE", "safe") for name in documented("PPO")}
    trained = {name for row in read_metrics(folder / "cost" / "metrics.jsonl") for name in row} - {"step"}
    assert trained == {name.replace("STAGE", "cost") for name in documented("Cost model")}
    assert {"cost", "unsafe"} <= set(documented("The evaluation at the end of a run"))
    assert {"gold", "cost", "unsafe", "score"} <= set(summary["evaluation"]["safe"])


def test_a_cost_model_is_no_reward(finished):
    folder, summary = finished
    assert load_output(folder / "cost" / "output").notes["costs"] is True
    assert "pair_accuracy" in summary["evaluation"]["reward"] and "cost" not in summary["evaluation"]
    with pytest.raises(UserError, match="trains a cost model.*expected a reward model"):
        experiment(CLONE, *MODELS, safe(reward="cost"))
    with pytest.raises(UserError, match="trains a reward model.*expected a cost model"):
        experiment(CLONE, *MODELS, safe(cost=Cost(of="reward")))


def test_multiplier_and_window_are_resumed_to_the_bit(tmp_path):
    """The loop of reinforcement learning with numbers in the place of models, and the objective's own controller."""
    models = TwoCritics(WHOLE.model, ScalarModel(WHOLE.model), ScalarModel(WHOLE.model))
    method = LagrangianOptimization(PPO(), models, Sampling(max_new_tokens=5), METHOD)

    def prepare(params, rollout, scores, controller):
        dual = METHOD.update(controller.dual, scores.cost)
        told = {
            "kl/sequence": jnp.mean(scores.score),
            "cost/multiplier": dual.multiplier,
            "cost/window": dual.mean_cost,
        }
        return loop.Experience(scores.score, jnp.full(loop.ROWS, dual.multiplier)), told

    def collected(rollout):
        return Scores(rollout.logprobs.sum(axis=1), cost=jnp.tanh(rollout.logprobs[:, 0])), {}

    changes = dict(
        prepare=prepare, collect=loop.collect(collected), start=method.start(),
        control=lambda controller, scores, metrics: method.control(controller, metrics, loop.ROWS, scores),
    )  # fmt: skip
    folders = tmp_path / "whole", tmp_path / "parts"
    for folder in folders:
        folder.mkdir()
    whole = loop.run(folders[0], **changes)
    with pytest.raises(Killed):
        loop.run(folders[1], on_row=disturb, **changes)
    resumed = loop.run(folders[1], **changes)
    assert float(whole.params["w"]) == float(resumed.params["w"])
    one, other = (loop.rows(folder) for folder in folders)
    assert one == other and len({row["cost/multiplier"] for row in one}) == 4


class Killed(BaseException):
    pass


def disturb(row):
    if row["step"] == 3:
        raise Killed


def test_a_fixed_weight_is_taken_off_the_score_of_every_method(tmp_path):
    group = dict(critic=None, ppo=GroupPolicy(), sampling=Sampling(max_new_tokens=5, samples_per_prompt=2))
    stage = safe(**group, cost=Cost(of=COSTS, by=Shaping(2.0)))
    judged = with_costs(stage, Told(), Plain(), FixedCosts(), None, Told())
    scores, metrics = judged(Told())
    np.testing.assert_allclose(scores.score, [1 - 2 * 0.5, 2 + 2 * 0.25])
    np.testing.assert_allclose(scores.cost, [0.5, -0.25])
    expected = {"a": 1.0, "cost/mean": 0.125, "cost/unsafe": 0.5, "cost/unshaped_score": 1.5}
    assert metrics == expected and set(expected) - {"a"} <= set(documented("Costs"))


class Told:
    """In the place of what a jury without texts does not ask."""

    tokenizer = None


class Plain:
    """A judge without costs."""

    def begin(self, part, said):
        return lambda: None

    def conclude(self, rollout, found):
        return Scores(np.float32([1, 2])), {"a": 1.0}


class FixedCosts:
    """In the place of a jury."""

    def begin(self, part, answers):
        return lambda: np.array([0.5, -0.25])

    def conclude(self, heard):
        return Verdict(Values(heard[0]), np.ones(2, bool), {})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(critic=None, ppo=GroupPolicy()), "two separate critics"),
        (dict(critic="shared", cost=Cost(of=COSTS)), "two separate critics"),
        (dict(cost=Cost(of=COSTS)), "cost critic starts from"),
        (dict(ppo=PPO(score_scale=RunningScale())), "score_scale with a Lagrangian"),
    ],
)
def test_what_does_not_fit_is_refused(changes, word):
    changes |= {"sampling": Sampling(max_new_tokens=5, samples_per_prompt=2)}
    with pytest.raises(UserError, match=word):
        safe(**changes)


def test_a_reward_model_of_another_run_is_no_cost(finished, tmp_path):
    folder = finished[0]
    stage = safe(policy=str(folder / "clone"), reward=str(folder / "reward"),
                 cost=Cost(of=str(folder / "reward"), by=METHOD))  # fmt: skip
    with pytest.raises(UserError, match="is no cost model.*TrainCost"):
        programs.run(experiment(stage), tmp_path / "run")


def test_sizes_and_plans_hold_three_models():
    model = WHOLE.model
    size = stage_size(safe(), model)
    assert size.trained == count_params(model) + 2 * count_params(ScalarModel(model))
    for stage in (MODELS[1], safe()):
        planned = stage_programs(stage, model, Placement(), None)
        assert planned.programs[-1].name == "update"


PAIR = {"prompt": "a", "response_0": "RB", "response_1": "ts", "is_response_0_safe": False,
        "is_response_1_safe": True, "safer_response_id": 1}  # fmt: skip
RANKING = {"prompt": "a", "responses": ["RB", "ts"], "ranks": [2, 1], "unsafe": [True, False]}


def read(tmp_path, source, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return source(str(path)).records()[0]


def test_files_become_rankings_with_labels(tmp_path):
    found = read(tmp_path, SafetyPairs, PAIR)
    assert found["ranks"] == [1, 0] and found["unsafe"] == [True, False] and found["responses"] == ["RB", "ts"]
    assert read(tmp_path, SafetyRankings, RANKING) == found
    objects = [{"text": "RB", "rank": 2, "unsafe": True}, {"text": "ts", "rank": 1, "unsafe": False}]
    assert read(tmp_path, SafetyRankings, {"prompt": "a", "responses": objects}) == found


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        (SafetyPairs, {"is_response_1_safe": None}, "is_response_1_safe.*true or false"),
        (SafetyPairs, {"is_response_0_safe": 1}, "is_response_0_safe.*true or false"),
        (SafetyPairs, {"safer_response_id": 2}, "safer_response_id.*0 or 1"),
        (SafetyRankings, {"unsafe": [True]}, "2 responses with 1 labels"),
        (SafetyRankings, {"unsafe": [True, "no"]}, r"unsafe\[1\].*true or false"),
    ],
)
def test_bad_labels_are_named(tmp_path, source, changes, words):
    row = (PAIR if source is SafetyPairs else RANKING) | changes
    with pytest.raises(UserError, match=f"rows.jsonl:1.*{words}"):
        read(tmp_path, source, row)


def test_rankings_without_labels_are_named(tmp_path):
    stage = dataclasses.replace(MODELS[1], data=(TextsOnly(),))
    with pytest.raises(UserError, match="ranking 0 has the labels None.*one true or false for each"):
        stage.check(experiment(CLONE, stage).workspace(tmp_path))


@dataclasses.dataclass(frozen=True)
class TextsOnly:
    def records(self):
        return [{"messages": [{"role": "user", "content": "a"}], "responses": ["R", "t"], "ranks": [1, 0]}]
