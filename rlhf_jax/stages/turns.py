"""Rollouts of several turns: the policy speaks, an environment in plain Python answers, and the policy goes on.

Every turn reads the whole conversation again, in rows of one width; rows that have ended are carried along and ignored.
What the environment says is in the tokens and never in ``response_mask``, so nothing is learned from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np

from rlhf_jax import processes
from rlhf_jax.data.chat import Format
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import BAD_DATA, UserError
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.rewards.base import Messages, name_of
from rlhf_jax.sharding import Placement, fetch
from rlhf_jax.stages.responses import Prompts
from rlhf_jax.stages.rollouts import Conversations, Draw, Judge
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.ahead import Collected
from rlhf_jax.types import Key, PromptBatch, PyTree, Rollout

if TYPE_CHECKING:
    from rlhf_jax.stages.reinforce import Reinforce

_TURNS = 2**31
"""Keys of later turns derive from numbers that no prompt has."""


@runtime_checkable
class Environment(Protocol):
    """Who answers the policy, such as a tool or a simulated user: a frozen value.

    ``reply`` is given the conversation, whose last message is the policy's, and the record of the prompt. It returns
    what is said next, or None where the conversation is over. It should depend on these alone: a run that is resumed
    asks again. One that has ``reads``, names of fields, has these looked for in all records before anything is trained.
    """

    def reply(self, messages: Messages, record: Mapping[str, Any]) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Conversations of several turns.

    A conversation ends when the environment has no answer, after ``most`` turns, when a turn of the policy does not end
    by itself, or when what was said leaves no room for another whole turn. In the last two cases it is not finished.

    Args:
        environment: answers the policy.
        most: turns of the policy.
        length: tokens behind the prompt in all, those of the environment included; a turn of the policy has at most
            ``Sampling.max_new_tokens`` of them.
        role: of the environment in the chat format, such as ``tool`` in a template that has one.
    """

    environment: Environment
    most: int
    length: int
    role: str = "user"

    def __post_init__(self):
        if not isinstance(self.environment, Environment):
            raise UserError(f"environment={self.environment!r:.80}", at="Turns", fix="see docs/multi-turn.md",
                            expected="a value with reply(messages, record)")  # fmt: skip
        if self.most < 1:
            raise UserError(f"most={self.most}", at="Turns", expected="at least 1 turn", fix="raise it")
        if not self.role or self.role == "assistant":
            raise UserError(f"role={self.role!r}", at="Turns", fix="name another role",
                            expected="who answers the policy, such as 'user'")  # fmt: skip

    def check_stage(self, stage: Reinforce) -> None:
        """Whether a stage can do with this."""
        sampling, ppo = stage.sampling, stage.ppo
        for name, fine, expected in (
            (f"turns.length={self.length}", self.length >= sampling.max_new_tokens,
             f"room for one turn, which is sampling.max_new_tokens={sampling.max_new_tokens}"),
            (f"turns with sampling.slots={sampling.slots}", sampling.slots is None, "slots=None"),
            ("turns with sampling.record_routing=True", not sampling.record_routing, "record_routing=False"),
            (f"turns with sampling.stop_tokens={sampling.stop_tokens}", not sampling.stop_tokens,
             "turns that end with EOS, as the chat format writes them"),
            ("turns with baseline='greedy'", not (isinstance(ppo, GroupPolicy) and ppo.baseline == "greedy"),
             "another baseline: no greedy conversation is held"),
        ):  # fmt: skip
            if not fine:
                raise UserError(name, at=f"stages.{stage.name}", expected=expected, fix="change one of them")

    def check(self, stage: Reinforce, workspace: Workspace, prompts: Prompts) -> None:
        """The records have what the environment reads, and the chat format can write an answer of its role.

        Raises:
            UserError: names the record and the field, or the role.
        """
        name = name_of(self.environment)  # pyright: ignore[reportArgumentType]
        prompts.check_reader(self.environment, f"{stage.name}: environment {name!r}")
        for record in prompts.table.records[:1]:
            said = [*record["messages"], {"role": "assistant", "content": ""}, {"role": self.role, "content": ""}]
            workspace.chat.reply_tokens(workspace.tokenizer, said)


@dataclass
class _Conversations:
    """Rows while they grow, on the host. Arrays are those of ``Rollout``; ``ends`` counts tokens, the prompt's too."""

    turns: Turns
    tokenizer: Tokenizer
    chat: Format
    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    finished: np.ndarray
    open: np.ndarray
    said: list[list[Mapping[str, str]]]
    spoken: np.ndarray
    crowded: np.ndarray

    @classmethod
    def begin(cls, turns: Turns, tokenizer: Tokenizer, chat: Format, rollout: Rollout, said: list) -> _Conversations:
        """Prompts alone; ``rollout`` is the first turn, of which only these are looked at."""
        rows, starts = rollout.tokens.shape[0], np.asarray(rollout.prompt_lengths, np.int32)
        width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
        tokens = np.full((rows, width + turns.length), tokenizer.pad_id, np.int32)
        tokens[:, :width] = np.where(np.arange(width) < starts[:, None], rollout.tokens[:, :width], tokenizer.pad_id)
        inside, row = np.zeros((rows, turns.length), bool), np.zeros(rows, bool)
        return cls(
            turns, tokenizer, chat, tokens, starts, starts.copy(), inside, np.zeros(inside.shape, np.float32),
            row, ~row, said, np.zeros(rows, np.int32), row.copy(),
        )  # fmt: skip

    def speak(self, drawn: Rollout) -> None:
        """The policy's turn in all open rows."""
        for row in np.flatnonzero(self.open):
            length, start = int(np.sum(drawn.response_mask[row])), int(drawn.prompt_lengths[row])
            words, begin = drawn.tokens[row, start : start + length], self.ends[row] - self.starts[row]
            self.tokens[row, self.ends[row] : self.ends[row] + length] = words
            self.mask[row, begin : begin + length] = True
            self.logprobs[row, begin : begin + length] = drawn.logprobs[row, :length]
            self.ends[row] += length
            self.spoken[row] += 1
            self.finished[row] = self.open[row] = bool(drawn.finished[row])
            self.said[row].append({"role": "assistant", "content": self.tokenizer.decode(words.tolist())})

    def answer(self, records: Sequence[Mapping[str, Any]], numbers: Sequence[int], new: int) -> None:
        """The environment's turn in all open rows; those close that have no answer, or no room for ``new`` tokens."""
        rows = np.flatnonzero(self.open).tolist()
        own = rows[processes.part(len(rows))]
        name = name_of(self.turns.environment)  # pyright: ignore[reportArgumentType]

        def ask(row: int) -> str | None:
            place = f"environment {name!r}, prompt {records[row].get('id', numbers[row])}"
            return reply_of(self.turns.environment, tuple(self.said[row]), records[row], place)

        shares = processes.gather(f"environment {name}", lambda: [ask(row) for row in own])
        for row, text in zip(rows, (text for share in shares for text in share), strict=True):
            if text is None:
                self.open[row] = False
                continue
            said = [*self.said[row], {"role": self.turns.role, "content": text}]
            try:
                words = self.chat.reply_tokens(self.tokenizer, said)
            except UserError as fault:
                raise UserError(f"the reply {text!r:.80} of environment {name!r} cannot be written: {fault.what}",
                                at=f"prompt {records[row].get('id', numbers[row])}", expected=fault.expected,
                                fix=fault.fix, exit_code=BAD_DATA) from fault  # fmt: skip
            if self.ends[row] - self.starts[row] + len(words) + new > self.turns.length:
                self.open[row] = self.finished[row] = False
                self.crowded[row] = True
                continue
            self.tokens[row, self.ends[row] : self.ends[row] + len(words)] = words
            self.ends[row] += len(words)
            self.said[row] = said

    def prompts(self, index: np.ndarray, width: int) -> PromptBatch:
        """What the next turn continues; closed rows ask their first question again."""
        lengths = np.where(self.open, self.ends, self.starts).astype(np.int32)
        batch: Any = self.tokens[:, :width], lengths, index
        return PromptBatch(*batch)

    def metrics(self) -> dict[str, float]:
        """Means over conversations."""
        others = self.ends - self.starts - self.mask.sum(axis=1)
        return {
            "turns/mean": float(self.spoken.mean()),
            "turns/environment_tokens": float(others.mean()),
            "turns/no_room": float(self.crowded.mean()),
        }


def conversing(
    turns: Turns,
    first: Draw,
    later: Draw,
    judge: Judge,
    prompts: Prompts,
    *,
    tokenizer: Tokenizer,
    chat: Format,
    max_new_tokens: int,
    placement: Placement,
) -> Callable[[PyTree, PromptBatch, Key, jax.Array], Collected]:
    """Conversations are held, then scored as wholes.

    The first turn is what a stage without an environment would sample.

    Args:
        turns: the environment and its bounds.
        first: samples the first turn; several rows to each prompt.
        later: samples the turns behind it; one row to each conversation.
        judge: scores rollouts.
        prompts: find the record behind a row.
        tokenizer: of the run.
        chat: writes what the environment says, and what announces the policy's next turn.
        max_new_tokens: of one turn.
        placement: where rollouts lie.
    """

    def respond(params: PyTree, asked: PromptBatch, key: Key, step: jax.Array) -> Collected:
        rollout, said, talk = converse(params, asked, key, step)
        rollout = placement.put_batch(rollout)
        scores, metrics = judge(rollout, said)
        return rollout, scores, {**metrics, **talk}

    def converse(
        params: PyTree, asked: PromptBatch, key: Key, step: jax.Array
    ) -> tuple[Rollout, Conversations, dict[str, float]]:
        drawn: Rollout = fetch(first(params, asked, key, step))
        numbers = prompts.numbers(drawn)
        records = [prompts.table.records[number] for number in numbers]
        talk = _Conversations.begin(turns, tokenizer, chat, drawn, [list(record["messages"]) for record in records])
        width, copies = talk.tokens.shape[1] - max_new_tokens, len(numbers) // len(asked.lengths)
        # Rows are keyed by their prompt and their number among its samples, which are one row of a prompt from now on.
        index = (np.asarray(drawn.index) * copies + np.arange(len(numbers)) % copies).astype(np.int32)
        talk.speak(drawn)
        for turn in range(1, turns.most):
            if talk.open.any():
                talk.answer(records, numbers, max_new_tokens)
            if not talk.open.any():
                break
            own = jax.random.fold_in(key, _TURNS + turn)
            talk.speak(fetch(later(params, talk.prompts(index, width), own, step)))
        whole = Rollout(
            tokens=talk.tokens,  # pyright: ignore[reportArgumentType]
            prompt_lengths=drawn.prompt_lengths,
            response_mask=talk.mask,  # pyright: ignore[reportArgumentType]
            logprobs=talk.logprobs,  # pyright: ignore[reportArgumentType]
            finished=talk.finished,  # pyright: ignore[reportArgumentType]
            index=drawn.index,
            policy_step=drawn.policy_step,
            temperature=drawn.temperature,
        )
        return whole, talk.said, talk.metrics()

    return respond


def reply_of(environment: Environment, messages: Messages, record: Mapping[str, Any], place: str) -> str | None:
    """The environment's answer.

    Raises:
        UserError: it raised, or returned neither a text nor None; ``place`` names environment and prompt.
    """
    said = json.dumps(messages[-1]["content"], ensure_ascii=False)
    try:
        text = environment.reply(messages, record)
    except Exception as fault:
        raise UserError(f"reply() raised {type(fault).__name__} ({fault}) after the policy said {said:.120}", at=place,
                        expected="a text, or None to end the conversation", fix="correct reply()",
                        exit_code=BAD_DATA) from fault  # fmt: skip
    if text is not None and (not isinstance(text, str) or not text):
        raise UserError(f"reply() returned {text!r:.80} after the policy said {said:.120}", at=place,
                        expected="a text that is not empty, or None to end the conversation", fix="correct reply()",
                        exit_code=BAD_DATA)  # fmt: skip
    return text
