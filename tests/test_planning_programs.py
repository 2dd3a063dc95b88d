"""The planned programs are those that stages run, and take the memory that a run takes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import pytest
import tiny_experiment
from meshes import run_on

from rlhf_jax.experiment import Experiment, run
from rlhf_jax.models import abstract_params
from rlhf_jax.planning import machines
from rlhf_jax.planning.compiling import executable, lowered
from rlhf_jax.planning.numbers import device_bytes
from rlhf_jax.planning.pieces import Stage
from rlhf_jax.planning.plan import plan
from rlhf_jax.planning.programs import stage_programs
from rlhf_jax.planning.sampler import EOS, PAD
from rlhf_jax.sampling import sample
from rlhf_jax.stages import distill, judging, learners, reinforce, rollouts, supervised


def programs(experiment: Experiment, name: str, responses: int = 2) -> Stage:
    (stage,) = (stage for stage in experiment.stages if stage.name == name)
    placement = experiment.layout.place()
    return stage_programs(stage, experiment.model, placement, jax.devices(), responses)


def text(function, *arguments) -> str:
    """The program as it goes to the compiler, whatever its functions are called."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, arguments)
    return lowered(function, shapes).as_text().split("\n", 1)[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Texts of the programs of a run, by stage and name, and the K of its first batch of rankings."""
    texts, shapes, names = {}, {}, []
    with pytest.MonkeyPatch.context() as patch:

        def make(original, *arguments, **options):
            step = original(*arguments, **options)

            def first(state, batch, key):
                if (names[-1], "update") not in texts:
                    texts[names[-1], "update"] = text(step, state, batch, key)
                    shapes[names[-1]] = jax.tree.map(lambda x: x.shape, batch)
                return step(state, batch, key)

            return first

        def prepare(original, objective):
            compiled = original(objective)

            def first(*arguments):
                texts.setdefault(("ppo", "prepare"), text(compiled, *arguments))
                return compiled(*arguments)

            return first

        def draw(model, params, prompts, sampling, key, step, **ids):
            drawing = functools.partial(sample, eos_id=EOS, pad_id=PAD)
            again = lambda p, prompts, key, step: drawing(model, p, prompts, sampling, key, step)  # noqa: E731
            texts.setdefault(("ppo", "sample"), text(again, params, prompts, key, step))
            return sample(model, params, prompts, sampling, key, step, **ids)

        def score(original, model, params, rollout, **options):
            program = functools.partial(original, model, **options)
            texts.setdefault(("ppo", "score"), text(program, params, rollout))
            return program(params, rollout)

        for module in (supervised, learners):
            patch.setattr(module, "make_train_step", functools.partial(make, module.make_train_step))
        patch.setattr(reinforce, "preparation", functools.partial(prepare, reinforce.preparation))
        patch.setattr(rollouts, "sample", draw)
        patch.setattr(judging, "score_rollout", functools.partial(score, judging.score_rollout))
        run(tiny_experiment.config(), tmp_path_factory.mktemp("run"),
            announce=lambda words: names.append(words.split("] ")[-1]))  # fmt: skip
    return texts, shapes["reward"].batch.ranks[1] if hasattr(shapes["reward"], "batch") else shapes["reward"].ranks[1]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_planned_programs_are_those_that_are_run(ran, stage):
    texts, responses = ran
    planned = programs(tiny_experiment.config(), stage, responses)
    assert {name for of, name in texts if of == stage} == {program.name for program in planned.programs}
    for program in planned.programs:
        assert text(program.function, *program.arguments) == texts[stage, program.name], program.name


def held_by_a_run(folder: str, layout: dict[str, int]) -> dict[str, list[int]]:
    """Bytes on the first device while the second update of each stage runs: what lives, what the executable takes."""
    import gc

    held: dict[str, list[int]] = {}
    names: list[str] = []
    first = jax.devices()[0]

    def make(original, *arguments, **options):
        step = original(*arguments, **options)

        def measured(state, batch, key):
            if names[-1] not in held:
                gc.collect()
                buffers = {shard.data.unsafe_buffer_pointer(): shard.data.nbytes for array in jax.live_arrays()
                           for shard in array.addressable_shards if shard.device == first}  # fmt: skip
                memory = step.lower(state, batch, key).compile().memory_analysis()
                inside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                held[names[-1]] = [sum(buffers.values()), inside]
            return step(state, batch, key)

        return measured

    for module in (supervised, learners, distill):
        module.make_train_step = functools.partial(make, module.make_train_step)
    run(wider(layout), Path(folder), announce=lambda words: names.append(words.split("] ")[-1]))
    return held


def wider(layout: dict[str, int]) -> Experiment:
    """The tiny experiment with a model whose size is not lost among scalars, and distillation for fine-tuning."""
    from rlhf_jax import config

    changes = {"model.d_model": "64", "model.vocab_size": "24", "stages.ppo.minibatch": "8", "stages.ppo.ptx": "None",
               "stages.pretrain.train.batch": "8", "stages.reward.train.batch": "8", "stages.reward.init": "pretrain",
               "stages.ppo.policy": "pretrain", "stages.ppo.prompts_per_iteration": "8"}  # fmt: skip
    changes |= {f"layout.{axis}": str(size) for axis, size in layout.items()}
    tiny = tiny_experiment.config()
    pretrain, _, reward, ppo = tiny.stages
    taught = distill.Distill(
        student="pretrain", teacher="pretrain", prompts=ppo.prompts, prompt_length=1, sampling=ppo.sampling,
        optimizer=ppo.optimizer, iterations=1, prompts_per_iteration=8, minibatch=8,
    )  # fmt: skip
    # Meshes change where things lie and not what there is, so two stages tell enough there.
    stages = (pretrain, taught) if layout else (pretrain, taught, reward, ppo)
    if layout:
        changes = {
            path: value for path, value in changes.items() if not path.startswith(("stages.ppo", "stages.reward"))
        }
    return config.override(dataclasses.replace(tiny, evaluation=None, stages=stages), changes)


def planned_bytes(layout: dict[str, int], devices: int) -> dict[str, list[int]]:
    """What a plan says of the same updates."""
    experiment, found = wider(layout), {}
    made = plan(experiment, machines.parse(f"cpu:{devices}"), jax.devices(), responses=4)
    for stage in made["stages"]:
        memory = stage["programs"][-1]["memory"]
        inside = memory["cache"] + memory["gradients"] + memory["temporary"]
        found[stage["name"]] = [memory["resident"] + memory["batch"], inside]
    return found


@pytest.mark.parametrize("layout", [{}, {"fsdp": 4, "tensor": 2}], ids=["one", "eight"])
def test_memory_is_within_a_tenth_of_a_run(layout, tmp_path):
    devices = 8 if layout else 1
    held = run_on(devices, "test_planning_programs", "held_by_a_run", str(tmp_path / "run"), layout).value
    planned = run_on(devices, "test_planning_programs", "planned_bytes", layout, devices).value
    assert held.keys() == planned.keys()
    for stage, (resident, inside) in held.items():
        assert planned[stage][1] == inside, stage  # the same executable
        assert planned[stage][0] == pytest.approx(resident, rel=0.1), stage


def test_what_waits_on_the_host_is_not_resident():
    from rlhf_jax import config

    given = config.override(tiny_experiment.config(), {"stages.ppo.offload": "reference,optimizer"})
    parked = {program.name: set(program.parked) for program in programs(given, "ppo").programs}
    away = {"reference", "optimizer", "average"}
    assert parked == {"sample": away, "score": away, "prepare": away - {"reference"}, "update": {"reference"}}


def test_parts_and_rollouts_ahead_are_planned():
    from rlhf_jax import config

    given = config.override(tiny_experiment.config(), {"stages.ppo.rollout_parts": "2", "stages.ppo.ahead": "1"})
    found, whole = programs(given, "ppo"), programs(tiny_experiment.config(), "ppo")
    assert [(each.name, each.runs) for each in found.programs] == [
        ("sample", 2), ("score", 2), ("prepare", 1), ("update", 4)]  # fmt: skip
    assert [each.shape[0] for each in found.programs] == [2, 4, 8, 4]
    copied, rollout = found.resident["ahead"]
    assert device_bytes(copied) == device_bytes(found.resident["reference"])
    assert device_bytes(rollout) == device_bytes(whole.programs[2].transient["rollout"])


def test_frozen_rounds_are_held_once():
    tiny = tiny_experiment.config()
    stage = dataclasses.replace(tiny.stages[3], frozen_rounds=1)
    deeper = dataclasses.replace(tiny, model=tiny.model.clone(repeats=2), stages=(stage,))
    held = {kind: device_bytes(tree) for kind, tree in programs(deeper, "ppo").resident.items()}
    model = abstract_params(deeper.model.clone(split=1))
    below = device_bytes({name: model[name] for name in ("embedding", "lower")})
    assert held["frozen"] == below and held["reference"] == device_bytes(model) - below
    both = device_bytes(model) + held["reward"]
    assert held["parameters"] == both - below and held["optimizer"] // held["parameters"] == 2


def test_the_first_program_of_ppo_compiles_alone():
    sampler = programs(tiny_experiment.config(), "ppo").programs[0]
    smaller = sampler.smaller(2) if sampler.smaller is not None else None
    assert smaller is not None and executable(smaller, jax.devices()).memory_analysis() is not None
