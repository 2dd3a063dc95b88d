"""What a stage asks its rewards: models are loaded and run, plain Python is asked, and all becomes one score."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.data.chat import Format
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import BAD_DATA, UserError
from rlhf_jax.models import ScalarModel, Transformer
from rlhf_jax.rewards.base import Answer, Leaf, Reward, Values, leaves, models_of, name_of
from rlhf_jax.rewards.learned import Learned, Process, Rubric
from rlhf_jax.rewards.plain import OnError, not_finite, place, plain_values, said
from rlhf_jax.rewards.steps import place_steps, split_steps, step_ends
from rlhf_jax.rewards.verdict import Verdict, verdict
from rlhf_jax.sharding import Placement, fetch
from rlhf_jax.stages.offloading import kept
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.responses import Prompts, score_continuations, score_rollout, score_tokens
from rlhf_jax.stages.rollouts import Conversations, JudgeOfParts
from rlhf_jax.stages.samples import SampleLog
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.types import PyTree, Rollout, Scores

if TYPE_CHECKING:
    from rlhf_jax.stages.reinforce import Reinforce

KINDS = {"scalar": ScalarModel, "language": Transformer}
Ready = tuple[Any, Callable[[], PyTree]]
"""A model, and what gives its parameters."""
Answers = Callable[[], Sequence[Answer]]
"""Rows of a rollout as texts, made when they are asked for."""
Heard = list[tuple[Values, Mapping[str, float]]]
"""What each part of a reward says of some rows, and numbers to log that are means over these."""


@dataclass(frozen=True)
class Jury:
    """A reward with its models at hand.

    Args:
        reward: any.
        models: those that it reads by stage or path.
        tokenizer: of the run.
        chat: how a rubric's questions are written.
        placement: where rollouts lie.
        rows: of a rollout in one forward pass; None takes all.
        on_error: what becomes of a response without a finite reward.
    """

    reward: Reward
    models: Mapping[str, Ready]
    tokenizer: Tokenizer
    chat: Format
    placement: Placement
    rows: int | None = None
    on_error: OnError = "stop"

    @property
    def reads_texts(self) -> bool:
        """Whether any part looks at more than tokens."""
        return any(not isinstance(leaf, str | Learned) for leaf in leaves(self.reward))

    def __call__(self, rollout: Rollout, answers: Answers) -> Verdict:
        """What the reward says of a rollout; ``answers`` gives its rows as texts, and is asked where these are needed.

        Raises:
            UserError: names a reward, prompt and response that have no finite number.
        """
        return self.conclude([self.begin(rollout, answers)()])

    def begin(self, part: Rollout, answers: Answers) -> Callable[[], Heard]:
        """Reward models are sent these rows at once; the function that comes back waits for them and asks the rest."""
        asked = leaves(self.reward)
        sent = [self._scores(leaf, part) if isinstance(leaf, str | Learned) else None for leaf in asked]
        return lambda: [self._ask(leaf, part, answers, scores) for leaf, scores in zip(asked, sent, strict=True)]

    def conclude(self, heard: Sequence[Heard]) -> Verdict:
        """The verdict on a rollout, from what was heard of its parts in their order; ``__call__`` says what it raises.

        Only here do rows meet: what depends on the whole rollout (means, ``Standardise``) sees all of it.
        """
        asked = leaves(self.reward)
        whole = [_joined(parts) for parts in zip(*heard, strict=True)]
        return verdict(self.reward, lambda leaf: whole[asked.index(leaf)])

    def _scores(self, leaf: str | Learned, rollout: Rollout) -> jax.Array:
        model, params = self.models[leaf if isinstance(leaf, str) else leaf.model]
        return score_rollout(model, params(), rollout, rows=self.rows)

    def _ask(
        self, leaf: Leaf, rollout: Rollout, answers: Answers, scores: jax.Array | None
    ) -> tuple[Values, Mapping[str, float]]:
        width, notes = rollout.response_mask.shape[1], {}
        if scores is not None:
            found = Values(fetch(scores).astype(np.float64))
        elif isinstance(leaf, Process):
            found = self._process(leaf, rollout, answers())
        elif isinstance(leaf, Rubric):
            logprobs = self._rubric(leaf, answers())
            found, notes = Values(leaf.score(logprobs)), {f"{name_of(leaf)}_mass": leaf.mass(logprobs)}
        else:
            return plain_values(leaf, answers(), width, self.tokenizer.decode, self.on_error), {}  # pyright: ignore
        lost = ~np.isfinite(found.total)
        if lost.any() and self.on_error == "stop":
            row = int(np.flatnonzero(lost)[0])
            raise not_finite(leaf, answers()[row], float(found.total[row]))
        return Values(np.where(lost, np.nan, found.score), found.tokens, found.steps), notes

    def _process(self, leaf: Process, rollout: Rollout, answers: Sequence[Answer]) -> Values:
        model, params = self.models[leaf.model]
        values = fetch(score_tokens(model, params(), rollout, rows=self.rows)).astype(np.float64)
        decode = self.tokenizer.decode
        ends = [step_ends(split_steps(a.text, leaf.at), leaf.at, a.tokens, decode) for a in answers]
        ends = [[a.offset + end for end in own] for a, own in zip(answers, ends, strict=True)]
        steps = place_steps(ends, None, values.shape[1])[1]
        return Values(np.zeros(len(answers)), np.where(steps, values, 0.0), steps)

    def _rubric(self, leaf: Rubric, answers: Sequence[Answer]) -> Float[np.ndarray, "B A"]:
        """Log-probability of each listed answer behind the question about each response."""
        model, params = self.models[leaf.model]
        options = rubric_options(leaf, self.tokenizer, self.chat)
        room = leaf.length - max(map(len, options))
        asked = [leaf.ask(answer, self._question(leaf), room) for answer in answers]
        for question, answer in zip(asked, answers, strict=True):
            if question is None:
                raise UserError(f"the question about {said(answer)} has more than {room} tokens",
                                at=place(leaf, answer), exit_code=BAD_DATA,
                                expected=f"at most length={leaf.length}, the answer included",
                                fix="raise length, or set too_long='cut'")  # fmt: skip
        rows = len(answers) if self.rows is None else self.rows
        ready, found = params(), np.zeros((len(answers), len(options)))
        for first in range(0, len(answers), rows):
            own = asked[first : first + rows]
            for column, option in enumerate(options):
                tokens = np.full((len(own), leaf.length), self.tokenizer.pad_id, np.int32)
                starts = np.array([len(question) for question in own if question is not None], np.int32)
                for row, question in enumerate(own):
                    whole = [*(question or ()), *option]
                    tokens[row, : len(whole)] = whole
                batch = self.placement.put_batch((tokens, starts, starts + np.int32(len(option))))
                found[first : first + rows, column] = fetch(score_continuations(model, ready, *batch))
        return found

    def _question(self, leaf: Rubric) -> Callable[[str], list[int]]:
        if not leaf.chat:
            return self.tokenizer.encode
        return lambda text: self.chat.prompt_tokens(self.tokenizer, [{"role": "user", "content": text}])


def _joined(parts: Sequence[tuple[Values, Mapping[str, float]]]) -> tuple[Values, Mapping[str, float]]:
    """The same of all rows together."""
    if len(parts) == 1:
        return parts[0]
    values, notes = [value for value, _ in parts], [note for _, note in parts]
    rows = [len(value.score) for value in values]
    score, tokens, steps = ([getattr(value, name) for value in values] for name in ("score", "tokens", "steps"))
    whole = [None if column[0] is None else np.concatenate(column) for column in (score, tokens, steps)]
    means = {name: float(np.average([note[name] for note in notes], weights=rows)) for name in notes[0]}
    return Values(*whole), means  # pyright: ignore[reportArgumentType]


def rubric_options(leaf: Rubric, tokenizer: Tokenizer, chat: Format) -> list[list[int]]:
    """The tokens of each listed answer."""
    texts = [text for text, _ in leaf.answers]
    return [chat.response_tokens(tokenizer, text) if leaf.chat else tokenizer.encode(text) for text in texts]


def check_rewards(reward: Reward, workspace: Workspace, prompts: Prompts, at: str, stage: str) -> None:
    """Find what is wrong with a reward's models, questions and records before anything is trained.

    Args:
        reward: of the stage.
        workspace: of the run.
        prompts: whose responses it judges.
        at: the field that holds it.
        stage: the name of the stage.
    """
    for reference, kind in models_of(reward):
        workspace.check_reference(reference, at, stage, KINDS[kind])
    for leaf in leaves(reward):
        if isinstance(leaf, Rubric):
            _check_rubric(leaf, workspace, at)
    prompts.check(reward, stage)


def _check_rubric(leaf: Rubric, workspace: Workspace, at: str) -> None:
    options = rubric_options(leaf, workspace.tokenizer, workspace.chat)
    longest = max(map(len, options))
    if longest >= leaf.length:
        raise UserError(f"an answer of {longest} tokens with length={leaf.length}", at=f"{at}: {name_of(leaf)}",
                        expected="room for a question", fix="raise length")  # fmt: skip
    if leaf.length > workspace.model.max_length:
        raise UserError(f"length={leaf.length}", at=f"{at}: {name_of(leaf)}",
                        fix="lower it",
                        expected=f"at most the model's max_length={workspace.model.max_length}")  # fmt: skip
    workspace.placement.check_tokens(leaf.length, f"{at}: {name_of(leaf)}")


def load_models(rewards: Sequence[Reward], workspace: Workspace, at: str) -> dict[str, Output]:
    """The outputs that rewards read, by stage or path, each once; ``at`` is the stage in words."""
    needed = [model for reward in rewards for model in models_of(reward)]
    return {reference: workspace.output(reference, at, KINDS[kind]) for reference, kind in dict(needed).items()}


def ready(outputs: Mapping[str, Output], parked: bool) -> dict[str, Ready]:
    """Models and their parameters, which wait in the host's memory between rollouts if ``parked``."""
    return {reference: (output.model, kept(output.params, parked)) for reference, output in outputs.items()}


def jury(
    reward: Reward,
    models: Mapping[str, Ready],
    workspace: Workspace,
    rows: int | None = None,
    on_error: OnError = "stop",
) -> Jury:
    """A reward with the models that it reads; the other arguments are those of ``Jury``."""
    return Jury(reward, models, workspace.tokenizer, workspace.chat, workspace.placement, rows, on_error)


def plain_totals(
    reward: Reward, answers: Sequence[Answer], width: int, decode: Callable[[Sequence[int]], str]
) -> Float[np.ndarray, " B"]:
    """What a reward without models gives each answer, steps included; the arguments are those of ``plain_values``."""
    return verdict(reward, lambda leaf: (plain_values(leaf, answers, width, decode), {})).values.total  # pyright: ignore


@dataclass(frozen=True)
class RewardJudge:
    """Scores of a rollout by a reward, and a gold reward to watch; see ``judge_of``."""

    stage: Reinforce
    workspace: Workspace
    reward: Jury
    gold: Jury | None
    prompts: Prompts
    samples: SampleLog

    def __call__(self, rollout: Rollout, said: Conversations | None = None) -> tuple[Scores, Mapping[str, float]]:
        return self.conclude(rollout, [self.begin(rollout, said)()])

    def begin(self, part: Rollout, said: Conversations | None = None) -> Callable[[], Any]:
        answers = functools.cache(lambda: self.prompts.answers(fetch(part), self.workspace.tokenizer, said))
        rest = [jury.begin(part, answers) for jury in (self.reward, self.gold) if jury is not None]
        return lambda: (answers, [hear() for hear in rest])

    def conclude(self, rollout: Rollout, found: Sequence[Any]) -> tuple[Scores, Mapping[str, float]]:
        stage, given = self.stage, self.reward.conclude([heard[0] for _, heard in found])
        iteration = 1 + int(rollout.policy_step) * stage.iterations // stage.updates
        if self.samples.due(iteration):
            answers = [answer for ask, _ in found for answer in ask()]
            messages, texts = [a.messages for a in answers], [a.text for a in answers]
            self.samples.write(iteration, messages, texts, given.values.total.tolist())
        metrics = {f"reward/{name}": value for name, value in given.notes.items()}
        if stage.on_error == "drop":
            metrics["reward/dropped"] = float(1 - given.used.mean())
        if self.gold is not None:
            watched = self.gold.conclude([heard[1] for _, heard in found])
            metrics[f"{stage.name}/gold"] = float(watched.values.total[watched.used].mean())
            metrics |= {f"gold/{name}": value for name, value in watched.notes.items()}
        return _scores(given, stage.on_error), metrics


def judge_of(
    stage: Reinforce, workspace: Workspace, reward: Jury, gold: Jury | None, prompts: Prompts, samples: SampleLog
) -> JudgeOfParts:
    """Scores of a rollout, and the gold reward to watch."""
    return RewardJudge(stage, workspace, reward, gold, prompts, samples)


def _scores(given: Verdict, on_error: OnError) -> Scores:
    values = given.values
    found: dict[str, Any] = {"score": values.score.astype(np.float32), "steps": values.steps}
    if values.tokens is not None:
        found["token_rewards"] = values.tokens.astype(np.float32)
    return Scores(**found, used=given.used if on_error == "drop" else None)  # pyright: ignore[reportArgumentType]
