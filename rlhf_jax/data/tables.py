"""Records into tables: everything tokenized once, up front, as one batch that holds the whole data set.

``pipelines`` then only gathers rows. What is cut or left out is said by the caller (``too_long``) and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from rlhf_jax.data.chat import Format, LossOn
from rlhf_jax.data.packing import (
    Document,
    Packed,
    TooLong,
    best_fit,
    check_too_long,
    concat_and_split,
    full,
    length_error,
    one_per_row,
)
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import BAD_DATA, UserError
from rlhf_jax.types import PromptBatch, RankingBatch

Record = Mapping[str, Any]


@dataclass(frozen=True)
class LengthReport:
    """How many records are in the table, were cut to fit, were left out."""

    kept: int
    truncated: int
    dropped: int

    def summary(self) -> str:
        """One line for the log."""
        return f"{self.kept} records, {self.truncated} truncated, {self.dropped} dropped for their length"


@dataclass(frozen=True)
class RankingTable:
    """All rankings of a data set as one batch, the length of each prompt in it, and the report."""

    rows: RankingBatch
    prompt_lengths: Int[np.ndarray, " B"]
    report: LengthReport


@dataclass(frozen=True)
class PromptTable:
    """All prompts of a data set as one batch (``index`` is the row), the records they come from, and the report."""

    rows: PromptBatch
    records: tuple[Record, ...]
    report: LengthReport


def text_table(records: Sequence[Record], tokenizer: Tokenizer, width: int, *, bos: bool = False) -> Packed:
    """Texts for pretraining: each ends with EOS (and begins with BOS where asked), cut into full rows."""
    first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    if bos and not first:
        raise UserError("the tokenizer has no beginning-of-sequence token", at="text_table(bos=True)",
                        expected="a tokenizer with BOS", fix="set bos=False")  # fmt: skip
    documents = [Document.of([*first, *tokenizer.encode(record["text"]), tokenizer.eos_id]) for record in records]
    return concat_and_split(documents, width, tokenizer.pad_id)


def demonstration_table(
    records: Sequence[Record], tokenizer: Tokenizer, chat: Format, width: int, *,
    loss_on: LossOn = "responses", too_long: TooLong = "error", pack: bool = True,
) -> Packed:  # fmt: skip
    """Conversations to imitate, packed several to a row or one per row."""
    documents = [chat.dialogue_tokens(tokenizer, record["messages"], loss_on) for record in records]
    return (best_fit if pack else one_per_row)(documents, width, tokenizer.pad_id, too_long)


def ranking_table(
    records: Sequence[Record], tokenizer: Tokenizer, chat: Format, width: int, *, too_long: TooLong = "error"
) -> RankingTable:
    """Ranked responses, each after its prompt, padded to the largest K of the data.

    Of a ranking with a sequence over ``width``, ``"left"`` cuts the beginning of the prompt (the same for all its
    responses) and ``"right"`` the end of the long responses; one that even so has no room is dropped.
    """
    check_too_long(too_long, ("error", "left", "right", "drop"))
    kept, truncated, dropped = [], 0, 0
    for number, record in enumerate(records):
        prompt = chat.prompt_tokens(tokenizer, record["messages"])
        responses = [chat.response_tokens(tokenizer, response) for response in record["responses"]]
        longest = len(prompt) + max(map(len, responses))
        found = prompt, responses
        if longest > width:
            if too_long == "error":
                raise length_error(f"ranking {number}", longest, width, "'left', 'right' or 'drop'")
            found = _shortened(prompt, responses, width, too_long)
            truncated += found is not None
        if found is None:
            dropped += 1
        else:
            kept.append((*found, record["ranks"]))
    _check_some(kept, "ranking", dropped)
    most = max(len(responses) for _, responses, _ in kept)
    tokens = full((len(kept), most, width), tokenizer.pad_id)
    lengths, ranks = full((len(kept), most), 0), full((len(kept), most), -1)
    prompt_lengths = full((len(kept),), 0)
    for row, (prompt, responses, order) in enumerate(kept):
        ranks[row, : len(order)], prompt_lengths[row] = order, len(prompt)
        for k, response in enumerate(responses):
            lengths[row, k] = len(prompt) + len(response)
            tokens[row, k, : lengths[row, k]] = prompt + response
    report = LengthReport(len(kept), truncated, dropped)
    return RankingTable(RankingBatch(tokens, lengths, ranks), prompt_lengths, report)


def prompt_table(
    records: Sequence[Record], tokenizer: Tokenizer, chat: Format, width: int, *,
    too_long: Literal["error", "drop"] = "error",
) -> PromptTable:  # fmt: skip
    """Prompts ready to be answered. A prompt is never cut: what was asked would change."""
    check_too_long(too_long, ("error", "drop"))
    kept = []
    for number, record in enumerate(records):
        prompt = chat.prompt_tokens(tokenizer, record["messages"])
        if not prompt:
            raise UserError(f"prompt {number} has no tokens", at="data", expected="at least one", exit_code=BAD_DATA,
                            fix="remove it, or use a chat format that writes something")  # fmt: skip
        if len(prompt) <= width:
            kept.append((prompt, record))
        elif too_long == "error":
            raise length_error(f"prompt {number}", len(prompt), width, "'drop'")
    _check_some(kept, "prompt", len(records) - len(kept))
    tokens, lengths, index = full((len(kept), width), tokenizer.pad_id), full((len(kept),), 0), full((len(kept),), 0)
    for row, (prompt, _) in enumerate(kept):
        tokens[row, : len(prompt)] = prompt
        lengths[row], index[row] = len(prompt), row
    report = LengthReport(len(kept), 0, len(records) - len(kept))
    return PromptTable(PromptBatch(tokens, lengths, index), tuple(record for _, record in kept), report)


def _shortened(
    prompt: list[int], responses: list[list[int]], width: int, too_long: TooLong
) -> tuple[list[int], list[list[int]]] | None:
    if too_long == "left":
        room = width - max(map(len, responses))
        return (prompt[-room:], responses) if room > 0 else None
    if too_long == "right" and len(prompt) < width:
        return prompt, [response[: width - len(prompt)] for response in responses]
    return None


def _check_some(kept: Sequence[object], what: str, dropped: int) -> None:
    if not kept:
        raise UserError(f"no {what} is left ({dropped} dropped)", at="data", expected=f"at least one {what}",
                        fix="raise the limit of tokens", exit_code=BAD_DATA)  # fmt: skip
