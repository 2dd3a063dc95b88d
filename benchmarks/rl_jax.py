"""Our side of rl.py: the package's loop of reinforcement learning, and sampling with and without slots.

Answers on stdout (lines.py). fp32, the same starting weights, prompts and reward as the peer's side.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from lines import Questions
from rl_sizes import CASES, EOS, PAD, TINY, Case, good

import rlhf_jax
from rlhf_jax.models import Transformer, count_params
from rlhf_jax.models.huggingface import import_folder
from rlhf_jax.objectives.critic_free import GroupOptimization, PolicyAlone
from rlhf_jax.objectives.group_presets import rloo, trl_grpo
from rlhf_jax.objectives.shared_prompts import SharedPrompts
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.reinforcement import Plan, Program, reinforce, take_rows
from rlhf_jax.training.step import init_state, make_train_step
from rlhf_jax.types import PromptBatch, PyTree, Rollout, Scores


def starting_model(folder: Path) -> tuple[Transformer, PyTree]:
    """The peer's model and weights. Unrolled layers are what a user on CPU would choose."""
    model, params = import_folder(folder)
    return model.clone(unroll=True), jax.tree.map(jnp.asarray, params)


class NextPrompts:
    """An endless stream that takes the prompts in turn."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._tokens, self._next = case, np.load(folder / "prompts.npy"), 0

    def __next__(self) -> PromptBatch:
        index = (self._next + np.arange(self._case.prompts, dtype=np.int32)) % len(self._tokens)
        self._next += self._case.prompts
        return PromptBatch(*map(jnp.asarray, (self._tokens[index], np.full(len(index), self._case.prompt), index)))

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state


class Phases:
    """Seconds of each phase since the last question."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, waited for, with its time added to the phase."""

        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = jax.block_until_ready(function(*arguments))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
            return result

        return call


def learning(questions: Questions, case: Case, folder: Path, method: str) -> None:
    """One iteration a question: rollout, rewards in plain Python, advantages, one update."""
    policy, params = starting_model(folder)
    sampling = Sampling(case.new_tokens, samples_per_prompt=case.group, regroup=case.regroup)
    group = {"grpo": trl_grpo, "rloo": rloo}[method]
    rows = case.responses // case.microbatches
    objective = GroupOptimization(
        group, PolicyAlone(policy), sampling, rows=rows, lengths=case.lengths, share_prompts=True
    )
    trained = SharedPrompts(objective, case.group, case.lengths, case.microbatches)
    optimizer = Optimizer(case.learning_rate, clip_norm=1.0).build(1)
    phases, sampled = Phases(), []

    @jax.jit
    def prepare(params: PyTree, ref_params: PyTree, rollout: Rollout, scores: Scores, coef: jax.Array) -> Any:
        experience = objective.prepare(params, ref_params, rollout, scores, coef)
        return experience, objective.rollout_metrics(experience)

    def draw(params: PyTree, prompts: PromptBatch, key: jax.Array, step: jax.Array) -> Rollout:
        return sample(policy, params, prompts, sampling, key, step, eos_id=EOS, pad_id=PAD)

    def judge(rollout: Rollout) -> Scores:
        tokens, starts, lengths = map(np.asarray, (rollout.tokens, rollout.prompt_lengths, rollout.response_lengths))
        sampled.append(int(lengths.sum()))
        each = zip(tokens, starts, lengths, strict=True)
        return Scores(jnp.array([good(row[start : start + n].tolist()) for row, start, n in each], jnp.float32))

    drawing, judging = phases.timed("generation", draw), phases.timed("scoring", judge)

    def collect(params: PyTree, prompts: Any, key: jax.Array, step: jax.Array) -> Any:
        rollout = drawing(params, next(prompts), key, step)
        return rollout, judging(rollout), {}

    update = make_train_step(trained.loss, optimizer, with_weights=trained.with_weights)
    deviations: list[float] = []

    def on_row(row: Mapping[str, Any]) -> None:
        """Sleep until the next question between two iterations."""
        deviations.append(float(row["ppo/first_ratio_deviation"]))
        questions.done(
            tokens=sampled.pop(), count=case.responses, updates=1, phases=dict(phases.seconds),
            first_ratio_deviation=deviations[-1],
        )  # fmt: skip
        phases.seconds.clear()
        if not questions.begin():
            raise EOFError

    program = Program(
        collect=collect,
        prepare=phases.timed("scoring", lambda trained, *rest: prepare(trained, params, *rest)),
        batch=lambda experience, rows, streams: take_rows(experience, rows),
        update=phases.timed("update", update),
        control=lambda controller, scores, metrics: objective.control(controller, metrics, case.responses, scores),
    )
    if not questions.begin():
        return
    with contextlib.suppress(EOFError):
        reinforce(
            program, Plan(iterations=10_000, minibatch=case.responses), init_state(params, optimizer),
            objective.start(), NextPrompts(case, folder), key=jax.random.key(3), on_row=on_row,
        )  # fmt: skip


def refill(questions: Questions, case: Case, folder: Path, slots: str) -> None:
    """Twice the responses of a rollout: all rows together, batch after batch of ``case.slots`` rows, or in slots."""
    model, params = starting_model(folder)
    places = case.slots
    prompts = NextPrompts(replace(case, prompts=2 * case.prompts), folder)
    sampling = Sampling(case.new_tokens, samples_per_prompt=case.group, slots=case.slots if slots == "slots" else None)
    calls = 0

    def run() -> dict[str, Any]:
        nonlocal calls
        calls += 1
        batch, key = next(prompts), jax.random.fold_in(jax.random.key(0), calls)
        each = places // case.group if slots == "batches" else 2 * case.prompts
        parts = [jax.tree.map(lambda x, i=i: x[i : i + each], batch) for i in range(0, 2 * case.prompts, each)]
        drawn = [sample(model, params, part, sampling, key, eos_id=EOS, pad_id=PAD) for part in parts]
        lengths = np.concatenate([np.asarray(rollout.response_lengths) for rollout in drawn])
        return {"tokens": int(lengths.sum()), "count": len(lengths), "longest": int(lengths.max())}

    questions.serve(run)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our side of rl.py.")
    parser.add_argument("part", choices=["trl", "refill"])
    parser.add_argument("what", help="grpo or rloo; together, batches or slots")
    parser.add_argument("case", choices=[*CASES])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    questions = Questions()
    questions.answer(
        versions={"rlhf_jax": rlhf_jax.__version__, "jax": jax.__version__},
        parameters=count_params(starting_model(options.folder)[0]),
        flags=os.environ.get("XLA_FLAGS", ""),
    )
    case = (TINY if options.tiny else CASES)[options.case]
    {"trl": learning, "refill": refill}[options.part](questions, case, options.folder, options.what)


if __name__ == "__main__":
    main()
