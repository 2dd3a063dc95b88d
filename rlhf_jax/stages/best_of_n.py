"""Best-of-n as a sampler, and the stage that learns from it: rejection sampling, expert iteration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax import processes
from rlhf_jax.errors import IO, UserError
from rlhf_jax.models import Transformer
from rlhf_jax.objectives.imitation import Chosen, Imitation
from rlhf_jax.ops.best_of_n import keep_best
from rlhf_jax.rewards.base import Reward, check_reward
from rlhf_jax.rewards.plain import OnError
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import fetch
from rlhf_jax.stages.judging import check_rewards, judge_of, jury, load_models, ready
from rlhf_jax.stages.language import check_length
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.responses import Prompts, read_prompts, response_texts
from rlhf_jax.stages.rollouts import Draw, Judge, sampler
from rlhf_jax.stages.samples import SampleLog
from rlhf_jax.stages.settings import Source, check_schedule
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.ahead import Collected
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.loop import Batches
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.reinforcement import Plan, Program, reinforce, take_rows
from rlhf_jax.training.step import init_state, make_train_step
from rlhf_jax.types import Key, PyTree, Rollout, Scores, TrainState


@dataclass(frozen=True)
class Selection:
    """Which responses of a round are kept.

    Args:
        keep: the best so many of each prompt at most.
        threshold: only those that score at least this; None keeps low ones too.
        quantile: only those that score at least this quantile of their prompt's scores (trlX's RFT); None as above.
        distinct: equal responses to one prompt count once.
        finished: only responses that ended by themselves.
    """

    keep: int = 1
    threshold: float | None = None
    quantile: float | None = None
    distinct: bool = False
    finished: bool = False

    def __post_init__(self):
        if self.keep < 1:
            raise UserError(f"keep={self.keep}", at="Selection", expected="at least 1 response", fix="raise it")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise UserError(
                f"quantile={self.quantile}", at="Selection", expected="a number from 0 to 1", fix="correct it"
            )

    def choose(
        self, rollout: Rollout, score: np.ndarray, used: np.ndarray, copies: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a fetched rollout, ``keep`` for each prompt and best first, and whether each row is to be used."""
        by_prompt = score.reshape(-1, copies)
        allowed = used.copy()
        if self.threshold is not None:
            allowed &= score >= self.threshold
        if self.quantile is not None:
            allowed &= (by_prompt >= np.quantile(by_prompt, self.quantile, axis=1, keepdims=True)).reshape(-1)
        if self.finished:
            allowed &= np.asarray(rollout.finished)
        if self.distinct:
            allowed &= _first_of_equals(rollout, allowed, copies)
        numbers, fine = keep_best(by_prompt, self.keep, allowed.reshape(-1, copies))
        rows = numbers + np.arange(len(by_prompt))[:, None] * copies
        return rows.reshape(-1), fine.reshape(-1)


def best_of(
    draw: Draw,
    judge: Judge,
    selection: Selection,
    copies: int,
    *,
    batches: int = 1,
    name: str = "expert",
    watch: Callable[[Rollout, np.ndarray], None] = lambda rollout, score: None,
) -> Callable[[PyTree, Batches, Key, Array], Collected]:
    """A collector that gives the kept responses only: ``Selection.keep`` rows for each prompt.

    Rows that are not to be used (fewer passed than fit) are marked in ``Scores.used``.

    Args:
        draw: samples ``copies`` responses to each prompt of a batch.
        judge: scores them.
        selection: which are kept.
        copies: responses to each prompt, n.
        batches: of prompts in one round, drawn one after the other.
        name: prefix of the metrics.
        watch: is shown the used responses on the host, with their scores.
    """

    def collect(params: PyTree, prompts: Batches, key: Key, step: Array) -> Collected:
        parts = [fetch(draw(params, next(prompts), key, step)) for _ in range(batches)]
        whole = jax.tree.map(lambda *xs: np.concatenate(xs) if np.ndim(xs[0]) else xs[0], *parts)
        scores, metrics = judge(whole)
        score = np.asarray(fetch(scores.score), np.float64)
        used = np.ones(len(score), bool) if scores.used is None else np.asarray(fetch(scores.used))
        rows, fine = selection.choose(whole, score, used, copies)
        kept: Rollout = jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, whole)
        best, lengths = score[rows], np.asarray(kept.response_mask).sum(axis=1)
        told = {
            "score": float(score[used].mean()) if used.any() else 0.0,
            "best_score": float(score.reshape(-1, copies).max(axis=1).mean()),
            "kept_score": float(best[fine].mean()) if fine.any() else 0.0,
            "kept": float(fine.sum()),
            "response_length": float(lengths[fine].mean()) if fine.any() else 0.0,
        }
        watch(jax.tree.map(lambda x: x[fine] if np.ndim(x) else x, kept), best[fine])
        values: Any = {"score": best.astype(np.float32), "used": fine}
        return kept, Scores(**values), {**metrics, **{f"{name}/{what}": value for what, value in told.items()}}

    return collect


@dataclass(frozen=True, kw_only=True)
class ExpertIteration:
    """Sample n responses to each prompt, keep the best, imitate them, and again.

    One round with ``restart=False`` is rejection sampling (best-of-n distillation); several rounds that go on are RAFT
    (Dong et al. 2023, https://arxiv.org/abs/2304.06767); several that each start anew from ``policy`` are ReST-EM
    (Singh et al. 2024, https://arxiv.org/abs/2312.06585) with a ``threshold``.

    Args:
        policy: the stage or path of the language model to start from.
        reward: what ranks: a reward model, or any other reward of ``rlhf_jax.rewards``, as in ``Reinforce``.
        prompts: what is answered.
        prompt_length: longest prompt in tokens.
        sampling: how responses are drawn; ``samples_per_prompt`` is n.
        selection: which responses are kept.
        optimizer: with a schedule over all rounds, or over each if they ``restart``.
        rounds: of sampling and learning.
        prompts_per_round: answered in a round.
        prompts_at_a_time: sampled at once; None takes all of a round.
        minibatch: kept responses in one update.
        microbatches: parts of a minibatch, one after the other.
        epochs: passes over the kept responses of a round.
        mean: ``token`` weighs the tokens of a minibatch alike, ``sequence`` its responses.
        restart: each round fine-tunes the stage's first policy, with a fresh optimizer.
        export: write the kept responses of each round to ``kept-ROUND.jsonl``, as ``Rewarded`` reads them.
        gold: a reward to watch and not to choose by.
        too_long: whether a prompt over ``prompt_length`` is an error or left out.
        on_error: whether a response whose reward fails stops the run, or is never kept.
        rows_at_a_time: rows in a forward pass of a reward model; None takes all.
    """

    policy: str = "sft"
    reward: Reward = "reward"
    prompts: tuple[Source, ...]
    prompt_length: int
    sampling: Sampling
    selection: Selection = Selection()
    optimizer: Optimizer
    rounds: int
    prompts_per_round: int
    prompts_at_a_time: int | None = None
    minibatch: int
    microbatches: int = 1
    epochs: int = 1
    mean: Literal["token", "sequence"] = "token"
    restart: bool = False
    export: bool = False
    gold: Reward | None = None
    too_long: Literal["error", "drop"] = "error"
    on_error: OnError = "stop"
    rows_at_a_time: int | None = None
    save_every: int = 1
    samples_every: int = 1
    name: str = "expert"

    def __post_init__(self):
        check_reward(self.reward, f"stages.{self.name}.reward")
        for name in ("rounds", "prompts_per_round", "minibatch", "microbatches", "epochs", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}", at=self.name, expected="at least 1", fix="raise it")
        if self.selection.keep > self.sampling.samples_per_prompt:
            raise UserError(f"keep={self.selection.keep} of samples_per_prompt={self.sampling.samples_per_prompt}",
                            at=self.name, expected="no more than are sampled", fix="change one of them")  # fmt: skip
        for part, whole in ((self.prompts_at_once, self.prompts_per_round), (self.minibatch, self.rows),
                            (self.microbatches, self.minibatch)):  # fmt: skip
            if part < 1 or whole % part:
                raise UserError(
                    f"{part} does not divide {whole}", at=self.name,
                    expected="prompts_at_a_time a divisor of prompts_per_round, minibatch of prompts_per_round * "
                    "selection.keep, and microbatches of the minibatch", fix="change one of them",
                )  # fmt: skip

    @property
    def prompts_at_once(self) -> int:
        return self.prompts_per_round if self.prompts_at_a_time is None else self.prompts_at_a_time

    @property
    def rows(self) -> int:
        """Kept responses of a round, if enough pass."""
        return self.prompts_per_round * self.selection.keep

    @property
    def episodes(self) -> int:
        """Sampled responses of the whole stage."""
        return self.rounds * self.prompts_per_round * self.sampling.samples_per_prompt

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.rounds * self.updates_per_round

    @property
    def updates_per_round(self) -> int:
        return self.epochs * (self.rows // self.minibatch)

    @property
    def iterations(self) -> int:
        """Rounds, as the loop calls them."""
        return self.rounds

    @property
    def scheduled(self) -> int:
        """Updates that the schedule of the learning rate spans."""
        return self.updates_per_round if self.restart else self.updates

    def check(self, workspace: Workspace) -> None:
        at, placement = f"stages.{self.name}", workspace.placement
        check_length(workspace, self.prompt_length + self.sampling.max_new_tokens, self.name)
        workspace.check_reference(self.policy, f"{at}.policy", self.name, Transformer)
        check_schedule(self.optimizer, self.scheduled, f"{at}.optimizer")
        prompts = self._prompts(workspace)
        for field in ("reward", "gold"):
            if getattr(self, field) is not None:
                check_rewards(getattr(self, field), workspace, prompts, f"{at}.{field}", self.name)
        placement.check_rows(self.minibatch // self.microbatches, "microbatches", at)
        placement.check_tokens(self.prompt_length + self.sampling.max_new_tokens, at)
        placement.folded().check_rows(self.prompts_at_once, "prompts", at)
        responses = self.prompts_per_round * self.sampling.samples_per_prompt
        rows = responses if self.rows_at_a_time is None else min(self.rows_at_a_time, responses)
        if responses % rows:
            raise UserError(f"rows_at_a_time={rows} does not divide the {responses} responses of a round", at=at,
                            expected="a divisor of prompts_per_round * samples_per_prompt",
                            fix="change it")  # fmt: skip
        placement.check_rows(rows, "rollouts", at)

    def run(self, workspace: Workspace) -> None:
        folder, at, placement = workspace.stage_folder(self.name), f"stages.{self.name}", workspace.placement
        start = workspace.output(self.policy, f"{at}.policy", Transformer).params
        model, prompts = workspace.model, self._prompts(workspace)
        objective, optimizer = Imitation(model, self.name, self.mean), self.optimizer.build(self.scheduled)
        shardings = placement.state(optimizer, start, placement.params(model), ema=False)
        rewards = [self.reward] if self.gold is None else [self.reward, self.gold]
        models = ready(load_models(rewards, workspace, f"{at}.reward"), parked=False)
        juries = [jury(reward, models, workspace, self.rows_at_a_time, self.on_error) for reward in rewards]
        samples = SampleLog(folder / "samples.jsonl", self.samples_every)
        watched = juries[1] if self.gold is not None else None
        judge = judge_of(self, workspace, juries[0], watched, prompts, samples)  # pyright: ignore
        round_of = lambda step: int(step) // self.updates_per_round + 1  # noqa: E731

        def export(rollout: Rollout, score: np.ndarray) -> None:
            if self.export:
                write_kept(folder / f"kept-{round_of(rollout.policy_step)}.jsonl", rollout, score, prompts, workspace)

        state = init_state(start, optimizer, shardings=shardings)
        start = start if self.restart else None  # only a restart needs it again

        def fresh(state: TrainState) -> TrainState:
            if start is None:
                return state
            return dataclasses.replace(init_state(start, optimizer, shardings=shardings), step=state.step)

        draw = sampler(workspace, model, lambda params: params, self.sampling, placement.folded())
        program = Program(
            collect=best_of(
                draw, lambda rollout, said=None: judge(placement.put_batch(rollout), said), self.selection,
                self.sampling.samples_per_prompt, batches=self.prompts_per_round // self.prompts_at_once,
                name=self.name, watch=export,
            ),
            prepare=lambda params, rollout, scores, controller: (
                Chosen(rollout, np.asarray(scores.used, np.float32)), {}  # pyright: ignore[reportArgumentType]
            ),
            batch=lambda experience, rows, streams: placement.put_batch(take_rows(experience, rows)),
            update=make_train_step(
                objective.loss, optimizer, with_weights=objective.with_weights, conclude=objective.conclude,
                microbatches=self.microbatches, state_shardings=shardings,
            ),
            control=lambda controller, *_: controller,
            wake=fresh,
        )  # fmt: skip
        with MetricsWriter(folder / "metrics.jsonl", workspace.sinks(self.name)) as metrics:
            state = reinforce(
                program,
                Plan(iterations=self.rounds, minibatch=self.minibatch, epochs=self.epochs),
                state,
                {"rounds": jnp.zeros(())},
                workspace.batches(self.name, "prompts", [prompts.table.rows], self.prompts_at_once),
                key=workspace.key(self.name, "train"),
                checkpoints=Checkpoints(folder / "checkpoints", every=self.save_every),
                metrics=metrics,
                stop=workspace.stop,
                prefix=self.name,
                on_row=workspace.watch(self.name, self.rounds),
            )
        notes = {"stage": self.name, "rounds": self.rounds, "episodes": self.episodes}
        workspace.save(self.name, Output(model, state.params, workspace.tokenizer, notes))

    def _prompts(self, workspace: Workspace) -> Prompts:
        return read_prompts(workspace, self.prompts, self.prompt_length, self.too_long, self.name)


def write_kept(path: Path, rollout: Rollout, score: np.ndarray, prompts: Prompts, workspace: Workspace) -> None:
    """A fetched rollout as demonstrations with rewards; of several processes, the first writes."""
    if not processes.is_first():
        return
    texts = response_texts(rollout, workspace.tokenizer)
    rows: list[Mapping[str, Any]] = [
        {"messages": [*messages, {"role": "assistant", "content": text}], "reward": float(value)}
        for messages, text, value in zip(prompts.messages(rollout), texts, score, strict=True)
    ]
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", at=str(path), fix="free space, then resume the run",
                        exit_code=IO) from error  # fmt: skip


def _first_of_equals(rollout: Rollout, allowed: np.ndarray, copies: int) -> np.ndarray:
    """Whether no allowed response before it to the same prompt is the same."""
    mask, seen, first = np.asarray(rollout.response_mask), set(), np.zeros(len(allowed), bool)
    tokens, starts = np.asarray(rollout.tokens), np.asarray(rollout.prompt_lengths)
    for row in np.flatnonzero(allowed):
        said = tokens[row, starts[row] : starts[row] + mask[row].sum()].tobytes()
        first[row] = (row // copies, said) not in seen
        seen.add((row // copies, said))
    return first
