"""A run that is killed, stopped or resumed gives the same bits as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tiny_training as tiny

from rlhf_jax.errors import DIVERGED, PREEMPTED, Preempted, UserError
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.journal import Journal
from rlhf_jax.training.metrics import MetricsWriter, read_metrics
from rlhf_jax.training.signals import StopRequested, StopSignal


def rows(folder):
    """The rows of a run without what depends on the clock, floats as their bits."""
    return [
        {name: float(value).hex() for name, value in row.items() if not name.startswith("perf/")}
        for row in read_metrics(Path(folder) / "metrics.jsonl")
    ]


def restored(folder):
    return Checkpoints(Path(folder) / "checkpoints").restore_latest({"state": tiny.fresh_state()})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Twelve steps with an evaluation every third, never disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    state = tiny.run(folder, 12, evaluate=tiny.evaluate, evaluate_every=3)
    return jax.device_get(state), rows(folder)


def test_rows_and_state_of_an_uninterrupted_run(uninterrupted):
    state, written = uninterrupted
    assert state.step == 12
    assert [int(float.fromhex(row["step"])) for row in written] == list(range(1, 13))
    assert all(("tiny/weight" in row) == (i % 3 == 0) for i, row in enumerate(written, start=1))
    assert {"tiny/loss", "tiny/mse", "tiny/grad_norm", "tiny/learning_rate", "tiny/nonfinite"} <= set(written[0])


@pytest.mark.parametrize("at", range(1, 11))
def test_stopped_after_any_step_and_resumed(at, uninterrupted, tmp_path):
    stop = StopSignal()

    def ask(row):
        if row["step"] == at:
            stop.request()

    with pytest.raises(Preempted, match="everything is saved"):
        tiny.run(tmp_path, 12, stop=stop, on_row=ask, evaluate=tiny.evaluate, evaluate_every=3)
    # A row is written while the next step runs, which is then finished too; no step is lost or made twice.
    stopped = restored(tmp_path)
    assert stopped is not None and stopped.step in (at, at + 1)
    assert rows(tmp_path) == uninterrupted[1][: stopped.step]
    batches = tiny.Batches()
    state = tiny.run(tmp_path, 12, batches=batches, evaluate=tiny.evaluate, evaluate_every=3)
    chex.assert_trees_all_equal(jax.device_get(state), uninterrupted[0])
    assert rows(tmp_path) == uninterrupted[1]
    assert batches.position == 12


def test_rows_after_the_checkpoint_are_written_again_with_the_same_bits(uninterrupted, tmp_path):
    class Crash(Exception):
        pass

    def crash(row):
        if row["step"] == 7:
            raise Crash

    with pytest.raises(Crash):
        tiny.run(tmp_path, 12, every=4, on_row=crash, evaluate=tiny.evaluate, evaluate_every=3)
    assert len(rows(tmp_path)) == 7
    tiny.run(tmp_path, 12, every=4, evaluate=tiny.evaluate, evaluate_every=3)
    assert rows(tmp_path) == uninterrupted[1]


def test_a_finished_run_is_left_alone(uninterrupted, tmp_path):
    tiny.run(tmp_path, 12, evaluate=tiny.evaluate, evaluate_every=3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    state = tiny.run(tmp_path, 12, evaluate=tiny.evaluate, evaluate_every=3)
    chex.assert_trees_all_equal(jax.device_get(state), uninterrupted[0])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("at", [0, 3, 12])
def test_a_stop_inside_an_evaluation_keeps_the_open_row(at, uninterrupted, tmp_path):
    stop, calls = StopSignal(), []

    def interrupted(params):
        calls.append(None)
        if len(calls) == 1 + [0, 3, 6, 9, 12].index(at):
            stop.request()
        stop.check()
        return tiny.evaluate(params)

    options = {"evaluate_every": 3, "evaluate_first": True}
    with pytest.raises(Preempted):
        tiny.run(tmp_path, 12, stop=stop, evaluate=interrupted, **options)
    snapshot = restored(tmp_path)
    assert snapshot is not None and snapshot.step == at
    state = tiny.run(tmp_path, 12, evaluate=tiny.evaluate, **options)
    chex.assert_trees_all_equal(jax.device_get(state), uninterrupted[0])
    first, *others = rows(tmp_path)
    assert set(first) == {"step", "tiny/weight"} and others == uninterrupted[1]


def program(folder, total, in_evaluation=0.0, after_row=0.0):
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [
            sys.executable,
            str(root / "tests/tiny_training.py"),
            str(folder),
            str(total),
            str(in_evaluation),
            str(after_row),
        ],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.005)


def test_killed_at_random_moments(tmp_path):
    killed, alone, total = tmp_path / "killed", tmp_path / "alone", 40
    expected = tiny.run(alone, total, evaluate=tiny.evaluate, evaluate_every=3)
    dice = random.Random(0)
    for target in (6, 14, 23, 31):
        process = program(killed, total, after_row=0.01)
        wait_for(lambda target=target: len(read_metrics(killed / "metrics.jsonl")) >= target, process)
        time.sleep(dice.uniform(0, 0.2))
        process.kill()
        process.communicate()
    state = tiny.run(killed, total, evaluate=tiny.evaluate, evaluate_every=3)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    assert rows(killed) == rows(alone)
    assert [p.name for p in (killed / "checkpoints").iterdir() if not p.name.isdigit()] == []


@pytest.mark.parametrize("phase", ["step", "evaluation"])
def test_sigterm_saves_and_exits_75(phase, uninterrupted, tmp_path):
    if phase == "step":
        process = program(tmp_path, 12, after_row=0.1)
        wait_for(lambda: len(read_metrics(tmp_path / "metrics.jsonl")) >= 4, process)
    else:
        process = program(tmp_path, 12, in_evaluation=60.0)
        wait_for((tmp_path / "evaluating").exists, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == PREEMPTED, output
    assert "everything is saved" in output
    snapshot = restored(tmp_path)
    made = len(rows(tmp_path))
    # In the evaluation of step 3 its row is still open.
    assert snapshot is not None and snapshot.step == (made if phase == "step" else 3)
    assert made >= 4 if phase == "step" else made == 2
    tiny.run(tmp_path, 12, evaluate=tiny.evaluate, evaluate_every=3)
    assert rows(tmp_path) == uninterrupted[1]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_checkpoint(uninterrupted, tmp_path):
    with pytest.raises(UserError, match=r"step 6: .*loss=nan.*last good checkpoint is .*00000004") as caught:
        tiny.run(tmp_path, 12, batches=tiny.Batches(poison=6), evaluate=tiny.evaluate, evaluate_every=3)
    assert caught.value.exit_code == DIVERGED
    snapshot = restored(tmp_path)
    assert snapshot is not None and snapshot.step == 4
    chex.assert_tree_all_finite(snapshot.tree)
    assert rows(tmp_path)[:5] == uninterrupted[1][:5] and rows(tmp_path)[5]["tiny/nonfinite"] == (1.0).hex()
    # Once the batch is mended the run goes on as if nothing had been.
    tiny.run(tmp_path, 12, evaluate=tiny.evaluate, evaluate_every=3)
    assert rows(tmp_path) == uninterrupted[1]


def test_a_bad_step_between_two_rows_is_noticed_too(tmp_path):
    with pytest.raises(UserError, match="step 6: .*nothing was saved before"):
        tiny.run(tmp_path, 12, every=0, batches=tiny.Batches(poison=6), log_every=5)


def test_rows_every_few_steps(uninterrupted, tmp_path):
    tiny.run(tmp_path, 11, log_every=4, evaluate=tiny.evaluate, evaluate_every=5)
    written = rows(tmp_path)
    assert [int(float.fromhex(row["step"])) for row in written] == [4, 5, 8, 10, 11]
    assert written[0]["tiny/loss"] == uninterrupted[1][3]["tiny/loss"]


def test_rates_count_steps_and_tokens(tmp_path):
    tiny.run(tmp_path, 4, log_every=2, count_tokens=lambda batch: batch["x"].size)
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        np.testing.assert_allclose(row["perf/tokens_per_s"] / row["perf/steps_per_s"], 12)


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the data ended after 3 batches"):
        tiny.run(tmp_path, 12, batches=tiny.Batches(end=3))


def test_without_checkpoints_a_stop_says_so():
    journal = Journal()
    journal.stop.request()
    with pytest.raises(Preempted, match="nothing is saved"):
        journal.finish(3, {"loss": 1.0}, lambda: ({}, {}))


def test_the_journal_serves_a_loop_with_any_state(tmp_path):
    """As the loop of reinforcement learning uses it: several states, a controller, no batches."""
    tree = {"policy": tiny.fresh_state(), "kl_coef": np.float32(0.2)}

    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1)
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        journal = Journal(checkpoints, metrics, prefix="ppo")
        assert journal.resume(tree) is None
        journal.finish(1, {"loss": 0.5}, lambda: (tree, {"prompts": [1, 2]}), evaluate=lambda: {"eval/reward": 0.25})
        snapshot = Journal(checkpoints, metrics).resume(tree)
    assert snapshot is not None and (snapshot.step, snapshot.extra) == (1, {"prompts": [1, 2]})
    chex.assert_trees_all_equal(snapshot.tree, tree)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "ppo/loss": 0.5, "eval/reward": 0.25}]


def test_signals_become_a_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(StopRequested):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
