"""The benchmark against peers: its arithmetic, its pipe, and one toy round where the peer is installed."""

# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
from lines import Side  # noqa: E402
from sizes import FULL, TINY  # noqa: E402


def child(tmp_path: Path, body: str) -> Side:
    program = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom lines import Questions\n{body}"
    return Side([sys.executable, "-c", program], peers.usable_cores(1), tmp_path / "log", {})


def answer(seconds: float, **fields):
    return {"seconds": seconds, "count": 2, "cpu_before": 1.0, "cpu_after": 1.5, "peak_mib": 10.0, **fields}


def test_the_model_has_about_14_million_parameters():
    # Embedding 8192 * 384, positions 256 * 384, final norm 2 * 384, and six blocks: two norms 4 * 384, attention
    # 384 * 1152 + 1152 + 384 * 384 + 384, feed-forward 384 * 1536 + 1536 + 1536 * 384 + 384.
    assert FULL.parameters == 3_145_728 + 98_304 + 768 + 6 * (1_536 + 591_360 + 1_181_568)


def test_prompts_are_ragged_and_fit_the_context():
    lengths = FULL.prompt_lengths()
    assert (min(lengths), max(lengths), len(lengths)) == (16, 64, 32)
    assert max(lengths) + FULL.new_tokens <= FULL.context


def test_a_side_answers_in_turn_whatever_it_prints(tmp_path):
    side = child(tmp_path, "q = Questions()\nprint('noise')\nq.answer(a=1)\nq.serve(lambda: print('more') or {'n': 7})")
    assert side.read()["a"] == 1
    first, second = side.ask(), side.ask()
    side.close()
    assert first["n"] == second["n"] == 7
    assert 0 <= first["seconds"] < 1 and second["cpu_before"] >= first["cpu_after"]
    assert (tmp_path / "log").read_text().split() == ["noise", "more", "more"]


def test_a_side_that_breaks_shows_the_end_of_its_log(tmp_path):
    side = child(tmp_path, "raise OSError('the disk is gone')")
    with pytest.raises(RuntimeError, match="the disk is gone"):
        side.read()
    side.close()


def test_summary_by_hand():
    measurement = peers.Measurement("ppo", "PPO iteration", 3.0, (peers.OURS, peers.EAGER), rounds=3, warmups=1)
    # Seconds of two steps. Medians 2 and 8 (1 and 4 a step), so 4 times; rounds: 4/1, 8/2, 20/4.
    found = {
        "warmups": 1,
        "answers": {
            peers.OURS: [answer(50.0), answer(1.0), answer(2.0), answer(4.0)],
            peers.EAGER: [answer(9.0), answer(4.0), answer(8.0), answer(20.0)],
        },
    }
    ours, theirs = peers.summarise(measurement, found)
    assert (ours["seconds"], theirs["seconds"], theirs["times_as_fast"]) == (1.0, 4.0, 4.0)
    assert theirs["seconds_range"] == [2.0, 10.0] and theirs["times_as_fast_range"] == [4.0, 5.0]
    assert ours["first_call_seconds"] == 50.0 and ours["cpu_seconds_while_idle"] == -0.5
    assert "4.00 times (4.00 to 5.00)" in peers.table([ours, theirs])[-1]


@pytest.mark.parametrize("field, mine, other", [("tokens", 8, 7), ("updates", 16, 4), ("losses", [2.0], [2.1])])
def test_unequal_work_is_refused(field, mine, other):
    answers = {peers.OURS: [answer(1.0, **{field: mine})], peers.EAGER: [answer(1.0, **{field: other})]}
    with pytest.raises(RuntimeError, match=str(field).rstrip("es")):
        peers.check_same_work(peers.MEASUREMENTS[0], answers)


def test_the_picture_is_drawn(tmp_path):
    measurement = peers.MEASUREMENTS[1]
    found = {"warmups": 0, "answers": {name: [answer(1.0), answer(2.0)] for name in measurement.sides}}
    peers.draw(peers.summarise(measurement, found), "a machine", tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000


@pytest.mark.skipif(not peers.peer_python().exists(), reason="the peer's environment is not set up")
def test_both_sides_learn_the_same_from_the_same_weights(tmp_path):
    peers.save_inputs(tmp_path, tiny=True)
    measurement = peers.Measurement("training_step", "training step", 1.5, (peers.OURS, peers.EAGER), 2, 0)
    found = peers.measure(measurement, tmp_path, peers.usable_cores(2), tiny=True, rounds=None)
    losses = [loss for said in found["answers"][peers.OURS] for loss in said["losses"]]
    assert len(losses) == 2 * TINY.steps and losses[-1] < losses[0]
