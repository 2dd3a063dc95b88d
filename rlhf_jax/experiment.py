"""An experiment as a value, and what can be done with it: run it, show it, sample from it, evaluate it."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax import config, processes
from rlhf_jax.data.chat import ChatFormat
from rlhf_jax.errors import Preempted, UserError
from rlhf_jax.models import Transformer, abstract_params
from rlhf_jax.rewards.base import models_of
from rlhf_jax.runs.files import write_json
from rlhf_jax.runs.rundir import RunDirectory, check_reuse, open_run, read_config
from rlhf_jax.sharding import Layout, Placement
from rlhf_jax.stages.best_of_n import ExpertIteration
from rlhf_jax.stages.cost import TrainCost
from rlhf_jax.stages.distill import Distill
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.ilql import ILQL
from rlhf_jax.stages.label import Label
from rlhf_jax.stages.plans import AnyStage, stage_plan
from rlhf_jax.stages.preference import PreferenceTune
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.stages.settings import Chat, TokenizerSpec
from rlhf_jax.stages.workspace import Monitor, Workspace
from rlhf_jax.training.metrics import Sink, TensorBoard, WeightsAndBiases
from rlhf_jax.training.signals import StopRequested

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run depends on.

    Args:
        name: of the run directory.
        tokenizer: bytes, characters, a saved one, or one to be trained on this experiment's records.
        model: the language model of every stage.
        stages: in order; each may start from an earlier one or from a saved output.
        evaluation: at the end of the run; None for none.
        chat: how conversations are written as text.
        seed: of everything that is random.
        sinks: also send metrics to ``tensorboard`` or ``wandb``.
        layout: how models and batches are spread over the devices; numbers do not depend on it beyond rounding.
    """

    name: str
    tokenizer: TokenizerSpec
    model: Transformer
    stages: tuple[AnyStage, ...]
    evaluation: Evaluation | None = None
    chat: Chat = field(default_factory=ChatFormat)
    seed: int = 0
    sinks: tuple[str, ...] = ()
    layout: Layout = Layout()

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or not names:
            raise UserError(f"stages are named {names}", at="Experiment.stages", expected="at least one, all different",
                            fix="give each its own name")  # fmt: skip
        for sink in self.sinks:
            if sink not in ("tensorboard", "wandb"):
                raise UserError(f"{sink!r}", at="Experiment.sinks", expected="'tensorboard' or 'wandb'",
                                fix="correct it")  # fmt: skip
        _check_model(self.model)  # pyright: ignore[reportArgumentType]
        kinds = {stage.name: type(stage) for stage in self.stages}
        for stage in self.stages:
            if isinstance(stage, PreferenceTune):
                _check_kind(kinds, f"stages.{stage.name}.init", stage.init, "a language model")
            if isinstance(stage, Reinforce | ILQL | ExpertIteration | Distill):
                for field in ("reward", "gold"):
                    reward = getattr(stage, field, None)
                    for reference, kind in [] if reward is None else models_of(reward):
                        wanted = "a reward model" if kind == "scalar" else "a language model"
                        _check_kind(kinds, f"stages.{stage.name}.{field}", reference, wanted)
            if isinstance(stage, ExpertIteration | Label):
                _check_kind(kinds, f"stages.{stage.name}.policy", stage.policy, "a language model")
            if isinstance(stage, Distill):
                for field in ("student", "teacher"):
                    _check_kind(kinds, f"stages.{stage.name}.{field}", getattr(stage, field), "a language model")
            if isinstance(stage, Reinforce):
                _check_kind(kinds, f"stages.{stage.name}.policy", stage.policy, "a language model")
                for source in () if stage.cost is None else stage.cost.sources:
                    _check_kind(kinds, f"stages.{stage.name}.cost", source, "a cost model")
                if stage.reference is not None:
                    _check_kind(kinds, f"stages.{stage.name}.reference", stage.reference, "a language model")

    def workspace(self, folder: Path, monitor: Monitor | None = None, placement: Placement = Placement()) -> Workspace:
        """The experiment as its stages see it; on one device unless a ``placement`` is given."""
        return Workspace(
            folder=folder, seed=self.seed, model=self.model, tokenizer_spec=self.tokenizer, chat=self.chat,
            stage_names=tuple(stage.name for stage in self.stages), monitor=monitor,
            make_sinks=_sinks(self, folder), placement=placement,
        )  # fmt: skip


def run(
    experiment: Experiment,
    run_dir: Path,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    source: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    monitor: Monitor | None = None,
    announce: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Run all stages that are not finished, or only the named ones, and evaluate; returns the summary.

    Args:
        experiment: what to run.
        run_dir: where; a new directory, or one to ``resume``.
        resume: go on in a directory with a run of this configuration in it.
        only: names of stages; the others must be finished if these need them.
        source: the experiment's file, to be copied.
        overrides: what was changed beside it, to be recorded.
        monitor: is told of each row of metrics.
        announce: is told which stage begins, in words.
    """
    chosen, described = _chosen(experiment, only), config.describe(experiment)
    processes.same("the configuration", config.fingerprint(described))
    check_reuse(run_dir, described, resume)  # before data is read, and again when the directory is ours
    workspace = experiment.workspace(run_dir, monitor, experiment.layout.place())
    for stage in chosen:
        if not workspace.is_finished(stage.name):
            stage.check(workspace)
    if experiment.evaluation is not None:
        experiment.evaluation.check(workspace)
    with (
        open_run(run_dir, described, source=source, overrides=overrides, resume=resume) as directory,
        _stoppable(workspace),
        workspace.placement.active(),
    ):
        processes.first("saving of the tokenizer", lambda: workspace.tokenizer.save(run_dir))
        directory.note(implementations={stage.name: stage_plan(stage, experiment.model) for stage in chosen})
        for number, stage in enumerate(chosen, start=1):
            if workspace.is_finished(stage.name):
                announce(f"[{number}/{len(chosen)}] {stage.name}: finished before")
                continue
            announce(f"[{number}/{len(chosen)}] {stage.name}")
            stage.run(workspace)
            if workspace.stop.requested:
                raise Preempted(f"stopped after stage {stage.name}; everything is saved")
        return _conclude(experiment, workspace, directory, announce)


def evaluate(
    run_dir: Path, announce: Callable[[str], None] = log.info, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluate the finished stages of a run again; ``known`` as for ``read_experiment``."""
    experiment = read_experiment(run_dir, known)
    workspace = experiment.workspace(run_dir, placement=experiment.layout.place())
    if experiment.evaluation is None:
        raise UserError("the experiment has no evaluation", at=str(run_dir), expected="an Evaluation in its config()",
                        fix="add one and run it in another directory")  # fmt: skip
    with (
        open_run(run_dir, config.describe(experiment), resume=True) as directory,
        _stoppable(workspace),
        workspace.placement.active(),
    ):
        return _conclude(experiment, workspace, directory, announce)


def read_experiment(run_dir: Path, known: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment that a run directory was made for, from its ``config.json``.

    Args:
        run_dir: of the run.
        known: classes of the user's own by name, as for ``config.revive``.
    """
    experiment = config.revive(read_config(run_dir), known)
    if not isinstance(experiment, Experiment):
        raise UserError(f"holds a {type(experiment).__name__}", at=str(run_dir), expected="an Experiment",
                        fix="name a run directory")  # fmt: skip
    return experiment


@contextlib.contextmanager
def _stoppable(workspace: Workspace) -> Iterator[None]:
    """Signals ask the run to stop, wherever it is."""
    with workspace.stop:
        try:
            yield
        except StopRequested:
            # Between a stage's last step and its output, or in the evaluation: what was begun is done again.
            raise Preempted("stopped behind the last step of a stage; everything is saved") from None


@functools.lru_cache(maxsize=16)
def _check_model(model: Transformer) -> None:
    """Find what makes a model impossible, such as an odd width of heads that are rotated, from shapes alone."""
    try:
        abstract_params(model)
    except ValueError as fault:
        raise UserError(f"no such model can be built ({fault})", at="Experiment.model",
                        fix="change its fields") from fault  # fmt: skip


def _check_kind(kinds: Mapping[str, type[AnyStage]], at: str, reference: Any, wanted: str) -> None:
    """A stage of this experiment that is named somewhere trains what is wanted there."""
    if not isinstance(reference, str) or reference not in kinds:
        return
    others = {TrainReward: "a reward model", TrainCost: "a cost model", Label: "nothing"}
    found = others.get(kinds[reference], "a language model")
    if found != wanted:
        raise UserError(f"stage {reference!r} trains {found}", at=at, expected=wanted,
                        fix="name the stage that trains one")  # fmt: skip


def _conclude(
    experiment: Experiment, workspace: Workspace, directory: RunDirectory, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate what there is; the run is done when every stage is."""
    summary: dict[str, Any] = {"seed": experiment.seed}
    if experiment.evaluation is not None:
        announce("evaluation")
        summary |= experiment.evaluation.run(workspace)
    if all(workspace.is_finished(stage.name) for stage in experiment.stages):
        directory.finish(summary)
    elif processes.is_first():
        write_json(directory.path / "partial_summary.json", summary)
    return summary


def _chosen(experiment: Experiment, only: Sequence[str]) -> list[AnyStage]:
    names = [stage.name for stage in experiment.stages]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"no stage {unknown[0]!r}", at="--only", expected=f"some of {', '.join(names)}",
                        fix="correct the name")  # fmt: skip
    return [stage for stage in experiment.stages if not only or stage.name in only]


def _sinks(experiment: Experiment, folder: Path) -> Callable[[str], tuple[Sink, ...]]:
    def make(stage: str) -> tuple[Sink, ...]:
        made: list[Sink] = []
        if not processes.is_first():
            return ()
        if "tensorboard" in experiment.sinks:
            made.append(TensorBoard(folder / stage / "tensorboard"))
        if "wandb" in experiment.sinks:
            made.append(WeightsAndBiases("rlhf_jax", f"{folder.name}-{stage}", config.describe(experiment)))
        return tuple(made)

    return make
