"""The benchmark of scaling: its points, its formulas by hand, its tables and plots, and one point that really runs."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scaling  # noqa: E402
import scaling_report as report  # noqa: E402
import scaling_worker as worker  # noqa: E402
from scaling_plots import cpu_panels, gpu_panels  # noqa: E402
from scaling_points import SIZES, Point, cpu_groups, gpu_groups, shrunk  # noqa: E402

from rlhf_jax.models import count_params  # noqa: E402

GROUPS = {"cpu": cpu_groups(), "gpu": gpu_groups(), "gpus": gpu_groups(4)}
TOY = Point(panel="training", model="toy", rows=4, length=32)


@pytest.mark.parametrize("groups", [*GROUPS.values(), *(shrunk(each) for each in GROUPS.values())])
def test_points_fit_their_devices(groups):
    for point in (point for group in groups for point in group):
        assert math.prod(point.layout.values()) == point.devices and point.devices % point.processes == 0
        rows = math.prod(size for axis, size in point.layout.items() if axis in ("data", "fsdp", "expert"))
        assert point.rows % rows == 0 and point.length % point.layout.get("context", 1) == 0
        size = SIZES[point.model]
        assert size.heads % point.layout.get("tensor", 1) == 0 and size.vocab % 64 == 0


def test_small_points_take_every_path_of_the_large_ones():
    def paths(groups):
        return {(p.kind, p.remat, p.experts > 0, p.dtype, p.param_dtype) for group in groups for p in group}

    assert paths(shrunk(gpu_groups())) == paths(gpu_groups())


@pytest.mark.parametrize("name, millions", [("3.4M", 3.4), ("124M", 124), ("350M", 353), ("1.3B", 1311)])
def test_sizes_are_those_of_their_names(name, millions):
    size = SIZES[name]
    matrices = 12 * size.layers * size.d_model**2 + size.vocab * size.d_model
    norms = (2 * size.layers + 1) * size.d_model
    assert count_params(worker.model_of(replace(TOY, model=name))) == matrices + norms
    assert matrices / 1e6 == pytest.approx(millions, rel=0.01)


def test_what_a_decode_step_reads_by_hand():
    # 2 layers of 12 * 32^2 numbers, 128 * 32 of the embedding, 5 norms of 32, in two bytes each; a token of one row has
    # 2 * 4 heads * 8 keys and values in each of 2 layers. Steps see 10 + 1, 10 + 2, 10 + 3 tokens.
    point = replace(TOY, kind="decode", rows=3, length=10, new_tokens=4, dtype="bfloat16", param_dtype="bfloat16")
    by_hand = 2 * (2 * 12 * 32**2 + 128 * 32 + 5 * 32) + 3 * 2 * (2 * 2 * 4 * 8) * 12
    assert worker.read_by_a_step(point, worker.model_of(point)) == by_hand


def row(point: Point, seconds: list[float], **facts) -> dict:
    opened = {"memory": {"arguments": 2**20, "temporary": 2**21, "output": 0}, "sent": {}, "params": 10, "once": 1.0,
              "flops": {"step": 6e12}, "attention_flops": 6e11, "peak_flops": 1e13}  # fmt: skip
    rounds = [{"seconds": {"step": each}, "tokens": 100} for each in seconds]
    return {"point": point.described(), "title": point.title, "spread": point.spread, "open": opened | facts,
            "rounds": rounds, "peak": {"rss": 2**28, "device_peak": None}}  # fmt: skip


def test_medians_ratios_and_shares_by_hand():
    one, two = row(TOY, [1.0, 2.0, 4.0]), row(replace(TOY, devices=2, layout={"data": 2}), [2.0, 2.0, 5.0])
    scaling.finish(one, one)
    scaling.finish(two, one)
    assert (one["tokens_per_second"], one["range"], one["seconds"]["step"]) == (50.0, [25.0, 100.0], 2.0)
    # Rounds: 1/2, 2/2, 4/5.
    assert two["to_first"] == 0.8 and two["to_first_range"] == [0.5, 1.0]
    # 6e12 FLOPs in 2 s are 3e12 a second, of a peak of 1e13 on each of one and two devices.
    assert report.mfu(one) == pytest.approx(0.3) and report.mfu(two) == pytest.approx(0.15)


def test_a_decode_step_counts_without_the_prompts():
    seconds = {"prefill": 5.0, "decode": 2.0}
    point = replace(TOY, kind="decode", new_tokens=5, target=0.6)
    found = row(point, [1.0], flops={}, bytes=1e9)
    found["rounds"] = [{"seconds": seconds, "tokens": 16, "steps": 4}]
    scaling.finish(found, found)
    assert found["tokens_per_second"] == 8.0 and found["bytes_per_second"] == 2e9
    assert "| 66.7 |  | 60 %: reached |" in report._decode_table([found], {"bytes": 3e9})[-1]
    assert "60 %: missed" in report._decode_table([found], {"bytes": 4e9})[-1]


def measured(cpu: bool) -> dict:
    groups = cpu_groups() if cpu else gpu_groups()
    rows = []
    for group in groups:
        made = [row(point, [1.0, 2.0], flops={"step": 1e12} if point.kind == "train" else {}) for point in group]
        for each in made:
            if each["point"]["kind"] == "decode":
                each["open"]["bytes"] = 1e9
                each["rounds"] = [{"seconds": {"prefill": 1.0, "decode": 1.0}, "tokens": 10, "steps": 5}] * 2
            if each["point"]["kind"] == "ppo":
                phases = ("sample", "score", "prepare", "update")
                each["open"]["flops"] = dict.fromkeys(phases, 1e12)
                each["rounds"] = [{"seconds": dict.fromkeys(phases, 0.5), "tokens": 10}] * 2
            scaling.finish(each, made[0])
        rows += made
    failed = row(TOY, [])
    failed["open"] = {"failed": "out of memory"}
    scaling.finish(failed, failed)
    machine = {"flops": 1e13, "bytes": 1e12, "device": "a device", "jax": "0"}
    return {"rows": [*rows, failed], "not_measured": ["the rest"], "machine": [machine] * 2, "seconds": 1.0,
            "rounds": 2, "budget": 9.0, "cpu": cpu, "tiny": False, "load": [9.0, 9.0], "cores": 2}  # fmt: skip


@pytest.mark.parametrize("cpu", [True, False])
def test_tables_and_pictures(cpu, tmp_path):
    found = measured(cpu)
    report.write(found, tmp_path / "scaling")
    text = (tmp_path / "scaling.md").read_text()
    assert "failed: toy, 4 x 32, one device: failed: out of memory" in text and "- the rest" in text
    assert ("share the same cores" in text) == cpu and ("busy with other work" in text) == cpu
    if not cpu:
        # 1e12 FLOPs in 1.5 s of a peak of 1e13: 6.7 %.
        assert "| 6.7 | 6.7 |" in text and "50 %: missed" in text and "| update | 0.500 | 25 | 20 |" in text
    rows = [each for each in found["rows"] if each["reason"] is None]
    assert len((cpu_panels if cpu else gpu_panels)(rows, found)) == (6 if cpu else 3)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_one_point_on_two_simulated_devices_really_runs(tmp_path):
    point = replace(TOY, devices=2, layout={"fsdp": 2})
    options = argparse.Namespace(cpu=True, rounds=1, seconds=0.001)
    ((found),) = scaling.measure([point], options, tmp_path, 0)
    assert found["reason"] is None and found["tokens_per_second"] > 0
    assert {"all-gather", "all-reduce"} <= set(found["open"]["sent"])
    # Parameters and two moments in fp32, a half on each device, and the batch; small counters come on top.
    half = 3 * 4 * count_params(worker.model_of(point)) / 2
    assert half <= found["open"]["memory"]["arguments"] < half + 10_000
