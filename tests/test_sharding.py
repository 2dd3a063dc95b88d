"""Layouts: the same numbers on every mesh, the expected collectives, checkpoints across meshes, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import pytest
import tiny_experiment
from jax.sharding import PartitionSpec as P
from meshes import run_on

from rlhf_jax import experiment
from rlhf_jax.errors import UserError
from rlhf_jax.models import Attention, Block, SwiGLU, Transformer
from rlhf_jax.sharding import Layout, Placement, park, wake
from rlhf_jax.training.metrics import read_metrics

DATA, FSDP, TENSOR = {}, {"fsdp": 8}, {"tensor": 2}
CONTEXT, ALL = {"context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}
PLAN = {
    "language": {"data": DATA, "fsdp": FSDP, "tensor": TENSOR, "context": CONTEXT},
    "ppo-ptx": {"all": ALL},
}
"""With pretraining text PPO has the losses of language models and of separate critics; experts are tested apart."""
MORE = {
    "experts": {"expert-tensor": {"expert": 2, "tensor": 2}},
    "reward": {"fsdp-tensor": {"fsdp": 4, "tensor": 2}},
    "ppo": {"all": ALL},
    "ppo-shared": {"fsdp-tensor": {"fsdp": 4, "tensor": 2}},
    "ppo-ptx": {"fsdp-context": {"fsdp": 4, "context": 2}},
}
CALLS = {
    "compared": ("compare_all", PLAN, 2),
    "samples": ("samples", {"tensor": TENSOR, "all": ALL}),
    "gathered": ("gathered_while_decoding", {"data": 4, "tensor": 2}),
    "checkpoints": ("across_meshes", FSDP, [DATA, ALL]),
}


@pytest.fixture(scope="module")
def ran():
    """All programs of one process: most of the time goes into starting it, and compiling."""
    return run_on(8, "sharded_programs", "several", CALLS)


def assert_same(compared: dict, program: str) -> None:
    for layout, found in compared[program].items():
        assert found["numbers"] < 1e-5 and found["leaves"] < 1e-5, layout
        assert found["compiled"] == 1


@pytest.mark.parametrize("program", list(PLAN))
def test_three_steps_are_those_of_one_device_and_compiled_once(ran, program):
    assert_same(ran.value["compared"], program)


@pytest.mark.thorough
def test_three_steps_of_other_programs():
    compared = run_on(8, "sharded_programs", "compare_all", MORE, 2).value
    for program in MORE:
        assert_same(compared, program)


def test_the_partitioner_rematerialises_nothing(ran):
    assert "nvoluntary full rematerialization" not in ran.log


def test_only_the_expected_collectives(ran):
    compared = ran.value["compared"]["language"]
    kinds = {layout: set(found["collectives"]) for layout, found in compared.items()}
    assert kinds["data"] == {"all-reduce"}  # of gradients
    assert kinds["tensor"] == {"all-reduce"}  # of partial sums
    assert kinds["fsdp"] == {"all-reduce", "all-gather"}  # of parameters; the CPU has no pass for reduce-scatter
    assert "all-to-all" not in kinds["context"]


def test_a_mesh_draws_the_samples_of_one_device(ran):
    for layout, found in ran.value["samples"].items():
        assert found["same"] and found["logprobs"] < 1e-5, layout


def test_tensor_parallel_decoding_gathers_no_parameters(ran):
    gathered = ran.value["gathered"]
    rows = 8 * 2 // 4  # of one device: what is gathered are logits of its own rows, and no dimension of a matrix is 4
    assert gathered and all(shape[0] == rows for shape in gathered), gathered


def test_a_checkpoint_of_one_mesh_is_read_on_another(ran):
    assert ran.value["checkpoints"] == [True] * 3


# What is refused, and how


def test_axes_that_do_not_fit_the_devices():
    with pytest.raises(UserError, match="fsdp=3 on 8 devices.*that 3 divides"):
        Layout(fsdp=3).sizes(8)
    with pytest.raises(UserError, match="data=2 x tensor=2 is a mesh of 4 devices, and there are 8"):
        Layout(data=2, tensor=2).sizes(8)
    with pytest.raises(UserError, match="tensor=0.*at least 1"):
        Layout(tensor=0)
    with pytest.raises(UserError, match="names the axis 'tensors'.*tensor"):
        Layout(rules=(("mlp", "tensors"),))
    assert Layout(fsdp=2, tensor=2).sizes(8) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}


def _mesh(**sizes) -> Placement:
    """A placement on devices that need not exist: only shardings are made."""
    shape = tuple(sizes.get(name, 1) for name in ("data", "fsdp", "expert", "context", "tensor"))
    mesh = jax.sharding.AbstractMesh(shape, ("data", "fsdp", "expert", "context", "tensor"))
    return Placement(mesh)  # pyright: ignore[reportArgumentType]


def test_rows_and_tokens_that_do_not_divide():
    with pytest.raises(UserError, match="microbatches of 6 rows on a mesh with data=2 x fsdp=2.*multiple of 4"):
        _mesh(data=2, fsdp=2).check_rows(6, "microbatches", "stages.sft")
    with pytest.raises(UserError, match="rows of 10 tokens on a mesh with context=4.*multiple of 4"):
        _mesh(context=4).check_tokens(10, "stages.sft")
    Placement().check_rows(7, "microbatches", "stages.sft")


def test_a_parameter_that_an_axis_does_not_divide():
    model = Transformer(vocab_size=23, d_model=16, pattern=(Block(Attention(heads=4, kv_heads=2), SwiGLU(32)),))
    with pytest.raises(UserError, match=r"vocab=23 of the parameter \['embedding'\] with tensor=2.*\('vocab', None\)"):
        _mesh(tensor=2).params(model)
    rules = (("vocab", None), ("kv_heads", "tensor"))
    with pytest.raises(UserError, match="kv_heads=2.*with tensor=4"):
        dataclasses.replace(_mesh(tensor=4), rules=rules).params(model)


def test_rules_say_where_parameters_lie():
    model = Transformer(vocab_size=32, d_model=16, pattern=(Block(Attention(heads=4, kv_heads=2), SwiGLU(32)),))
    found = _mesh(fsdp=2, tensor=2).params(model)
    assert found["embedding"].spec == P("tensor", "fsdp")
    assert found["stack"]["blocks_0"]["mixer"]["qkv"].spec == P(None, "fsdp", "tensor", None, None)
    assert found["stack"]["blocks_0"]["ffn"]["out"].spec == P(None, "tensor", "fsdp")
    assert found["last_norm"]["scale"].spec == P(
        None,
    )


# The host's memory


def test_what_is_parked_lies_on_the_host_and_comes_back():
    tree = {"a": jax.numpy.arange(6.0), "b": None}
    away = park(tree)
    assert away["a"].sharding.memory_kind == "pinned_host" and away["b"] is None
    back = wake(away)
    assert back["a"].sharding.memory_kind == "device" and (back["a"] == tree["a"]).all()


def test_offloading_changes_no_bit_of_a_run(tmp_path):
    tiny = tiny_experiment.config()
    pretrain, _, reward, ppo = tiny.stages
    pretrain = dataclasses.replace(pretrain, heldout=())
    reward = dataclasses.replace(reward, init="pretrain", heldout=(), centre=())
    rows = []
    for offload in ((), ("reference", "reward", "optimizer")):
        stages = (pretrain, reward, dataclasses.replace(ppo, policy="pretrain", ptx=None, offload=offload))
        folder = tmp_path / str(len(offload))
        experiment.run(dataclasses.replace(tiny, stages=stages, evaluation=None), folder)
        found = read_metrics(folder / "ppo" / "metrics.jsonl")
        rows.append([{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found])
    assert rows[0] == rows[1]


def test_only_known_parts_are_offloaded():
    with pytest.raises(UserError, match="offload='policy'.*reference, reward, optimizer"):
        dataclasses.replace(tiny_experiment.config().stages[3], offload=("policy",))
