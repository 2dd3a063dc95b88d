"""Rollouts in parts, and ahead of updates: what may go on at the same time changes nothing that it should not."""

from __future__ import annotations

import dataclasses
import math
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_reinforcement as loop
import tiny_experiment

from rlhf_jax import experiment as programs
from rlhf_jax.data.tables import prompt_table
from rlhf_jax.errors import DIVERGED, Preempted, UserError
from rlhf_jax.models import ScalarModel, init_params
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.rewards import Learned, Standardise, Sum
from rlhf_jax.rewards.base import Values
from rlhf_jax.runs.files import read_rows
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.stages.collecting import responding
from rlhf_jax.stages.judging import Jury, judge_of, jury
from rlhf_jax.stages.outputs import Output, load_output, save_output
from rlhf_jax.stages.overlap import check_one_device
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.responses import Prompts
from rlhf_jax.stages.samples import SampleLog
from rlhf_jax.training.ahead import Ahead
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.reinforcement import Plan
from rlhf_jax.training.signals import StopSignal
from rlhf_jax.types import Scores

TINY = tiny_experiment.config()
MODEL = TINY.model


@dataclasses.dataclass(frozen=True)
class Vowels:
    """A rule that notes how many responses it is asked about at a time."""

    asked: list = dataclasses.field(default_factory=list, compare=False)

    def rewards(self, answers):
        self.asked.append(len(answers))
        return np.array([sum(letter in "aeiou" for letter in a.text) + a.number for a in answers], np.float64)


@dataclasses.dataclass(frozen=True)
class Letters:
    def golds(self, prompts, responses):
        return np.array([len(set(text)) for text in responses], np.float64)


def stage(**changes) -> Reinforce:
    values = dict(
        policy="start", reward=Letters(), critic=None, prompts=TINY.stages[3].prompts, prompt_length=1,
        sampling=Sampling(max_new_tokens=6, samples_per_prompt=2), ppo=GroupPolicy(), optimizer=Optimizer(1e-2),
        iterations=3, prompts_per_iteration=4, minibatch=8, save_every=1, samples_every=1,
    )  # fmt: skip
    return Reinforce(**(values | changes))


# Parts of a rollout


@pytest.fixture(scope="module")
def respond(tmp_path_factory):
    """``(reward, parts, folder) -> (rollout, scores, metrics)`` of four prompts, by tiny models."""
    scalar = ScalarModel(MODEL.clone(parent=None), head_init="reward")
    params = jax.jit(lambda key: (init_params(MODEL, key), init_params(scalar, key)))(jax.random.key(1))
    models, own = {"rm": (scalar, lambda: params[1])}, stage()
    workspace = dataclasses.replace(TINY, stages=(own,)).workspace(tmp_path_factory.mktemp("parts"))
    table = prompt_table(workspace.read(own.prompts), workspace.tokenizer, workspace.chat, 1, too_long="error")
    rows = table.rows
    asked = dataclasses.replace(
        rows, tokens=rows.tokens[:4], lengths=rows.lengths[:4], index=np.arange(4, dtype=np.int32)
    )

    def draw(params, batch, key, step):
        return sample(MODEL, params, batch, own.sampling, key, step, eos_id=workspace.tokenizer.eos_id,
                      pad_id=workspace.tokenizer.pad_id)  # fmt: skip

    def of(reward, parts, folder):
        samples = SampleLog(folder / "samples.jsonl", 1)
        judge = judge_of(own, workspace, jury(reward, models, workspace), jury(Vowels(), {}, workspace),
                         Prompts(table), samples)  # fmt: skip
        begun = responding(draw, judge, parts)(params[0], asked, jax.random.key(2), jnp.int32(0))
        return jax.device_get(begun())

    return of


def test_parts_are_the_whole(respond, tmp_path):
    found, asked = {}, {}
    for parts in (1, 2):
        rule = Vowels()
        reward = Sum((Standardise(rule), Learned("rm")), (1.0, 0.5))
        folder = tmp_path / str(parts)
        folder.mkdir()
        found[parts], asked[parts] = (*respond(reward, parts, folder), read_rows(folder / "samples.jsonl")), rule.asked
    assert asked == {1: [8], 2: [4, 4]}
    one, two = found[1], found[2]
    for name in ("tokens", "prompt_lengths", "response_mask", "finished", "index", "policy_step"):
        np.testing.assert_array_equal(getattr(one[0], name), getattr(two[0], name))
    np.testing.assert_allclose(one[0].logprobs, two[0].logprobs, atol=1e-5)
    np.testing.assert_allclose(one[1].score, two[1].score, atol=1e-5)
    assert set(one[2]) == {"reward/vowels", "reward/rm", "ppo/gold"}
    assert one[2] == pytest.approx(two[2], abs=1e-5)
    assert [row["response"] for row in one[3]] == [row["response"] for row in two[3]] and len(one[3]) == 4
    assert one[1].score[:4].mean() != pytest.approx(one[1].score[4:].mean(), abs=0.1)  # so parts alone would tell apart


def test_numbers_that_are_means_of_a_part_count_by_its_rows():
    parts = [[(Values(np.ones(1)), {"mass": 0.2})], [(Values(np.ones(3)), {"mass": 1.0})]]
    assert Jury(Vowels(), {}, *[None] * 3).conclude(parts).notes == {"mass": pytest.approx(0.8)}  # pyright: ignore


def test_what_goes_wrong_in_a_later_part_is_named_by_its_place_in_the_rollout(respond, tmp_path):
    with pytest.raises(UserError, match="inf of finite rewards, for response 6 of the rollout"):
        respond(Boundless(), 2, tmp_path)
    with pytest.raises(UserError, match="reward 'fourth', prompt 3"):
        respond(Fourth(math.nan), 2, tmp_path)


@dataclasses.dataclass(frozen=True)
class Fourth:
    """1, or another value, for responses to the fourth prompt; 0 for the others."""

    value: float = 1.0

    def rewards(self, answers):
        return np.array([self.value if a.number == 3 else 0.0 for a in answers])


@dataclasses.dataclass(frozen=True)
class Boundless:
    """Infinite where its member is not 0."""

    members: tuple = (Fourth(),)

    def combine(self, values):
        return Values(np.where(values[0].score > 0, np.inf, 0.0))


def test_each_part_is_judged_while_the_next_ones_are_drawn():
    said = []

    class Noting:
        def begin(self, part, talk=None):
            said.append(f"begin {part}")
            return lambda: said.append(f"hear {part}")

        def conclude(self, rollout, found):
            said.append(f"conclude {rollout}")
            return None, {}

    def draw(params, prompts, key, step):
        said.append(f"draw {prompts.lengths}")
        return prompts.lengths

    prompts = dataclasses.replace(loop.prompts(0), lengths=np.arange(6))
    begun = responding(draw, Noting(), 3)(None, prompts, None, None)
    assert said == [f"{what} {rows}" for rows in ("[0 1]", "[2 3]", "[4 5]") for what in ("draw", "begin")]
    said.clear()
    begun()
    assert said == ["hear [0 1]", "hear [2 3]", "hear [4 5]", "conclude [0 1 2 3 4 5]"]


# Ahead of updates


def scored(rollout):
    return Scores(rollout.logprobs.sum(axis=1)), {"gold": float(rollout.index[0])}


def ahead(score=scored, ratio=1.0) -> Ahead:
    def begin(params, prompts, key, step):
        rollout = loop.draw(params, next(prompts), key, step)
        return lambda: (rollout, *score(rollout))

    return Ahead(begin, lambda params: jax.tree.map(jnp.copy, params), lambda *_: (ratio, abs(ratio - 1)))


def run(folder, **changes):
    return loop.run(folder, **({"ahead": ahead(), "collect": None} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose rollouts are all one iteration old: weight, rows and what was learned from."""
    folder, seen = tmp_path_factory.mktemp("whole"), []

    def prepare(rollout_params, rollout, scores, coef):
        seen.append((rollout, scores))
        return loop.program().prepare(rollout_params, rollout, scores, coef)

    state = run(folder, prepare=prepare)
    return float(state.params["w"]), loop.rows(folder), seen


def no_thread_is_left() -> bool:
    return not any(thread.name.startswith("rollout") for thread in threading.enumerate())


def test_every_rollout_but_the_first_is_one_iteration_old(whole):
    w, rows, seen = whole
    assert [int(rollout.policy_step) for rollout, _ in seen] == [0, 0, 6, 12]
    assert [int(rollout.index[0]) for rollout, _ in seen] == [6, 12, 18, 24]
    for rollout, scores in seen:
        np.testing.assert_array_equal(scores.score, rollout.logprobs.sum(axis=1))
    assert [float.fromhex(row["gold"]) for row in rows] == [6, 12, 18, 24]
    assert no_thread_is_left()


def test_the_numbers_are_those_of_a_plain_loop_over_old_policies(whole):
    key, params, weights = jax.random.key(3), {"w": jnp.float32(0)}, [jnp.float32(0)]
    program, text, coef = loop.program(), loop.Counter(np.float32), jnp.float32(0.01)
    state = loop.TrainState(jnp.zeros([], jnp.int32), params, ())
    for number in range(1, 5):
        own = jax.random.fold_in(key, number)
        old = {"w": weights[max(number - 2, 0)]}
        rollout = loop.draw(old, loop.prompts(number), jax.random.fold_in(own, 0), state.step)
        experience, _ = program.prepare(None, rollout, scored(rollout)[0], coef)
        for epoch in range(2):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(own, 1 + epoch), 6))
            for i in range(3):
                batch = program.batch(experience, order[2 * i : 2 * i + 2], {"text": text})
                state, _ = program.update(state, batch, jax.random.fold_in(own, 3 + 3 * epoch + i))
        weights.append(state.params["w"])
        coef = coef * 1.5
    assert whole[0] == float(state.params["w"])


def test_the_first_iteration_is_that_of_a_run_that_waits(whole, tmp_path):
    loop.run(tmp_path, Plan(iterations=1, minibatch=2, epochs=2), collect=loop.collect(scored))
    waited, first = loop.rows(tmp_path)[0], dict(whole[1][0])
    assert float.fromhex(first.pop("ppo/first_ratio_deviation")) == 0
    waited["ppo/stale_ratio_deviation"] = waited.pop("ppo/first_ratio_deviation")
    waited.pop("eval/w")
    assert first == waited


@pytest.mark.parametrize("at", [1, 3])
def test_stopped_and_resumed(at, whole, tmp_path):
    stop = StopSignal()
    with pytest.raises(Preempted, match=f"after step {at}"):
        run(tmp_path, stop=stop, on_row=lambda row: row["step"] == at and stop.request(), every=0)
    assert no_thread_is_left()
    streams = {"prompts": loop.Counter(loop.prompts), "text": loop.Counter(np.float32)}
    state = run(tmp_path, streams=streams)
    assert (float(state.params["w"]), loop.rows(tmp_path)) == whole[:2]
    assert streams["prompts"].taken == list(range(at + 2, 5))  # no rollout was drawn again


@pytest.mark.parametrize(("at", "every"), [(2, 1), (3, 1), (4, 2)])
def test_killed_and_resumed(at, every, whole, tmp_path):
    def killed(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_row=killed, every=every)
    assert no_thread_is_left()
    state = run(tmp_path, every=every)
    assert (float(state.params["w"]), loop.rows(tmp_path)) == whole[:2]


@pytest.mark.parametrize("every", [0, 1])
def test_an_error_of_the_worker_is_raised_before_its_iteration_and_never_saved(every, tmp_path):
    def score(rollout):
        return Scores(jnp.where(rollout.index == 20, jnp.nan, 0.0)), {}  # the third prompt of the third batch

    with pytest.raises(UserError, match="nan for prompt 20") as caught:
        run(tmp_path, ahead=ahead(score), every=every)
    assert caught.value.exit_code == DIVERGED and "iteration 3" in str(caught.value)
    assert len(loop.rows(tmp_path)) == 2 and no_thread_is_left()


def test_sampler_and_scorer_that_disagree_are_refused(tmp_path):
    with pytest.raises(UserError, match="ratio of 1.0200.*sampler and scorer disagree"):
        run(tmp_path, ahead=ahead(ratio=1.02))

    def update(state, batch, key):
        state, metrics = loop.learn(state, batch, key)
        return state, {**metrics, "ppo/ratio_mean": jnp.float32(1.5)}

    run(tmp_path, update=update)  # the policy has moved since


# As a stage


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    params = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    save_output(folder, Output(MODEL, params, TINY.tokenizer, {}))
    return str(folder)


def experiment(start, **changes):
    return dataclasses.replace(TINY, stages=(stage(policy=start, **changes),), evaluation=None)


def test_a_stage_ahead_agrees_with_its_sampler_and_resumes(start, tmp_path):
    whole = experiment(start, ahead=1, rollout_parts=2)
    programs.run(whole, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole/ppo/metrics.jsonl")
    assert all(row["ppo/first_ratio_deviation"] < 1e-4 for row in rows)
    stale = [row["ppo/stale_ratio_deviation"] for row in rows]
    assert stale[0] < 1e-4 < 1e-3 < min(stale[1:])

    def killed(name, step, total, row):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        programs.run(whole, tmp_path / "run", monitor=killed)
    assert no_thread_is_left()
    programs.run(whole, tmp_path / "run", resume=True)
    one, other = (load_output(tmp_path / name / "ppo/output").params for name in ("whole", "run"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    again = read_rows(tmp_path / "run/ppo/metrics.jsonl")
    timed = lambda rows: [{k: v for k, v in row.items() if "perf/" not in k} for row in rows]  # noqa: E731
    assert timed(again) == timed(rows)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(rollout_parts=3), "rollout_parts=3.*divisor of prompts_per_iteration=4"),
        (dict(rollout_parts=2, offload=("reward",)), "rollout_parts=2 with offload"),
        (dict(rollout_parts=2, rows_at_a_time=3), "a divisor of the 4 responses"),
        (dict(rows_at_a_time=3), "rows_at_a_time=3 does not divide 8"),
        (dict(ahead=2), "ahead=2.*0 or 1"),
        (dict(ahead=1, offload=("optimizer",)), "ahead=1 with offload"),
    ],
)
def test_what_does_not_fit_is_refused(changes, word):
    with pytest.raises(UserError, match=word):
        stage(**changes)


@pytest.mark.parametrize("changes", [dict(ahead=1), dict(rollout_parts=2)])
def test_several_devices_are_refused(changes):
    placement = SimpleNamespace(mesh="of two")
    placement.folded = lambda: placement
    with pytest.raises(UserError, match="on several devices.*one device"):
        check_one_device(stage(**changes), placement)  # pyright: ignore[reportArgumentType]
