"""Recall from context as token puzzles: multi-query associative recall, induction, and copying.

They ask what a mixer can carry from earlier in a row, without any language. Tokens are numbers, written as one letter
each (``alphabet``), so that the stages read them like any text; ``Unmarked`` puts turns behind each other without a
token between. A question is a token after which one certain token is right: its answer, the only target.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from rlhf_jax.data.chat import LossOn, Message
from rlhf_jax.data.packing import Document
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

FIRST_LETTER = 0x4E00
"""Of a block of Unicode with 20,992 letters in a row."""
MOST_TOKENS = 20_992

Examples = tuple[Int[np.ndarray, "n L"], Int[np.ndarray, "n L"]]
"""Tokens, and at each question the token that is right after it (elsewhere -1)."""


def alphabet(vocab: int) -> str:
    """The letters of tokens 0 to ``vocab - 1``."""
    return "".join(chr(FIRST_LETTER + token) for token in range(vocab))


@dataclass(frozen=True)
class MQAR:
    """Multi-query associative recall, the protocol of Zoology (Arora et al. 2023, arXiv 2312.04927).

    ``k1 v1 k2 v2 ...``, then each key once more at a gap from the context that follows a power law; the answer is its
    value. Keys are drawn from the lower half of the vocabulary without 0, values from the upper half, both without
    replacement. The published sizes are ``vocab=8192``, trained on ``(length, pairs)`` of (64, 4), (128, 8), (256, 16),
    (256, 32), (256, 64) and tested up to (1024, 256).

    Args:
        length: tokens of an example, even; at least 4 for each pair.
        pairs: keys with their values.
        vocab: number of tokens.
        power: exponent ``a`` of the gaps: gap ``g`` (counted in pairs of tokens) has weight ``a g^(a - 1)``.
        filled: whether tokens between questions are random tokens of the whole vocabulary; otherwise 0.
    """

    length: int = 64
    pairs: int = 8
    vocab: int = 8192
    power: float = 0.01
    filled: bool = True

    def __post_init__(self):
        _check_vocab(self.vocab, 4)
        if self.length % 2 or self.length < 4 * self.pairs or self.pairs < 1:
            raise UserError(f"length {self.length} for {self.pairs} pairs", at="MQAR",
                            expected="at least one pair, and an even length of 4 tokens for each",
                            fix="lengthen the example")  # fmt: skip
        if self.pairs > self.vocab // 2 - 1:
            raise UserError(f"{self.pairs} pairs from a vocabulary of {self.vocab}", at="MQAR",
                            expected=f"at most {self.vocab // 2 - 1}", fix="enlarge the vocabulary")  # fmt: skip
        if not self.power > 0.0:
            raise UserError(f"power={self.power}", at="MQAR", expected="a positive number", fix="correct it")

    def examples(self, n: int, seed: int) -> Examples:
        """As published: the answer is not in the tokens; what stands behind a question is filled as all else."""
        rng, context, half = np.random.default_rng(seed), 2 * self.pairs, self.vocab // 2
        space = (self.length - context) // 2
        weights = self.power * np.arange(1, space + 1) ** (self.power - 1)
        tokens, answers = np.zeros((n, self.length), np.int32), np.full((n, self.length), -1, np.int32)
        for row, right in zip(tokens, answers, strict=True):
            if self.filled:
                row[:] = rng.integers(self.vocab, size=self.length)
            keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
            values = half + rng.choice(self.vocab - half, self.pairs, replace=False)
            gaps = rng.choice(space, self.pairs, replace=False, p=weights / weights.sum())
            row[0:context:2], row[1:context:2] = keys, values
            row[context + 2 * gaps] = keys
            right[context + 2 * gaps] = values
        return tokens, answers

    def demonstrations(self, n: int, seed: int) -> list[dict]:
        """The same with each answer written behind its question, where it is the target.

        Keys are asked for once, so an answer that was given helps with no other.
        """
        return _conversations(*self.examples(n, seed))


@dataclass(frozen=True)
class Induction:
    """One question: the mark stood once before, and the answer is the token that was behind it.

    The task of Olsson et al. 2022 (arXiv 2209.11895) as Mamba tests it (arXiv 2312.00752: 16 tokens, trained at 256,
    tested at 64 to a million). Token 0 is the mark; all others are random.
    """

    length: int = 256
    vocab: int = 16

    def __post_init__(self):
        _check_vocab(self.vocab, 3)
        if self.length < 4:
            raise UserError(f"length {self.length}", at="Induction", expected="at least 4: mark, token, mark, answer",
                            fix="lengthen the example")  # fmt: skip

    def examples(self, n: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        tokens, answers = np.zeros((n, self.length), np.int32), np.full((n, self.length), -1, np.int32)
        for row, right in zip(tokens, answers, strict=True):
            row[:] = rng.integers(1, self.vocab, size=self.length)
            place = rng.integers(self.length - 3)
            row[place] = row[-2] = 0
            right[-2] = row[place + 1]
        return tokens, answers

    def demonstrations(self, n: int, seed: int) -> list[dict]:
        """The same with the answer at the end."""
        return _conversations(*self.examples(n, seed))


@dataclass(frozen=True)
class Copy:
    """Random tokens, the mark, and the same tokens again: each of them is the answer to the one before it.

    Args:
        tokens: how many are copied; an example has ``2 * tokens + 1``.
        vocab: number of tokens; 0 is the mark.
    """

    tokens: int = 32
    vocab: int = 16

    def __post_init__(self):
        _check_vocab(self.vocab, 2)
        if self.tokens < 1:
            raise UserError(f"{self.tokens} tokens", at="Copy", expected="at least 1", fix="lengthen the example")

    def examples(self, n: int, seed: int) -> Examples:
        rng, m = np.random.default_rng(seed), self.tokens
        text = np.stack([rng.integers(1, self.vocab, size=m) for _ in range(n)]).astype(np.int32)
        tokens = np.concatenate((text, np.zeros((n, 1), np.int32), text), axis=1)
        answers = np.full_like(tokens, -1)
        answers[:, m : 2 * m] = text
        return tokens, answers

    def demonstrations(self, n: int, seed: int) -> list[dict]:
        """The copy is what the assistant writes."""
        return _conversations(*self.examples(n, seed))


@dataclass(frozen=True)
class Unmarked:
    """Turns directly behind each other, with no EOS and no words around them: a chat format for puzzles of tokens."""

    def prompt_tokens(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """All turns so far."""
        return [token for message in messages for token in tokenizer.encode(message["content"])]

    def response_tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The text alone."""
        return tokenizer.encode(text)

    def dialogue_tokens(
        self, tokenizer: Tokenizer, messages: Sequence[Message], loss_on: LossOn = "responses"
    ) -> Document:
        """A conversation, which may end with either side; the assistant's turns are targets."""
        turns = [(tokenizer.encode(message["content"]), message["role"] == "assistant") for message in messages]
        last = max((place for place, (_, answer) in enumerate(turns) if answer), default=-1)
        targets = []
        for place, (tokens, answer) in enumerate(turns):
            learned = loss_on == "everything" or (answer and (loss_on == "responses" or place == last))
            targets += [learned] * len(tokens)
        tokens = [token for tokens, _ in turns for token in tokens]
        return Document(np.asarray(tokens, np.int32), np.asarray(targets, bool))


def _conversations(tokens: Int[np.ndarray, "n L"], answers: Int[np.ndarray, "n L"]) -> list[dict]:
    """Answers become what the assistant says, everything else what the user says."""
    asked = answers[:, :-1] >= 0
    written = tokens.copy()
    written[:, 1:] = np.where(asked, answers[:, :-1], tokens[:, 1:])
    said = np.pad(asked, ((0, 0), (1, 0)))
    records = []
    for row, by_assistant in zip(written.tolist(), said.tolist(), strict=True):
        turns = itertools.groupby(zip(row, by_assistant, strict=True), key=lambda each: each[1])
        messages = [
            {
                "role": "assistant" if answer else "user",
                "content": "".join(chr(FIRST_LETTER + token) for token, _ in turn),
            }
            for answer, turn in turns
        ]
        records.append({"messages": messages})
    return records


def _check_vocab(vocab: int, least: int) -> None:
    if not least <= vocab <= MOST_TOKENS:
        raise UserError(f"vocabulary of {vocab}", at="vocab", expected=f"{least} to {MOST_TOKENS} tokens",
                        fix="correct it")  # fmt: skip
