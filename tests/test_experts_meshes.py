"""Experts on meshes of simulated devices against one device: values, reports, gradients, and that tokens travel."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from meshes import run_on

from rlhf_jax.ops.experts import expert_feedforward, feedforward

CASES = [
    # Axes of the mesh, layer, rows, tokens of a row. Rows and tokens need not divide.
    ({"data": 2}, "plain", 4, 5),
    ({"expert": 2, "tensor": 2}, "all-choices", 4, 5),
    ({"expert": 4}, "deepseek", 4, 5),
    ({"expert": 8}, "plain", 8, 4),
    ({"expert": 2, "context": 2, "tensor": 2}, "plain", 4, 6),
    ({"fsdp": 2, "expert": 2, "context": 2}, "dropping", 4, 6),
    ({"fsdp": 2, "expert": 4}, "plain", 3, 1),
]


@pytest.fixture(scope="module")
def found():
    return run_on(8, "experts_on_meshes", "all_on", CASES, {"fsdp": 2, "expert": 2}, timeout=1200.0).value


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
def test_a_layer_on_a_mesh_equals_one_device(case, found):
    assert max(found["layers"][case].values()) < 3e-6, found["layers"][case]


def test_a_model_with_split_experts_has_the_gradients_of_one_device(found):
    assert found["model"]["gradient"] < 1e-4
    # Tokens to the experts and back, and the numbers of the experts, in both passes.
    assert found["model"]["travels"] >= 4


def test_experts_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(feedforward, "active_mesh", lambda: SimpleNamespace(shape={"expert": 8, "tensor": 1}))
    tokens, chosen = jnp.ones((8, 1, 6)), jnp.zeros((8, 1, 2), jnp.int32)
    with pytest.raises(ValueError, match="4 experts are not a multiple of the mesh's expert axis of 8 devices"):
        expert_feedforward(
            tokens, chosen, jnp.ones((8, 1, 2)), jnp.ones((4, 6, 2, 4)), jnp.ones((4, 4, 6)), lambda x: x[:, 0]
        )
