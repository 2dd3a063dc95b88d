"""What the three supervised stages share: optimizer, checkpoints, metrics, and the output at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhf_jax.models import ScalarModel, Transformer
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.settings import Training
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Batches, train
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.step import Loss, init_state, make_train_step
from rlhf_jax.types import Metrics, PyTree

log = logging.getLogger(__name__)


def train_supervised(
    workspace: Workspace,
    stage: str,
    training: Training,
    model: Transformer | ScalarModel,
    params: PyTree,
    batches: Batches,
    total_steps: int,
    *,
    loss: Loss,
    with_weights: Callable[[Any], Any],
    conclude: Callable[[PyTree, Metrics], tuple[PyTree, Metrics]],
    evaluate: Callable[[PyTree], Mapping[str, Any]] | None = None,
    finish: Callable[[PyTree], tuple[PyTree, dict[str, Any]]] | None = None,
) -> None:
    """Train from ``params`` (or the stage's newest checkpoint) and save the output.

    Args:
        finish: may change the final parameters, and adds to the output's notes.
    """
    folder = workspace.stage_folder(stage)
    optimizer, ema = training.optimizer.build(total_steps), training.ema_decay is not None
    placement = workspace.placement
    shardings = placement.state(optimizer, params, placement.params(model), ema)
    step = make_train_step(
        loss, optimizer, with_weights=with_weights, conclude=conclude, microbatches=training.microbatches,
        ema_decay=training.ema_decay, state_shardings=shardings,
    )  # fmt: skip
    state = init_state(params, optimizer, ema=ema, shardings=shardings)
    with MetricsWriter(folder / "metrics.jsonl", workspace.sinks(stage)) as metrics:
        state = train(
            state,
            step,
            batches,
            total_steps=total_steps,
            key=workspace.key(stage, "train"),
            checkpoints=Checkpoints(folder / "checkpoints", every=training.save_every),
            metrics=metrics,
            stop=workspace.stop,
            evaluate=evaluate,
            evaluate_every=0 if training.evaluate_every is None else training.evaluate_every,
            evaluate_first=evaluate is not None,
            log_every=training.log_every,
            prefix=stage,
            count_tokens=count_tokens,
            place=placement.put_batch,
            on_row=workspace.watch(stage, total_steps),
        )
    params, notes = state.params if state.ema is None else state.ema, {}
    if finish is not None:
        params, notes = finish(params)
    workspace.save(
        stage, Output(model, params, workspace.tokenizer, {"stage": stage, "steps": int(state.step), **notes})
    )


def count_tokens(batch: Any) -> int:
    """Tokens of a batch that are no padding."""
    if hasattr(batch, "segments"):
        return int(np.count_nonzero(batch.segments))
    return int(np.sum(batch.lengths))
