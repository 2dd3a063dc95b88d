"""Documents of tokens into rows of one width; documents never see each other, and nothing is cut silently.

``segments`` counts the documents of a row from 1 (0 is padding) and ``positions`` counts from 0 in each of them. The
first token of a segment has nothing before it, so it is never a target.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.errors import BAD_DATA, UserError
from rlhf_jax.types import TokenBatch

TooLong = Literal["error", "left", "right", "drop"]
"""What becomes of a document longer than the row: an error, cut at its left or right end, or left out."""


@dataclass(frozen=True)
class Document:
    """Tokens that belong together, and which of them are to be learned."""

    tokens: Int[np.ndarray, " L"]
    targets: Bool[np.ndarray, " L"]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Document:
        """All tokens are targets."""
        return cls(np.asarray(tokens, np.int32), np.ones(len(tokens), bool))


@dataclass(frozen=True)
class Report:
    """What became of the documents. ``tokens`` counts those in the rows, ``lost_tokens`` those cut or left out."""

    documents: int
    rows: int
    tokens: int
    padding: int
    split: int = 0
    truncated: int = 0
    dropped: int = 0
    lost_tokens: int = 0

    def summary(self) -> str:
        """One line for the log."""
        fill = 1 - self.padding / max(self.tokens + self.padding, 1)
        fates = {"split": self.split, "truncated": self.truncated, "dropped": self.dropped}
        fates["tokens lost"] = self.lost_tokens
        return f"{self.documents} documents, {self.tokens} tokens in {self.rows} rows ({fill:.1%} full)" + "".join(
            f", {count} {fate}" for fate, count in fates.items() if count)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """All rows of a data set as one batch, and the report."""

    rows: TokenBatch
    report: Report


def concat_and_split(documents: Sequence[Document], width: int, pad_id: int) -> Packed:
    """Lay the documents one after the other and cut every ``width`` tokens: full rows, for pretraining.

    A document that a cut divides goes on in the next row as a segment of its own.
    """
    _check_width(width)
    documents = [document for document in documents if len(document)]
    _check_some(documents)
    lengths = np.array([len(document) for document in documents])
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    rows = -(-total // width)
    owner = np.repeat(np.arange(len(documents)), lengths)
    place = np.arange(total)
    row_start = place // width * width
    segments = owner - owner[row_start] + 1
    positions = place - np.maximum(np.repeat(starts, lengths), row_start)
    targets = np.concatenate([document.targets for document in documents]) & (positions > 0)
    tokens = np.concatenate([document.tokens for document in documents])
    split = int(np.sum(starts // width != (starts + lengths - 1) // width))
    batch = TokenBatch(
        tokens=_fill(tokens, rows, width, pad_id, np.int32),
        positions=_fill(positions, rows, width, 0, np.int32),
        segments=_fill(segments, rows, width, 0, np.int32),
        loss_mask=_fill(targets, rows, width, 0, np.float32),
    )
    return Packed(batch, Report(len(documents), rows, total, rows * width - total, split=split))


def best_fit(documents: Sequence[Document], width: int, pad_id: int, too_long: TooLong = "error") -> Packed:
    """Whole documents side by side, each in the fullest row that still has room for it (longest first)."""
    kept, counts = fit_all(documents, width, too_long)
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    rows: list[list[Document]] = []
    for document in sorted(kept, key=len, reverse=True):
        i = bisect_left(room, (len(document), 0))
        if i == len(room):
            rows.append([document])
            insort(room, (width - len(document), len(rows) - 1))
        else:
            free, row = room.pop(i)
            rows[row].append(document)
            insort(room, (free - len(document), row))
    return _pack(rows, width, pad_id, counts)


def one_per_row(documents: Sequence[Document], width: int, pad_id: int, too_long: TooLong = "error") -> Packed:
    """Each document in a row of its own, in the order given."""
    kept, counts = fit_all(documents, width, too_long)
    return _pack([[document] for document in kept], width, pad_id, counts)


def fit_all(documents: Sequence[Document], width: int, too_long: TooLong) -> tuple[list[Document], dict[str, int]]:
    """The documents that fit into ``width`` after ``too_long`` was applied, and the counts for the report.

    A document that has no target left (its answer was cut off) teaches nothing and is dropped.
    """
    _check_width(width)
    check_too_long(too_long, ("error", "left", "right", "drop"))
    kept, counts = [], {"documents": len(documents), "truncated": 0, "dropped": 0, "lost_tokens": 0}
    for number, document in enumerate(documents):
        fitting = _fit(document, width, too_long, number)
        if fitting is None or not fitting.targets[1:].any():
            counts["dropped"] += 1
            counts["lost_tokens"] += len(document)
            continue
        counts["truncated"] += len(fitting) < len(document)
        counts["lost_tokens"] += len(document) - len(fitting)
        kept.append(fitting)
    _check_some(kept, counts["dropped"])
    return kept, counts


def check_too_long(too_long: str, accepted: tuple[str, ...]) -> None:
    """Refuse a word that is no way to treat what is too long."""
    if too_long not in accepted:
        raise UserError(f"too_long={too_long!r}", at="data", expected=f"one of {', '.join(accepted)}", fix="correct it")


def length_error(what: str, length: int, width: int, ways: str) -> UserError:
    """The fault of a record that is longer than the limit where nobody said what to do about it."""
    return UserError(f"{what} has {length} tokens", at="data", expected=f"at most {width}",
                     fix=f"raise the limit, or say too_long={ways}", exit_code=BAD_DATA)  # fmt: skip


def full(shape: tuple[int, ...], value: float, dtype: type = np.int32) -> Any:
    """A numpy array for a batch; of type Any, since the batch types speak of device arrays."""
    return np.full(shape, value, dtype)


def _fit(document: Document, width: int, too_long: TooLong, number: int) -> Document | None:
    if len(document) <= width:
        return document
    if too_long == "error":
        raise length_error(f"document {number}", len(document), width, "'left', 'right' or 'drop'")
    if too_long == "drop":
        return None
    kept = slice(-width, None) if too_long == "left" else slice(width)
    return Document(document.tokens[kept], document.targets[kept])


def _pack(rows: list[list[Document]], width: int, pad_id: int, counts: dict[str, int]) -> Packed:
    shape = (len(rows), width)
    tokens, positions, segments = full(shape, pad_id), full(shape, 0), full(shape, 0)
    loss_mask = full(shape, 0.0, np.float32)
    for r, documents in enumerate(rows):
        start = 0
        for s, document in enumerate(documents, start=1):
            here = slice(start, start + len(document))
            tokens[r, here], segments[r, here] = document.tokens, s
            positions[r, here] = np.arange(len(document))
            loss_mask[r, here] = document.targets
            loss_mask[r, start] = 0.0
            start += len(document)
    used = int((segments > 0).sum())
    return Packed(TokenBatch(tokens, positions, segments, loss_mask),
                  Report(rows=len(rows), tokens=used, padding=tokens.size - used, **counts))  # fmt: skip


def _fill(values: np.ndarray, rows: int, width: int, empty: int, dtype: type) -> Any:
    filled = np.full(rows * width, empty, dtype)
    filled[: len(values)] = values
    return filled.reshape(rows, width)


def _check_width(width: int) -> None:
    if width < 2:
        raise UserError(f"rows of {width} tokens", at="packing", expected="at least 2", fix="raise the width")


def _check_some(documents: Sequence[Document], dropped: int = 0) -> None:
    if not documents:
        raise UserError(f"no document is left ({dropped} dropped)", at="packing", expected="at least one document",
                        fix="raise the width, or treat long documents otherwise", exit_code=BAD_DATA)  # fmt: skip
