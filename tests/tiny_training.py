"""A tiny training run that tests start, kill, stop and resume, in this process or as a program of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import PREEMPTED, Preempted
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import train
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.signals import StopSignal
from rlhf_jax.training.step import init_state, make_train_step

OPTIMIZER = Optimizer(0.05, schedule="cosine", warmup_steps=3).build(100)


class Batches:
    """Random rows that depend on the position alone."""

    def __init__(self, end=None, poison=None):
        self.position, self.end, self.poison = 0, end, poison

    def __next__(self):
        if self.position == self.end:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        self.position += 1
        x = rng.normal(size=(4, 3)).astype(np.float32)
        if self.position == self.poison:
            x[0, 0] = np.nan
        return {"x": x, "y": np.sin(x.sum(axis=1))}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def loss(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["a"]["kernel"]) * jax.random.bernoulli(key, 0.8, (5,))
    value = jnp.mean((hidden @ params["b"]["kernel"] - batch["y"]) ** 2)
    return value, {"mse": value}


STEP = make_train_step(loss, OPTIMIZER, ema_decay=0.9)


def fresh_state():
    a, b = jax.random.split(jax.random.key(5))
    params = {"a": {"kernel": jax.random.normal(a, (3, 5))}, "b": {"kernel": jax.random.normal(b, (5,))}}
    return init_state(params, OPTIMIZER, ema=True)


def run(folder, total_steps, *, every=2, keep=2, batches=None, stop=None, **options):
    """Trains in ``folder``, from its newest checkpoint where it has one."""
    with MetricsWriter(Path(folder) / "metrics.jsonl") as metrics:
        return train(
            fresh_state(),
            STEP,
            Batches() if batches is None else batches,
            total_steps=total_steps,
            key=jax.random.key(7),
            checkpoints=Checkpoints(Path(folder) / "checkpoints", keep=keep, every=every),
            metrics=metrics,
            stop=stop,
            prefix="tiny",
            **options,
        )


def evaluate(params):
    return {"tiny/weight": float(jnp.sum(params["a"]["kernel"]))}


def main() -> int:
    """Arguments: folder, total steps, seconds to linger in an evaluation, seconds to linger after a row."""
    folder, total, in_evaluation, after_row = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    stop = StopSignal()

    def slow_evaluate(params):
        (Path(folder) / "evaluating").touch()
        until = time.monotonic() + in_evaluation
        while time.monotonic() < until:
            stop.check()
            time.sleep(0.01)
        return evaluate(params)

    try:
        with stop:
            run(
                folder,
                total,
                stop=stop,
                evaluate=slow_evaluate,
                evaluate_every=3,
                on_row=lambda row: time.sleep(after_row),
            )
    except Preempted as stopped:
        print(stopped)
        return PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
