"""The benchmark of reinforcement learning: its schedule of lengths and its arithmetic."""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rl  # noqa: E402
from rl_sizes import CASES, TINY, Case, good  # noqa: E402

LONG = CASES["long-tailed lengths"]


def test_lengths_follow_the_log_normal():
    """Product of the hazards against scipy's distribution, rounded to whole tokens."""
    alive, chances = 1.0, []
    for hazard in LONG.hazards():
        chances.append(alive * hazard)
        alive *= 1 - hazard
    wanted = stats.lognorm(s=1.0, scale=24.0)
    edges = wanted.cdf(np.arange(1, 129) + 0.5)
    np.testing.assert_allclose(chances, np.diff(edges, prepend=0.0), atol=1e-12)
    assert alive == pytest.approx(wanted.sf(128.5))
    mean = sum(t * p for t, p in enumerate(chances, 1)) + 128 * alive
    assert 35 < mean < 40, "the long tail: the longest is more than three times the mean"


def test_logits_give_the_hazards_beside_a_flat_rest():
    for logit, hazard in zip(LONG.logits(), LONG.hazards(), strict=True):
        if hazard > 1e-9:
            assert math.exp(logit) / (math.exp(logit) + LONG.model.vocab - 1) == pytest.approx(hazard, rel=1e-6)
    assert set(Case(median=None).logits()) == {-30.0}


def test_both_sides_count_the_same():
    for case in (*CASES.values(), *TINY.values()):
        assert case.responses % case.microbatches == case.responses % case.peer_microbatches == 0
        assert case.prompt + case.new_tokens <= case.model.context
        assert case.slots % case.group == 0
    assert good([2, 4, 5, 7]) == 0.5 and good([]) == 0.0


def answer(seconds: float, generation: float):
    phases = {"generation": generation, "scoring": 0.0, "update": seconds - generation}
    return {"seconds": seconds, "count": 64, "tokens": 640, "peak_mib": 10.0, "phases": phases}


def test_summary_and_picture_by_hand(tmp_path):
    measurement = next(m for m in rl.MEASUREMENTS if m.part == "trl")
    # Seconds of an iteration: ours 2, 4, theirs 6, 16: 3 and 4 times, in the median 3.5.
    answers = {
        rl.OURS: [answer(50.0, 1.0), answer(2.0, 1.0), answer(4.0, 2.0)],
        rl.PEER: [answer(9.0, 1.0), answer(6.0, 4.5), answer(16.0, 12.0)],
    }
    ours, theirs = rows = rl.summarise(measurement, {"warmups": 1, "answers": answers})
    assert (theirs["times_as_fast"], theirs["times_as_fast_range"]) == (3.5, [3.0, 4.0])
    assert ours["responses_per_s"] == (32 + 16) / 2 and ours["tokens_per_response"] == 10
    assert ours["phases"]["generation"] == {"seconds": 1.5, "share": 0.5, "tokens_per_s": 640 / 1.5}
    assert "50%, 427/s" in rl.table(rows)[2] and "3.50 times (3.00 to 4.00) | 3.0" in rl.table(rows)[3]
    rl.draw(rows, "a machine", tmp_path / "rl.png")
    assert (tmp_path / "rl.png").stat().st_size > 1000


def test_an_unknown_title_is_told(capsys, monkeypatch):
    monkeypatch.setattr(rl, "peer_python", lambda: Path(sys.executable))
    assert rl.main(["--only", "DPO"]) == 2
    assert "'DPO'" in capsys.readouterr().err
