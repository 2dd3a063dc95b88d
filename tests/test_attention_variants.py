"""The experiment over all mixers, each run end to end at its smallest: what is sampled is what is trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
from meshes import thoroughly

from rlhf_jax import config
from rlhf_jax import experiment as programs
from rlhf_jax.models import mixers
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.training.metrics import read_metrics

FILE = config.load(Path(__file__).parents[1] / "experiments" / "attention_variants.py")
VALUES = dict(FILE.sweep())
TASKS = ("walks", "market")
SOME = {f"walks-{name}" for name in ("softmax", "gau", "flash")}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Compile with little optimisation: these programs run once or twice, on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def smallest(overrides) -> programs.Experiment:
    """One step of training, two small iterations of PPO whose critic is a head of the policy, no evaluation."""
    value = config.override(FILE.config(), overrides)
    train, ppo = value.stages
    assert isinstance(ppo, Reinforce)
    optimizer = dataclasses.replace(train.train.optimizer, warmup_fraction=0.0)
    short = dataclasses.replace(train.train, steps=1, batch=4, optimizer=optimizer, save_every=1)
    few = {"iterations": 2, "prompts_per_iteration": 4, "minibatch": 2, "save_every": 2, "samples_every": 2}
    return dataclasses.replace(
        value,
        model=value.model.clone(repeats=1, unroll=False),
        stages=(
            dataclasses.replace(train, train=short, data=cut(train.data), heldout=()),
            dataclasses.replace(ppo, prompts=cut(ppo.prompts), critic="shared", **few),
        ),
        evaluation=None,
    )


def cut(sources):
    """Few records of each source."""
    return tuple(dataclasses.replace(source, count=20) for source in sources)


@pytest.mark.parametrize("name", thoroughly([name for name in VALUES if name.startswith("walks")], SOME))
def test_every_variant_trains_samples_and_runs_ppo(name, tmp_path):
    run_end_to_end(name, tmp_path)


@pytest.mark.parametrize("name", thoroughly(["market-window-sinks", "market-flash"], {"market-flash"}))
def test_variants_run_on_text(name, tmp_path):
    run_end_to_end(name, tmp_path)


def run_end_to_end(name, folder):
    programs.run(smallest(VALUES[name]), folder / "run")
    rows = [row for row in read_metrics(folder / "run" / "ppo" / "metrics.jsonl") if "ppo/first_ratio_deviation" in row]
    assert len(rows) == 2
    assert all(row["ppo/first_ratio_deviation"] <= 1e-4 for row in rows)


def test_every_kind_of_mixer_is_a_variant_on_both_tasks():
    kinds = {kind for kind in vars(mixers).values() if isinstance(kind, type) and hasattr(kind, "empty_cache")}
    used = set()
    for overrides in VALUES.values():
        for block in overrides["model"].pattern:
            used |= {type(block.mixer), *(type(each) for each in getattr(block.mixer, "mixers", ()))}
    assert used == kinds
    walks, market = ({name.removeprefix(task) for name in VALUES if name.startswith(task)} for task in TASKS)
    assert walks == market and len(VALUES) == 2 * len(walks)
