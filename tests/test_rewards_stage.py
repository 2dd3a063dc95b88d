"""Composed rewards in a stage: models and plain Python together, steps, dropped responses, and faults by name."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_experiment
from test_metrics_table import documented

from rlhf_jax import experiment as programs
from rlhf_jax.data.tables import prompt_table
from rlhf_jax.errors import UserError
from rlhf_jax.models import ScalarModel, init_params
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.policy import Controller, PolicyOptimization
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.overview import stage_size
from rlhf_jax.planning.programs import stage_programs
from rlhf_jax.rewards import (
    Arithmetic,
    Ensemble,
    ExactMatch,
    Format,
    Gate,
    Learned,
    Length,
    Process,
    Repetition,
    Rubric,
    StepRule,
    Sum,
)
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.sharding import Placement
from rlhf_jax.stages import judging
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.judging import jury, load_models, ready
from rlhf_jax.stages.outputs import Output, load_output, save_output
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.responses import Prompts
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.types import Context, Scores

TINY = tiny_experiment.config()
MODEL = TINY.model
SAMPLING = Sampling(max_new_tokens=6, samples_per_prompt=2)
PASSES = ("score_rollout", "score_tokens", "score_continuations")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """A language model and two reward models, untrained."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = TINY.tokenizer
    scalar = ScalarModel(MODEL.clone(parent=None), head_init="reward")
    init = {kind: jax.jit(lambda key, kind=kind: init_params(kind, key)) for kind in (MODEL, scalar)}
    for seed, (name, model) in enumerate({"lm": MODEL, "one": scalar, "two": scalar}.items()):
        save_output(folder / name, Output(model, init[model](jax.random.key(seed)), tokenizer, {}))
    return {name: str(folder / name) for name in ("lm", "one", "two")}


@dataclasses.dataclass(frozen=True)
class Half:
    """Raises for responses of odd length; where it does not, counts vowels."""

    def rewards(self, answers):
        if any(len(answer.text) % 2 for answer in answers):
            raise ArithmeticError("odd")
        return np.array([sum(letter in "aeiou" for letter in answer.text) for answer in answers], np.float64)


@dataclasses.dataclass(frozen=True)
class Vowels:
    name: str = "vowels"

    def golds(self, prompts, responses):
        return np.array([sum(letter in "aeiou" for letter in response) for response in responses], np.float64)


def rubric(saved) -> Rubric:
    return Rubric(saved["lm"], "a{prompt}b{response}", (("c", 1.0), ("de", -1.0)), length=16)


def everything(saved) -> Sum:
    return Sum(
        (
            Ensemble((Learned(saved["one"]), Learned(saved["two"])), "uncertainty", coef=0.5),
            Gate(Vowels(), when=Format("[a-u]*")),
            StepRule(Length(high=1, unit="characters", penalty=0.25), at="b"),
            Process(saved["two"], at="c", name="process"),
            rubric(saved),
        ),
        weights=(1.0, 0.5, 1.0, 0.1, 2.0),
    )


def stage(saved, **changes) -> Reinforce:
    values = dict(
        policy=saved["lm"], reward=Sum((everything(saved), Half())), critic=None, prompts=TINY.stages[3].prompts,
        prompt_length=1, sampling=SAMPLING, ppo=GroupPolicy(process="group"), optimizer=Optimizer(1e-3), iterations=1,
        prompts_per_iteration=4, minibatch=8, gold=Sum((Vowels("letters"), Learned(saved["one"], "held_out"))),
        rows_at_a_time=4, offload=("reward",), on_error="drop", name="alone",
    )  # fmt: skip
    return Reinforce(**(values | changes))


def run(stage: Reinforce, folder: Path):
    programs.run(dataclasses.replace(TINY, stages=(stage,), evaluation=None), folder)
    return read_metrics(folder / stage.name / "metrics.jsonl")


@pytest.fixture(scope="module")
def passes():
    """How often each kind of model was run; ``row`` counts."""
    return collections.Counter()


@pytest.fixture(scope="module")
def row(saved, passes, tmp_path_factory):
    """The metrics of one iteration with all kinds of rewards."""

    def counted(name, function):
        def call(*arguments, **options):
            passes[name] += 1
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in PASSES:
            patch.setattr(judging, name, counted(name, getattr(judging, name)))
        (found,) = run(stage(saved), tmp_path_factory.mktemp("runs") / "run")
    return found


NAMED = {"one", "two", "vowels", "format", "steps", "process", "rubric", "rubric_mass", "ensemble_spread", "half"}


def test_a_policy_learns_from_all_kinds_of_rewards_but_not_from_what_failed(row):
    assert {name.split("/")[1] for name in row if name.startswith("reward/")} == NAMED | {"dropped"}
    assert {name for name in row if name.startswith("gold/")} == {"gold/letters", "gold/held_out"}
    assert row["alone/gold"] == pytest.approx(row["gold/letters"] + row["gold/held_out"], abs=1e-5)
    assert all(math.isfinite(value) for value in row.values())
    assert row["ppo/first_ratio_deviation"] <= 1e-4
    assert 0 < row["reward/rubric_mass"] < 1 and row["reward/ensemble_spread"] > 0 > row["reward/steps"]
    assert 0 < row["reward/dropped"] < 1
    assert row["group/used"] == pytest.approx(1 - row["reward/dropped"])


def test_a_plan_has_every_pass_of_a_model(row, passes, saved):
    planned = {each.name: each.runs for each in stage_programs(stage(saved), MODEL, Placement(), None).programs}
    found = {name: planned[name] for name in ("score", "process", "rubric")}
    assert dict(passes) == dict(zip(PASSES, found.values(), strict=True))
    assert set(planned) == {*found, "sample", "prepare", "update"}


def test_every_metric_is_documented(row):
    page = documented("Rewards").keys()
    logged = {name for name in row if name.startswith(("reward/", "gold/"))}
    known = {name.replace("NAME", own) for name in page for own in [*NAMED, "letters", "held_out", "ensemble"]}
    assert logged <= known and "reward/dropped" in page


@pytest.fixture(scope="module")
def judged(saved):
    """A rollout, its answers, and the verdict of each kind of model on it."""
    workspace = dataclasses.replace(TINY, stages=(stage(saved),)).workspace(Path("nowhere"))
    records = TINY.stages[3].prompts[0].records()[:4]  # of the shapes that the run has compiled
    prompts = Prompts(prompt_table(records, workspace.tokenizer, workspace.chat, 1))
    ids = {"eos_id": workspace.tokenizer.eos_id, "pad_id": workspace.tokenizer.pad_id}
    lm = load_output(Path(saved["lm"]))
    rollout = jax.device_get(sample(MODEL, lm.params, prompts.table.rows, SAMPLING, jax.random.key(5), **ids))
    answers = prompts.answers(rollout, workspace.tokenizer)

    def ask(reward, rows=4):
        models = ready(load_models([reward], workspace, "test"), parked=False)
        return jury(reward, models, workspace, rows)(rollout, lambda: answers)

    return rollout, answers, ask


def test_answers_know_their_prompt_and_their_tokens(judged):
    rollout, answers, _ = judged
    for row, answer in enumerate(answers):
        assert answer.number == row // 2 == rollout.index[row]
        assert len(answer.tokens) == rollout.response_mask[row].sum()
        assert answer.prompt == TINY.tokenizer.decode(rollout.tokens[row, :1])


def test_a_process_reward_reads_the_model_at_the_last_token_of_every_step(judged, saved):
    """Against the model applied to every beginning of a response by itself, read at its end."""
    rollout, answers, ask = judged
    values = ask(Process(saved["two"], at="c")).values
    model, params = (lambda out: (out.model, out.params))(load_output(Path(saved["two"])))
    apply = jax.jit(lambda tokens, length: model.apply({"params": params}, tokens, Context.of_lengths(length, 7)))
    for row in (0, 1, 2, 3):
        expected = np.zeros(6)
        said = answers[row].tokens
        letters = TINY.tokenizer.decode(said)
        ends = [i for i, letter in enumerate(letters) if letter == "c" and letters[:i].strip("c")
                and not (i and letters[i - 1] == "c")]  # fmt: skip
        if letters[ends[-1] + 1 if ends else 0 :].strip("c"):
            ends.append(len(said) - 1)
        for end in ends:
            length = 1 + end + 1
            expected[end] = apply(rollout.tokens[row : row + 1, :7], np.array([length]))[0, length - 1]
        np.testing.assert_allclose(values.tokens[row], expected, atol=1e-5)


def test_a_rubric_is_scored_by_the_products_of_its_answers_tokens(judged, saved):
    """Against softmax over the vocabulary, token by token, in numpy."""
    _, answers, ask = judged
    found, tokenizer = ask(rubric(saved)), TINY.tokenizer
    lm = load_output(Path(saved["lm"]))
    apply = jax.jit(
        lambda tokens, length: MODEL.apply({"params": lm.params}, tokens, Context.of_lengths(length, 16))[0]
    )
    for row in (0, 5):
        question = tokenizer.encode(f"a{answers[row].prompt}b{answers[row].text}")
        chances = []
        for option in ("c", "de"):
            own = [*tokenizer.encode(option), tokenizer.eos_id]
            tokens = np.full((1, 16), tokenizer.pad_id, np.int32)
            tokens[0, : len(question) + len(own)] = question + own
            logits = np.asarray(apply(tokens, np.array([len(question) + len(own)])))[0]
            p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            chances.append(np.prod([p[len(question) - 1 + i, token] for i, token in enumerate(own)]))
        assert found.values.score[row] == pytest.approx((chances[0] - chances[1]) / sum(chances), abs=1e-4)


def test_rows_at_a_time_change_no_score(judged, saved):
    ask = judged[2]
    one, other = (ask(saved["one"], rows).values for rows in (None, 4))
    np.testing.assert_allclose(one.score, other.score, atol=1e-5)


def test_a_run_stops_at_the_first_response_whose_reward_fails(judged):
    with pytest.raises(UserError, match=r"reward 'half', prompt \d+: rewards\(\) raised ArithmeticError \(odd\) for '"):
        judged[2](Half())


def test_ppo_is_given_what_the_rewards_say(judged, saved):
    """The values of steps, the score and who is used come through to its experience."""
    rollout, _, ask = judged
    found = ask(Process(saved["two"], at="c")).values
    used = np.arange(len(rollout.tokens)) != 3

    class NoCritic:
        policy = MODEL

        def values(self, params, rollout, mask):
            return jax.numpy.zeros(mask.shape)

    objective = PolicyOptimization(PPO(kl=FixedKL(0.0)), NoCritic(), SAMPLING)  # pyright: ignore[reportArgumentType]
    scores = Scores(np.full(len(used), 2.0), found.tokens, steps=found.steps, used=used)  # pyright: ignore
    params = load_output(Path(saved["lm"])).params
    experience = jax.device_get(jax.jit(objective.prepare)(None, params, rollout, scores, Controller(np.float32(0.0))))
    expected = found.tokens.copy()
    expected[np.arange(len(used)), rollout.response_mask.sum(axis=1) - 1] += 2
    np.testing.assert_allclose(experience.rewards, expected, atol=1e-5)
    assert experience.used.tolist() == used.tolist()


def test_sizes_count_every_model_once(saved):
    def frozen(reward, gold=None):
        return stage_size(stage(saved, reward=reward, gold=gold), MODEL).frozen_bytes

    none, scalar, language = frozen(Vowels()), frozen(saved["one"]), frozen(rubric(saved))
    assert scalar > language > none
    assert frozen(everything(saved), saved["two"]) - none == 2 * (scalar - none) + language - none


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda s: dict(reward=Vowels(), critic="reward", ppo=PPO()), "critic='reward' without a reward model"),
        (lambda s: dict(reward=Sum((Vowels(), Vowels("x"), Repetition(name="x")))), "two rewards are named 'x'"),
        (lambda s: dict(gold=3.0), "is no reward"),
        (lambda s: dict(on_error="skip"), "'stop' or 'drop'"),
        (lambda s: dict(ppo=GroupPolicy()), "process='none'"),
    ],
)
def test_what_does_not_fit_is_refused(saved, changes, words):
    with pytest.raises(UserError, match=words):
        stage(saved, **changes(saved))


def test_an_evaluation_takes_rewards_without_models(saved):
    assert Evaluation(gold=Sum((Vowels(), Repetition()))).gold is not None
    with pytest.raises(UserError, match="cost reads the model"):
        Evaluation(cost=Sum((Vowels(), saved["one"])))


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda s: ExactMatch(), "prompt 0 has no field 'answer'.*keep="),
        (lambda s: StepRule(Arithmetic(field="sum")), "reward 'steps': prompt 0 has no field 'sum'"),
        (lambda s: Learned(s["lm"]), "a reward model"),
        (lambda s: dataclasses.replace(rubric(s), model=s["one"]), "a language model"),
        (lambda s: dataclasses.replace(rubric(s), length=17), "max_length=16"),
        (lambda s: dataclasses.replace(rubric(s), length=3), "room for a question"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(saved, tmp_path, reward, words):
    broken = stage(saved, reward=reward(saved), gold=None)
    with pytest.raises(UserError, match=words):
        programs.run(dataclasses.replace(TINY, stages=(broken,), evaluation=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_records_that_ask_the_same_must_have_the_same_answer():
    user = [{"role": "user", "content": "a"}]
    table = lambda *answers: Prompts(  # noqa: E731
        prompt_table([{"messages": user, "answer": a} for a in answers], TINY.tokenizer, TINY.chat, 1)
    )
    table(1, 1).check(ExactMatch(), "ppo")
    table(1, 2).check(Vowels(), "ppo")  # reads no record
    with pytest.raises(UserError, match="prompts 0 and 1 ask the same and differ in 'answer'"):
        table(1, 2).check(Sum(("rm", ExactMatch())), "ppo")


def test_a_question_that_does_not_fit_is_named(judged, saved):
    with pytest.raises(UserError, match=r"reward 'rubric', prompt 0: the question about '.*' has more than 4 tokens"):
        judged[2](dataclasses.replace(rubric(saved), length=7))


def test_a_model_that_gives_no_number_is_named(judged, saved, tmp_path):
    good = load_output(Path(saved["one"]))
    broken = jax.tree.map(lambda x: x * np.nan, good.params)
    save_output(tmp_path / "nan", dataclasses.replace(good, params=broken))
    with pytest.raises(UserError, match="reward 'nan', prompt 0: the reward of '.*' is nan"):
        judged[2](str(tmp_path / "nan"))
