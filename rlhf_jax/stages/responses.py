"""Policies and text: which prompt a rollout answers, what it says, and what a reward in plain Python gives for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax import processes
from rlhf_jax.data.tables import PromptTable, prompt_table
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import BAD_DATA, UserError
from rlhf_jax.models import ScalarModel
from rlhf_jax.scoring import sequence_scores
from rlhf_jax.stages.settings import Source, naming
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.types import PyTree, Rollout

log = logging.getLogger(__name__)

Messages = Sequence[dict[str, str]]


@runtime_checkable
class Gold(Protocol):
    """A reward in plain Python, such as a built-in task: one finite number for each response, which depends on it and
    its prompt alone."""

    def golds(self, prompts: Sequence[Any], responses: Sequence[str]) -> Float[np.ndarray, " B"]: ...


@dataclass(frozen=True)
class Prompts:
    """A table of prompts that finds the conversation behind a rollout's row again."""

    table: PromptTable

    @functools.cached_property
    def _messages(self) -> dict[bytes, Messages]:
        rows = self.table.rows
        return {
            rows.tokens[i, : rows.lengths[i]].tobytes(): record["messages"]
            for i, record in enumerate(self.table.records)
        }

    def messages(self, rollout: Rollout) -> list[Messages]:
        """The conversation that each row answers."""
        tokens, lengths = np.asarray(rollout.tokens, np.int32), np.asarray(rollout.prompt_lengths)
        return [self._messages[row[:length].tobytes()] for row, length in zip(tokens, lengths, strict=True)]


def read_prompts(
    workspace: Workspace, sources: tuple[Source, ...], length: int, too_long, name: str, most: int | None = None
) -> Prompts:
    """Prompts as one table of at most ``most`` rows."""

    def make() -> Prompts:
        records = workspace.read(sources)[:most]
        with naming(sources, name):
            table = prompt_table(records, workspace.tokenizer, workspace.chat, length, too_long=too_long)
        log.info("%s: prompts: %s", name, table.report.summary())
        return Prompts(table)

    return workspace.once(("prompts", sources, length, too_long, most), make)


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """What each row says, without special tokens."""
    tokens, starts = np.asarray(rollout.tokens), np.asarray(rollout.prompt_lengths)
    lengths = np.asarray(rollout.response_mask).sum(axis=1)
    return [
        tokenizer.decode(row[start : start + length].tolist())
        for row, start, length in zip(tokens, starts, lengths, strict=True)
    ]


def gold_rewards(gold: Gold, prompts: Sequence[Messages], responses: Sequence[str]) -> Float[np.ndarray, " B"]:
    """The reward of each response; one that is not a finite number is an error that shows the response.

    Of several processes each scores its share, and all get all rewards, or the error of any.
    """
    own = processes.part(len(responses))
    shares = processes.gather("rewards", lambda: _gold_rewards(gold, prompts[own], responses[own]).tolist())
    return np.array([reward for share in shares for reward in share], np.float64)


def _gold_rewards(gold: Gold, prompts: Sequence[Messages], responses: Sequence[str]) -> Float[np.ndarray, " B"]:
    found = np.asarray(gold.golds(prompts, responses) if responses else (), np.float64)
    if found.shape != (len(responses),):
        raise UserError(f"rewards of shape {found.shape} for {len(responses)} responses", at=type(gold).__name__,
                        expected="one number each", fix="correct golds()", exit_code=BAD_DATA)  # fmt: skip
    for row in np.flatnonzero(~np.isfinite(found))[:1]:
        raise UserError(f"the reward of {responses[row]!r} to {prompts[row][-1]['content']!r} is {found[row]}",
                        at=type(gold).__name__, expected="a finite number", fix="correct golds()",
                        exit_code=BAD_DATA)  # fmt: skip
    return found


@functools.partial(jax.jit, static_argnums=0)
def score_rollout(model: ScalarModel, params: PyTree, rollout: Rollout) -> Float[jax.Array, " B"]:
    """A learned reward of each response, read at its last token."""
    return sequence_scores(model, params, rollout.tokens, jnp.maximum(rollout.lengths, 1))
