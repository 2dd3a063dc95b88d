"""Several real processes on loopback: their number changes nothing, and none is left behind when one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import processes
from rlhf_jax.cli import launch
from rlhf_jax.data.pipelines import Rows
from rlhf_jax.errors import MISSING_INPUT, PEER_LOST, PREEMPTED, USAGE, UserError
from rlhf_jax.training.durable import MANIFEST, verify_folder
from rlhf_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
FILE = str(ROOT / "tests" / "processes_experiment.py")
ITERATIONS = 4


def begin(*words: str, trap: str = "") -> subprocess.Popen:
    """A program of ``rlhf-jax``; compiled with little care, since that is what takes the time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NPROC": "32", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"JAX_PLATFORMS": "cpu", "TRAP": trap} if trap else {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", *words], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(program: subprocess.Popen, expected: int) -> str:
    said, _ = program.communicate(timeout=400)
    assert program.returncode == expected, said
    return said


def run(folder: Path, number: int, *words: str, trap: str = "", expected: int = 0) -> str:
    """The experiment in so many processes, on two devices in all where there are no more processes."""
    devices = str(max(1, 2 // number))
    launched = ["launch", "--processes", str(number), "--devices-per-process", devices, FILE, "--run-dir", str(folder)]
    return ended(begin(*launched, *words, trap=trap), expected)


def assert_same_rows(folder: Path, other: Path, stage: str, steps: int = ITERATIONS) -> None:
    found, wanted = (
        [row for row in read_metrics(where / stage / "metrics.jsonl") if 1 <= row["step"] <= steps]
        for where in (folder, other)
    )
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, expected in zip(found, wanted, strict=True):
        for name in row.keys() & expected.keys():
            if not name.startswith("perf/"):
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def steps_saved(folder: Path) -> list[int]:
    """Of all checkpoints, which must be whole, with a checksum of every file that any process wrote."""
    found = sorted(folder.iterdir())
    for path in found:
        there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert there == {MANIFEST, *json.loads((path / MANIFEST).read_text())["files"]}
    return [verify_folder(path)["step"] for path in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process with two devices, without a disturbance."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    run(folder, 1)
    return folder


def test_killed_and_stopped_runs_go_on_with_another_number_of_processes(alone, tmp_path):
    """Two processes, of which one is killed; then one, which is stopped; then two again, to the end."""
    folder = tmp_path / "changing"
    began = time.monotonic()
    said = run(folder, 2, trap="1:2:kill", expected=PEER_LOST)
    assert "process 1 of 2 was ended by SIGKILL" in said and "--resume" in said
    assert time.monotonic() - began < 300 and steps_saved(folder / "ppo" / "checkpoints") == [1]
    said = run(folder, 1, "--resume", trap="0:1:stop", expected=PREEMPTED)
    assert steps_saved(folder / "ppo" / "checkpoints") == [1, 2]
    run(folder, 2, "--resume")
    for stage in ("sft", "ppo"):
        assert_same_rows(folder, alone, stage)
    samples = [(where / "ppo" / "samples.jsonl").read_text().splitlines() for where in (folder, alone)]
    words = [[(row["iteration"], row["prompt"], row["response"]) for row in map(json.loads, rows)] for rows in samples]
    assert words[0] == words[1]
    numbers = [json.loads((where / "summary.json").read_text())["evaluation"] for where in (folder, alone)]
    for stage, found in numbers[1].items():
        for name, estimate in found.items():
            np.testing.assert_allclose(numbers[0][stage][name]["value"], estimate["value"], rtol=1e-5, err_msg=name)


def test_a_signal_to_one_of_four_stops_all_after_the_same_step(alone, tmp_path):
    folder = tmp_path / "four"
    short = ("evaluation=None", "stages.sft.heldout=()", "stages.sft.train.steps=100000",
             "stages.sft.train.save_every=90000")  # fmt: skip
    program = begin("launch", "--processes", "4", FILE, "--run-dir", str(folder), "--only", "sft", "--set", *short)
    deadline = time.monotonic() + 300
    while len(read_metrics(folder / "sft" / "metrics.jsonl")) < 3:
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.1)
    pid = json.loads((folder / "attempts.jsonl").read_text().splitlines()[0])["pid"]
    os.kill(pid, signal.SIGTERM)
    said = ended(program, PREEMPTED)
    stopped = re.findall(r"^\[(\d)\] stopped: stopped after step (\d+); everything is saved", said, re.MULTILINE)
    assert sorted(process for process, _ in stopped) == ["0", "1", "2", "3"]
    assert {int(step) for _, step in stopped} == set(steps_saved(folder / "sft" / "checkpoints"))
    assert_same_rows(folder, alone, "sft", steps=3)


def test_an_error_is_one_error_in_every_process(alone, tmp_path):
    said = run(tmp_path / "layout", 2, "--set", "layout.data=3", expected=USAGE)
    for process in (0, 1):
        assert f"[{process}] error: layout: data=3 x fsdp=2 is a mesh of 6 devices, and there are 2" in said
    assert not (tmp_path / "layout").exists()
    said = run(alone, 2, expected=USAGE)
    for process in (0, 1):
        assert f"[{process}] error: {alone}: there is a run in this directory" in said


def test_an_error_in_one_process_ends_the_other(tmp_path):
    """One finds another file than the other; the other one waits for it meanwhile."""
    address = f"127.0.0.1:{launch._free_port()}"
    words = ("--coordinator", address, "--processes", "2", "--run-dir", str(tmp_path / "run"))
    waiting = begin("run", FILE, *words, "--process-id", "0")
    said = ended(begin("run", str(tmp_path / "none.py"), *words, "--process-id", "1"), MISSING_INPUT)
    assert "none.py" in said
    said = ended(waiting, MISSING_INPUT)
    assert "process 0 of 2 ends because process 1 failed" in said and "none.py" in said


def test_a_wrong_coordinator_is_an_error_with_its_address():
    address = f"127.0.0.1:{launch._free_port()}"
    words = ("--coordinator", address, "--processes", "2", "--process-id", "1", "--connect-timeout", "2")
    said = ended(begin("run", FILE, *words), PEER_LOST)
    assert f"error: {address}: process 1 of 2 could not meet the others within 2 s" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "here:1"}, "--processes and --process-id missing"),
        ({"coordinator": "here", "processes": 2, "process_id": 0}, "'here'; expected host:port"),
        ({"coordinator": "here:1", "processes": 2, "process_id": 2}, "expected 0 to 1"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_opened(given, message):
    with pytest.raises(UserError, match=message):
        processes.start(**given)
    assert not processes.joined()


def test_a_process_on_its_own_joins_nobody(monkeypatch):
    processes.start()
    processes.start(coordinator="nobody:1", processes=1, process_id=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a shell of Slurm, but no step with several tasks
    processes.start()
    assert not processes.joined() and (processes.index(), processes.count(), processes.is_first()) == (0, 1, True)


def test_variables_stand_for_the_options(monkeypatch):
    for name, value in zip(processes.VARIABLES, ("here:1", "2", "two"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_PROCESS_ID: 'two'; expected a whole number"):
        processes.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "5")
    with pytest.raises(UserError, match="--process-id 5 with --processes 2"):
        processes.start()


def test_a_cluster_is_noticed_by_what_jax_looks_at(monkeypatch):
    for name, value in {"JOB_ID": "7", "STEP_NODELIST": "a", "NTASKS": "3", "PROCID": "1", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes._cluster_size() == 3


def test_shares_of_the_processes_cover_everything_once(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    rows = []
    for number in range(3):
        monkeypatch.setattr(processes, "index", lambda number=number: number)
        rows += range(7)[processes.part(7)]
    assert rows == list(range(7))


def test_in_one_process_work_is_a_plain_call():
    unsharable = object()
    assert processes.together("a", lambda: unsharable) is unsharable
    assert processes.first("b", lambda: unsharable) is unsharable
    assert processes.gather("c", lambda: 1) == [1]
    with pytest.raises(KeyError):
        processes.first("d", lambda: {}[0])
    processes.same("e", 1)
    processes.leave(1, "returns")


def test_errors_travel_with_their_words():
    fault = processes._packed(UserError("a", at="b", expected="c", fix="d", exit_code=74))
    again = processes._unpacked(json.loads(json.dumps(fault)), 1)
    assert isinstance(again, UserError) and (str(again), again.exit_code) == ("b: a; expected c. Fix: d", 74)
    other = processes._unpacked(processes._packed(OSError(28, "No space left")), 1)
    assert str(other) == "process 1 failed: OSError: [Errno 28] No space left"


def test_rows_that_are_gathered_late_are_the_same_rows():
    column, chosen = np.arange(60).reshape(5, 4, 3), np.array([3, 0, 3, 4])
    rows = Rows(column, chosen)
    assert (rows.shape, rows.dtype, len(rows)) == ((4, 4, 3), column.dtype, 4)
    np.testing.assert_array_equal(np.asarray(rows), column[chosen])
    np.testing.assert_array_equal(rows[1:3, :, 2:], column[chosen][1:3, :, 2:])
    np.testing.assert_array_equal(rows[2:4,], column[chosen][2:4])


@pytest.mark.parametrize(
    ("variables", "processes_", "devices", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2, None, ["4,5", "6,7"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3, 1, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2, 1, ["0", "1"]),
    ],
)
def test_cards_are_shared_out(monkeypatch, variables, processes_, devices, expected):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = launch._environments(processes_, devices)
    assert [own["CUDA_VISIBLE_DEVICES"] for own in found] == expected


def test_cards_that_do_not_come_out_even_are_refused(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="2 processes on 3 cards"):
        launch._environments(2, None)
    with pytest.raises(UserError, match="2 processes with 2 cards each on 3 cards"):
        launch._environments(2, 2)


def test_processors_get_devices_and_threads(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("NPROC", raising=False)
    first, second = launch._environments(2, 8)
    assert first == second and first["JAX_NUM_CPU_DEVICES"] == "8" and int(first["NPROC"]) >= 32
