"""Every kind of stage on a mesh gives what it gives on one device: parameters, metrics, texts."""

from __future__ import annotations

import every_stage
import numpy as np
import pytest
from meshes import run_on

ROWS, TOKENS = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}
SOME = ("clone", "ilql", "distill", "talk")
"""Supervised on records that a model has judged; sampled, with a model that teaches, or is asked behind turns."""


def assert_same(names, sizes) -> None:
    alone = every_stage.left_by_a_run(names, {})
    spread = run_on(8, "every_stage", "left_by_a_run", names, sizes, timeout=3000)
    for stage, expected in alone.items():
        found = spread.value[stage]
        np.testing.assert_allclose(found["params"], expected["params"], atol=1e-5, err_msg=stage)
        assert same(found["rows"], expected["rows"]) and same(found["texts"], expected["texts"]), stage
    assert "nvoluntary full rematerialization" not in spread.log


def same(found, expected) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-5, abs=1e-5) if isinstance(expected, float) else expected)


def test_stages_on_a_mesh_are_those_of_one_device():
    assert_same(SOME, TOKENS)


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [ROWS, TOKENS], ids=["rows", "tokens"])
def test_all_stages_on_a_mesh_are_those_of_one_device(sizes):
    assert_same((), sizes)
