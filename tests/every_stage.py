"""A tiny experiment of all stages that ``tiny_experiment`` lacks, on the fireworks, and what a run of it leaves.

By hand in two processes: rlhf-jax launch --processes 2 --devices-per-process 1 tests/every_stage.py --set layout.fsdp=2
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.chat import ChatFormat
from rlhf_jax.data.tasks.base import TaskCosts, TaskDemonstrations, TaskPrompts, TaskRankings, TaskSafety, TaskTexts
from rlhf_jax.data.tasks.fireworks import ALPHABET, Fireworks
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment, run
from rlhf_jax.models import MLP, Attention, Block, Transformer
from rlhf_jax.objectives.distillation import Divergence
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.objectives.rules import DPO, KTO
from rlhf_jax.ops.kl import AdaptiveKL
from rlhf_jax.ops.lagrange import Lagrangian, Shaping
from rlhf_jax.rewards import Ensemble, Learned, Length, Process, Rubric, StepRule, Sum
from rlhf_jax.runs.files import read_rows
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import Layout
from rlhf_jax.stages.best_of_n import ExpertIteration, Selection
from rlhf_jax.stages.cost import TrainCost
from rlhf_jax.stages.costs import Cost
from rlhf_jax.stages.distill import Distill
from rlhf_jax.stages.ilql import ILQL, Steer
from rlhf_jax.stages.label import Label
from rlhf_jax.stages.labellers import Programmatic
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.normalising import ReferenceSamples
from rlhf_jax.stages.outputs import load_output
from rlhf_jax.stages.preference import PreferenceTune
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.stages.settings import StageRecords, Training
from rlhf_jax.stages.turns import Turns
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.optimizer import Optimizer

TASK = Fireworks(4)
COSTS, PLACES, SHOWS = TaskCosts(TASK), (TaskPrompts(TASK, 8),), (TaskDemonstrations(TASK, 40),)
RANKED, UNSEEN = (TaskRankings(TASK, 16),), (TaskRankings(TASK, 6, seed=5),)
OPTIMIZER = Optimizer(1e-2, eps=1e-3)
"""A large eps: Adam's first updates would otherwise turn gradients that are zero up to rounding into signs."""
FOUR = Sampling(max_new_tokens=5, samples_per_prompt=4)
SAMPLED: dict[str, Any] = {"prompts": PLACES, "prompt_length": 1, "sampling": FOUR}
"""Four prompts at a time in every stage, so that the sampler is compiled once."""


@dataclasses.dataclass(frozen=True)
class Again:
    """Asks for one more show."""

    def reply(self, messages, record: Mapping[str, Any]) -> str | None:
        return "a" if len(messages) < 3 else None


def train(**changes) -> Training:
    plain = {"steps": 2, "batch": 8, "length": 8, "optimizer": OPTIMIZER, "log_every": 1, "save_every": 2}
    return Training(**plain | changes)


def reinforce(name: str, **changes) -> Reinforce:
    plain = SAMPLED | {"ppo": PPO(kl=AdaptiveKL(0.1, target=1e-2, horizon=100)), "iterations": 2, "minibatch": 8,
                       "prompts_per_iteration": 4, "save_every": 2, "samples_every": 1,
                       "optimizer": OPTIMIZER}  # fmt: skip
    return Reinforce(name=name, policy="clone", **plain | changes)


RUBRIC = Rubric("clone", "a{prompt}b{response}", (("c", 1.0), ("de", -1.0)), length=8, too_long="cut")
STEPS = StepRule(Length(high=1, unit="characters", penalty=0.25), at="R")
ASKED = Sum((RUBRIC, STEPS, TASK), (2.0, 0.5, 1.0))
LEARNED = Sum(("reward", Process("reward", at="B", name="process"), TASK), (1.0, 0.1, 1.0))

STAGES = (
    Pretrain(name="clone", train=train(), data=(TaskTexts(TASK, 40),)),
    TrainReward(init="clone", train=train(microbatches=2), data=RANKED, centre=(TaskDemonstrations(TASK, 9),)),
    TrainReward(name="second", init="clone", train=train(), data=RANKED, heldout=UNSEEN,
                centre=ReferenceSamples(**SAMPLED)),
    TrainCost(init="clone", train=train(), data=(TaskSafety(TASK, 16),), heldout=(TaskSafety(TASK, 6, seed=5),)),
    Label(policy="clone", labeller=Programmatic(Sum(("reward", TASK)), temperature=0.1), count=8, batch=4, **SAMPLED),
    PreferenceTune(name="dpo", init="clone", train=train(batch=4), data=(StageRecords("label"), *RANKED),
                   rule=DPO(0.1), sft_coef=0.1, heldout=UNSEEN),
    PreferenceTune(name="kto", init="clone", train=train(), data=RANKED, rule=KTO(baseline="mismatched")),
    ILQL(init="clone", train=train(microbatches=2), data=SHOWS, reward=RUBRIC, beta=2.0),
    Steer(policy="ilql", beta=8.0, name="steered"),
    ExpertIteration(
        policy="clone", reward=LEARNED, selection=Selection(keep=2, distinct=True), optimizer=OPTIMIZER, rounds=2,
        prompts_per_round=8, prompts_at_a_time=4, minibatch=8, microbatches=2, restart=True, export=True,
        rows_at_a_time=16, **SAMPLED,
    ),
    Distill(
        student="clone", teacher="ilql", on_policy=0.5, divergence=Divergence("jsd"), data=SHOWS, optimizer=OPTIMIZER,
        iterations=4, prompts_per_iteration=4, minibatch=8, microbatches=2, gold=TASK, save_every=4, samples_every=1,
        rows_at_a_time=8, **SAMPLED,
    ),
    reinforce(
        "talk", critic=None, ppo=GroupPolicy(process="group"), reward=ASKED, gold=TASK, on_error="drop",
        rows_at_a_time=8, cost=Cost(of=COSTS, by=Shaping(0.5)),
        turns=Turns(environment=Again(), most=2, length=11),
    ),
    reinforce(
        "safe", reward=LEARNED, optimizer=dataclasses.replace(OPTIMIZER, groups={"cost_critic": 2e-2}),
        cost=Cost(by=Lagrangian(threshold=0.1, start=0.5, rate=0.4, window=12), gold=COSTS),
    ),
    reinforce(
        "greedy", critic=None, ppo=GroupPolicy(baseline="greedy"), update_lengths=(3,), more_batches=1, ema_decay=0.5,
        reward=Ensemble((Learned("reward"), Learned("second")), "uncertainty", coef=0.5),
        sampling=dataclasses.replace(FOUR, slots=8),
    ),
    reinforce("frozen", critic="shared", reward="second", frozen_rounds=1, microbatches=2,
              offload=("reward", "reference", "optimizer")),
)  # fmt: skip


def config(names: Sequence[str] = ()) -> Experiment:
    """These stages of a model of one layer, or all of a model of two, of which one can be frozen."""
    block = Block(Attention(heads=2), MLP(16))
    layers = 1 if names else 2
    model = Transformer(vocab_size=20, d_model=8, pattern=(block,), repeats=layers, max_length=16, init_std=0.3)
    return Experiment(
        name="every", tokenizer=CharTokenizer(ALPHABET), chat=ChatFormat("", "", "", "", "", ""), model=model,
        stages=tuple(stage for stage in STAGES if not names or stage.name in names),
    )  # fmt: skip


def left_by_a_run(names: Sequence[str], sizes: dict[str, int]) -> dict[str, Any]:
    """What each stage leaves in a layout: rows of metrics, parameters in one list, and texts by file."""
    folder = Path(tempfile.mkdtemp()) / "run"
    run(dataclasses.replace(config(names), layout=Layout(**sizes)), folder)
    return {stage.name: left_by_a_stage(folder / stage.name) for stage in config(names).stages}


def left_by_a_stage(folder: Path) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in read_metrics(folder / "metrics.jsonl")]  # fmt: skip
    params = load_output(folder / "output").params if (folder / "output").is_dir() else ()
    texts = {path.name: read_rows(path) for path in sorted(folder.glob("*.jsonl")) if path.name != "metrics.jsonl"}
    numbers = [float(number) for leaf in jax.tree.leaves(params) for number in np.ravel(leaf)]
    return {"rows": rows, "params": numbers, "texts": texts}
