"""Rows read back exactly, resume leaves no trace, and a missing package is named."""

from __future__ import annotations

import math
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.metrics import MetricsWriter, TensorBoard, Throughput, WeightsAndBiases, read_metrics


def test_floats_read_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    values = [struct.unpack("d", rng.bytes(8))[0] for _ in range(200)]
    values = [v for v in values if math.isfinite(v)] + [0.1, -0.0, 5e-324, math.inf, -math.inf]
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step, value in enumerate(values):
            writer.write(step, {"a": value, "b": np.float32(0.1), "c": jnp.float32(0.1), "n": np.int32(7), "t": True})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["a"].hex() for row in rows] == [v.hex() for v in values]
    assert rows[3] == {
        "step": 3,
        "a": values[3],
        "b": float(np.float32(0.1)),
        "c": float(np.float32(0.1)),
        "n": 7,
        "t": 1,
    }
    assert [row["step"] for row in rows] == list(range(len(values)))


def test_not_a_number_reads_back(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, {"loss": math.nan})
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])


def test_each_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 3})
    whole = path.read_bytes()
    for torn in (b"", b'{"step": 6, "lo', b'{"step": 6, "loss": 2.0}'):
        path.write_bytes(whole + torn)
        with MetricsWriter(path) as writer:
            writer.truncate(3)
            for step in (4, 5):
                writer.write(step, {"loss": step / 3})
        assert path.read_bytes() == whole
    with MetricsWriter(path) as writer:
        writer.truncate(None)
    assert path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_does_not_join_the_next_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with MetricsWriter(path) as writer:
        writer.write(2, {"loss": 3.0})
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]


def test_a_step_is_written_once(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(4, {})
        with pytest.raises(ValueError, match="row of step 4 after that of step 4; expected a later step"):
            writer.write(4, {})
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer, pytest.raises(ValueError, match="row of step 3"):
        writer.write(3, {})


def test_wrong_values_and_damaged_lines_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        with pytest.raises(ValueError, match="metric 'text' is 'abc'; expected one number"):
            writer.write(1, {"text": "abc"})
        writer.write(1, {"loss": 1.0})
    path.write_bytes(path.read_bytes()[:-3] + b"\n" + b'{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a row of metrics") as caught:
        read_metrics(path)
    assert caught.value.exit_code == 74


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="cannot write metrics .No space left on device.") as caught:
            writer.sync()
    assert caught.value.exit_code == 74


def test_sinks_get_every_row(tmp_path):
    class Sink:
        def __init__(self):
            self.rows, self.closed = [], False

        def write(self, step, values):
            self.rows.append((step, dict(values)))

        def close(self):
            self.closed = True

    sink = Sink()
    with MetricsWriter(tmp_path / "metrics.jsonl", [sink]) as writer:
        writer.write(1, {"loss": jnp.float32(0.5)})
    assert sink.rows == [(1, {"loss": 0.5})] and sink.closed


def test_tensorboard_files_appear(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path / "metrics.jsonl", [TensorBoard(tmp_path / "tb")]) as writer:
        writer.write(1, {"loss": 0.5})
    assert any(p.name.startswith("events") for p in (tmp_path / "tb").iterdir())


@pytest.mark.parametrize(
    ("package", "make"), [("tensorboardX", lambda p: TensorBoard(p)), ("wandb", lambda p: WeightsAndBiases("p", "i"))]
)
def test_a_missing_package_names_the_extra(package, make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package!r} is not installed.*pip install 'rlhf_jax\["):
        make(tmp_path)


def test_rates_are_work_over_time(monkeypatch):
    now = iter([10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    rates = Throughput()
    assert rates.rates(tokens=100, steps=1) == {"perf/tokens_per_s": 50.0, "perf/steps_per_s": 0.5}
    rates.restart()
    assert rates.rates(tokens=30) == {"perf/tokens_per_s": 30.0}
