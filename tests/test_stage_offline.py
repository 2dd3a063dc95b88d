"""ILQL, expert iteration and distillation end to end on the random walks, tiny: outputs, resumption, refusals."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import tiny_experiment
from rich.console import Console
from test_metrics_table import documented
from test_planning_programs import text

from rlhf_jax import config as values
from rlhf_jax import experiment as programs
from rlhf_jax.data.rewarded import Rewarded
from rlhf_jax.data.tasks.base import TaskDemonstrations, TaskPrompts
from rlhf_jax.errors import UserError
from rlhf_jax.models.q_heads import GuidedTransformer, without_heads
from rlhf_jax.objectives.distillation import Divergence
from rlhf_jax.overview import show
from rlhf_jax.planning.programs import stage_programs
from rlhf_jax.planning.sampler import EOS, PAD
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.sharding import Placement
from rlhf_jax.stages import best_of_n, rollouts
from rlhf_jax.stages.best_of_n import ExpertIteration, Selection
from rlhf_jax.stages.distill import Distill
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.ilql import ILQL, Steer
from rlhf_jax.stages.outputs import load_output
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.step import make_train_step

TASK = tiny_experiment.TASK
WALKS, STARTS = (TaskDemonstrations(TASK, 40),), (TaskPrompts(TASK, 8),)
TINY = tiny_experiment.config()
OFFLINE = ILQL(train=tiny_experiment.training(steps=2), data=WALKS, init=None, reward=TASK, beta=2.0)
SAMPLING = Sampling(max_new_tokens=10, samples_per_prompt=3)
"""One for both stages, and for two prompts at once, so that it is compiled once."""
EXPERT = ExpertIteration(
    policy="ilql", reward=TASK, prompts=STARTS, prompt_length=1, sampling=SAMPLING,
    selection=Selection(keep=2, distinct=True), optimizer=Optimizer(1e-2), rounds=3, prompts_per_round=4,
    prompts_at_a_time=2, minibatch=4, restart=True, export=True, gold=TASK,
)  # fmt: skip
DISTILL = Distill(
    student="ilql", teacher="ilql", prompts=STARTS, prompt_length=1, sampling=SAMPLING, on_policy=0.5, data=WALKS,
    optimizer=Optimizer(1e-2), iterations=4, prompts_per_iteration=2, minibatch=3, gold=TASK, save_every=1,
)  # fmt: skip
EXPERIMENT = dataclasses.replace(
    TINY,
    stages=(OFFLINE, EXPERT, DISTILL, Steer(beta=50.0, name="steered")),
    evaluation=Evaluation(
        prompts=STARTS, prompt_length=1, sampling=Sampling(max_new_tokens=6, samples_per_prompt=3), gold=TASK,
        baseline="steered", best_of=(1, 2), batch=8,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """Of the programs of expert iteration; ``finished`` fills it."""
    return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("runs") / "offline"

    def make(*arguments, **options):
        step = make_train_step(*arguments, **options)

        def told(*arguments):
            texts.setdefault("update", text(step, *arguments))
            return step(*arguments)

        return told

    def draw(model, params, prompts, sampling, key, step, **ids):
        again = lambda p, prompts, key, step: sample(model, p, prompts, sampling, key, step, eos_id=EOS, pad_id=PAD)  # noqa: E731
        texts.setdefault("sample", text(again, params, prompts, key, step))
        return sample(model, params, prompts, sampling, key, step, **ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "make_train_step", make)
        patch.setattr(rollouts, "sample", draw)
        return folder, programs.run(EXPERIMENT, folder)


def leaves(folder, stage):
    return jax.tree.leaves(load_output(folder / stage / "output").params)


def test_ilql_leaves_a_policy_that_steer_steers_and_others_start_from(finished):
    folder, summary = finished
    left, steered, student = (load_output(folder / name / "output") for name in ("ilql", "steered", "distill"))
    assert isinstance(left.model, GuidedTransformer) and (left.model.beta, steered.model.beta) == (2.0, 50.0)
    assert jax.tree.structure(without_heads(left.params)) == jax.tree.structure(student.params)
    assert student.model == EXPERIMENT.model
    gold = summary["evaluation"]["steered"]
    assert gold["kl"]["value"] == 0  # from itself, sampled and scored as the steered policy
    assert gold["gold_best_of_1"]["value"] == pytest.approx(gold["gold"]["value"])
    assert gold["gold_best_of_2"]["value"] >= gold["gold"]["value"]


def test_kept_responses_read_back_as_demonstrations_with_rewards(finished):
    folder, _ = finished
    rows = read_metrics(folder / "expert" / "metrics.jsonl")
    for number, row in enumerate(rows, start=1):
        records = Rewarded(str(folder / "expert" / f"kept-{number}.jsonl")).records() if row["expert/kept"] else []
        assert len(records) == row["expert/kept"] <= 8
        golds = TASK.golds([r["messages"][:-1] for r in records], [r["messages"][-1]["content"] for r in records])
        np.testing.assert_allclose([r["reward"] for r in records], golds, atol=1e-6)
        assert len({json.dumps(r["messages"]) for r in records}) == len(records) or row["expert/kept"] > 4
        assert row["expert/best_score"] >= row["expert/score"] == pytest.approx(row["expert/gold"])


def test_some_iterations_are_of_the_students_own_responses(finished):
    folder, _ = finished
    own = [row["distill/on_policy"] for row in read_metrics(folder / "distill" / "metrics.jsonl")]
    assert set(own) == {0.0, 1.0}


def test_interrupted_and_resumed_gives_the_same_bits(finished, tmp_path):
    class Killed(BaseException):
        pass

    def disturb(name, step, total, row):
        if (name, step) in left:
            left.remove((name, step))
            raise Killed

    left, whole = [("expert", 2), ("distill", 2)], dataclasses.replace(EXPERIMENT, evaluation=None)
    while left:
        with pytest.raises(Killed):
            programs.run(whole, tmp_path / "run", monitor=disturb, resume=(tmp_path / "run").exists())
    programs.run(whole, tmp_path / "run", resume=True)
    for stage in ("ilql", "expert", "distill"):
        same = zip(leaves(finished[0], stage), leaves(tmp_path / "run", stage), strict=True)
        assert all(np.array_equal(a, b) for a, b in same), stage


@pytest.mark.parametrize(
    ("section", "stage"), [("ILQL", "ilql"), ("Expert iteration", "expert"), ("Distillation", "distill")]
)
def test_every_logged_metric_is_documented(finished, section, stage):
    logged = {name for row in read_metrics(finished[0] / stage / "metrics.jsonl") for name in row} - {"step"}
    assert logged == {name.replace("STAGE", stage) for name in documented(section)}


def test_planned_programs_are_those_that_are_run(finished, texts):
    planned = stage_programs(EXPERT, EXPERIMENT.model, Placement(), None)
    assert [(program.name, program.runs) for program in planned.programs] == [("sample", 2), ("update", 2)]
    for program in planned.programs:
        assert text(program.function, *program.arguments) == texts[program.name], program.name
    # The first policy is held for the sake of restarts.
    assert set(planned.resident) == {"parameters", "optimizer", "start"}


def test_experiment_reads_back_is_shown_and_is_planned():
    assert values.revive(values.describe(EXPERIMENT)) == EXPERIMENT
    out = io.StringIO()
    show(EXPERIMENT, Console(file=out, width=240))
    for words in ("4 rows x 16 tokens", "beta = 50.0", "2 prompts x 3 sampled at once; 3 rounds of 8 responses"):
        assert words in out.getvalue()
    for stage in (OFFLINE, DISTILL):
        update = stage_programs(stage, EXPERIMENT.model, Placement(), None).programs[-1]
        jax.eval_shape(update.function, *update.arguments)
    with pytest.raises(UserError, match="stage 'steered' is not planned"):
        stage_programs(EXPERIMENT.stages[-1], EXPERIMENT.model, Placement(), None)


def test_what_cannot_be_is_refused(tmp_path):
    replace = dataclasses.replace
    for make, word in (
        (lambda: replace(OFFLINE, train=tiny_experiment.training(ema_decay=0.5)), "ema_decay=0.5"),
        (lambda: replace(EXPERT, selection=Selection(keep=4)), "keep=4 of samples_per_prompt=3"),
        (lambda: replace(EXPERT, minibatch=3), "3 does not divide 8"),
        (lambda: replace(DISTILL, on_policy=1.0), "on_policy=1.0 with 1 sources"),
        (lambda: replace(DISTILL, divergence=Divergence("sampled")), "divergence='sampled'"),
        (lambda: replace(DISTILL, minibatch=4), "4 does not divide 6"),
    ):
        with pytest.raises(UserError, match=word):
            make()
    workspace = EXPERIMENT.workspace(tmp_path)
    with pytest.raises(UserError, match="records without a reward"):
        replace(OFFLINE, reward=None).check(workspace)
    with pytest.raises(UserError, match="response of record 0 has"):
        replace(DISTILL, sampling=Sampling(max_new_tokens=1, samples_per_prompt=3)).check(workspace)
