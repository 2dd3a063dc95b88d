"""Experts on meshes of simulated devices against one device: values, reports, gradients, and that tokens travel."""

from __future__ import annotations

import pytest
from meshes import run_on

CASES = [
    # Axes of the mesh, layer, rows, tokens of a row. Rows and tokens need not divide.
    ({"expert": 2}, "plain", 4, 5),
    ({"expert": 4}, "deepseek", 4, 5),
    ({"expert": 8}, "plain", 8, 4),
    ({"data": 2, "tensor": 2}, "all-choices", 4, 5),
    ({"expert": 2, "tensor": 2}, "all-choices", 2, 6),
    ({"expert": 2, "context": 2, "tensor": 2}, "deepseek", 4, 6),
    ({"fsdp": 2, "expert": 2, "context": 2}, "dropping", 4, 6),
    ({"fsdp": 2, "expert": 4}, "plain", 3, 1),
]


@pytest.fixture(scope="module")
def found():
    return run_on(8, "experts_on_meshes", "layers_on", CASES).value


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
def test_a_layer_on_a_mesh_equals_one_device(case, found):
    assert max(found[case].values()) < 3e-6, found[case]


def test_a_model_with_split_experts_has_the_gradients_of_one_device():
    ran = run_on(4, "experts_on_meshes", "model_on", {"fsdp": 2, "expert": 2})
    assert ran.value["gradient"] < 1e-4
    # Tokens to the experts and back, and the numbers of the experts, in both passes.
    assert ran.value["travels"] >= 4


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(RuntimeError, match="4 experts are not a multiple of the mesh's expert axis of 8 devices"):
        run_on(8, "experts_on_meshes", "layers_on", [({"expert": 8}, "all-choices", 8, 1)])
