"""Stages that train a language model on text: pretraining, and fine-tuning on demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf_jax.data.chat import LossOn
from rlhf_jax.data.packing import Packed, TooLong
from rlhf_jax.data.pipelines import one_pass
from rlhf_jax.data.tables import demonstration_table, text_table
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.language import held_out
from rlhf_jax.models import init_params
from rlhf_jax.objectives.language import LanguageModel
from rlhf_jax.stages.outputs import check_same_architecture
from rlhf_jax.stages.settings import Source, Training, naming
from rlhf_jax.stages.supervised import train_supervised
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.types import PyTree, TokenBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Next-token prediction on text, from random weights or from an earlier model.

    Args:
        train: steps, batch, length, optimizer.
        data: texts; documents end with EOS and are cut into full rows, and never see each other.
        weights: the share of rows that each source gives; None is proportional to their sizes.
        heldout: texts to evaluate on.
        init: a stage or a path to start from; None draws the weights.
    """

    train: Training
    data: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    heldout: tuple[Source, ...] = ()
    init: str | None = None
    name: str = "pretrain"

    def check(self, workspace: Workspace) -> None:
        check_length(workspace, self.train.length, self.name)
        check_weights(self.weights, self.data, self.name)
        if self.init is not None:
            workspace.check_reference(self.init, f"stages.{self.name}.init", self.name)
        sources = (*self.data, *self.heldout)
        tables = [text_rows(workspace, (source,), self.train.length, self.name) for source in sources]
        rows = sum(len(table.tokens) for table in tables[: len(self.data)])
        self.train.check(rows, f"stages.{self.name}.train", workspace.placement)

    def run(self, workspace: Workspace) -> None:
        tables = [text_rows(workspace, (source,), self.train.length, self.name) for source in self.data]
        batches = workspace.batches(self.name, "order", tables, self.train.batch, self.weights)
        heldout = text_rows(workspace, self.heldout, self.train.length, self.name) if self.heldout else None
        _train(self, workspace, batches, sum(len(table.tokens) for table in tables), heldout, "token")


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Supervised fine-tuning on demonstrations, with a loss on the responses only unless asked otherwise.

    Args:
        train: steps or epochs, batch (of packed rows), length, optimizer.
        data: demonstrations, of one or several turns.
        weights: shares of the sources.
        heldout: demonstrations to evaluate on.
        init: a stage or a path to start from; None draws the weights.
        loss_on: which turns are targets.
        mean: ``token`` weighs tokens alike, ``sequence`` demonstrations.
        too_long: what becomes of a demonstration longer than a row.
        pretraining: texts to mix in (InstructGPT's start for RLHF: a tenth).
        pretraining_share: of the rows.
    """

    train: Training
    data: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    heldout: tuple[Source, ...] = ()
    init: str | None = "pretrain"
    loss_on: LossOn = "responses"
    mean: Literal["token", "sequence"] = "token"
    too_long: TooLong = "error"
    pretraining: tuple[Source, ...] = ()
    pretraining_share: float = 0.0
    name: str = "sft"

    def __post_init__(self):
        if not 0 <= self.pretraining_share < 1:
            raise UserError(f"pretraining_share={self.pretraining_share}", at=self.name, expected="a number in [0, 1)",
                            fix="correct it")  # fmt: skip
        if (self.pretraining_share > 0) != bool(self.pretraining):
            raise UserError(
                f"pretraining_share={self.pretraining_share} with {len(self.pretraining)} sources of pretraining text",
                at=self.name, expected="both or none", fix="name sources, or set the share to 0",
            )  # fmt: skip

    def check(self, workspace: Workspace) -> None:
        check_length(workspace, self.train.length, self.name)
        check_weights(self.weights, self.data, self.name)
        if self.init is not None:
            workspace.check_reference(self.init, f"stages.{self.name}.init", self.name)
        tables = [self._table(workspace, (source,)) for source in (*self.data, *self.heldout)]
        rows = sum(len(table.tokens) for table in tables[: len(self.data)])
        self.train.check(rows, f"stages.{self.name}.train", workspace.placement)
        if self.pretraining:
            text_rows(workspace, self.pretraining, self.train.length, self.name)

    def run(self, workspace: Workspace) -> None:
        tables = [self._table(workspace, (source,)) for source in self.data]
        rows = [len(table.tokens) for table in tables]
        shares = [float(size) for size in rows] if self.weights is None else list(self.weights)
        if self.pretraining:
            texts = text_rows(workspace, self.pretraining, self.train.length, self.name)
            shares = [share * (1 - self.pretraining_share) / sum(shares) for share in shares] + [self.pretraining_share]
            tables.append(texts)
        batches = workspace.batches(self.name, "order", tables, self.train.batch, shares)
        heldout = self._table(workspace, self.heldout) if self.heldout else None
        _train(self, workspace, batches, sum(rows), heldout, self.mean)

    def _table(self, workspace: Workspace, sources: tuple[Source, ...]) -> TokenBatch:
        def make() -> TokenBatch:
            with naming(sources, self.name):
                packed = demonstration_table(
                    workspace.read(sources), workspace.tokenizer, workspace.chat, self.train.length,
                    loss_on=self.loss_on, too_long=self.too_long,
                )  # fmt: skip
            return logged(packed, self.name)

        return workspace.once((sources, self.train.length, self.loss_on, self.too_long), make)


def _train(
    stage: Pretrain | FineTune,
    workspace: Workspace,
    batches,
    rows: int,
    heldout: TokenBatch | None,
    mean: Literal["token", "sequence"],
) -> None:
    model = workspace.model
    if stage.init is None:
        params = init_params(model, workspace.key(stage.name, "init"), workspace.placement.params(model))
    else:
        start = workspace.output(stage.init, f"stages.{stage.name}.init")
        check_same_architecture(start.trunk, model, stage.init)
        params = start.trunk_params
    objective = LanguageModel(model, name=stage.name, mean=mean)
    train_supervised(
        workspace, stage.name, stage.train, model, params, batches, stage.train.total_steps(rows),
        loss=objective.loss, with_weights=objective.with_weights, conclude=objective.conclude,
        evaluate=None if heldout is None else heldout_loss(workspace, heldout, stage.train.batch, stage.name),
    )  # fmt: skip


def heldout_loss(workspace: Workspace, rows: TokenBatch, batch: int, name: str) -> Callable[[PyTree], dict[str, float]]:
    """A function of the parameters: loss per target token over all rows, and bits per byte."""
    decode = workspace.tokenizer.decode

    def evaluate(params: PyTree) -> dict[str, float]:
        found = held_out(workspace.model, params, workspace.stoppable(one_pass(rows, batch)), decode)
        return {f"{name}/heldout_{what}": estimate.value for what, estimate in found.estimates().items()}

    return evaluate


def text_rows(workspace: Workspace, sources: tuple[Source, ...], length: int, name: str) -> TokenBatch:
    """Texts as full rows of tokens."""

    def make() -> TokenBatch:
        with naming(sources, name):
            return logged(text_table(workspace.read(sources), workspace.tokenizer, length), name)

    return workspace.once((sources, length), make)


def logged(packed: Packed, name: str) -> TokenBatch:
    log.info("%s: %s", name, packed.report.summary())
    return packed.rows


def check_length(workspace: Workspace, length: int, name: str) -> None:
    if length > workspace.model.max_length:
        raise UserError(f"rows of {length} tokens", at=f"stages.{name}",
                        expected=f"at most the model's max_length={workspace.model.max_length}",
                        fix="shorten the rows, or raise model.max_length")  # fmt: skip


def check_weights(weights: tuple[float, ...] | None, data: tuple[Source, ...], name: str) -> None:
    if not data:
        raise UserError("no sources of data", at=f"stages.{name}.data", expected="at least one", fix="name one")
    if weights is not None and len(weights) != len(data):
        raise UserError(f"{len(weights)} weights for {len(data)} sources", at=f"stages.{name}.weights",
                        expected="one for each", fix="correct the weights")  # fmt: skip
