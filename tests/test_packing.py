"""Packing: no token lost or invented, documents apart, cuts as asked and counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.packing import Document, Packed, best_fit, concat_and_split, one_per_row
from rlhf_jax.errors import UserError

PAD = 99


def document(*tokens: int, targets: str = "") -> Document:
    """Targets as a string of 0 and 1, all by default."""
    return Document(np.array(tokens, np.int32), np.array([t == "1" for t in targets or "1" * len(tokens)]))


def pieces(packed: Packed) -> list[tuple[list[int], list[float]]]:
    """Tokens and loss mask of each segment of each row, read one token at a time; checks positions on the way."""
    found = []
    rows = packed.rows
    for r in range(len(rows.tokens)):
        last = 0
        for t in range(rows.tokens.shape[1]):
            segment, position = rows.segments[r, t], rows.positions[r, t]
            if segment == 0:
                assert (rows.tokens[r, t], position, rows.loss_mask[r, t]) == (PAD, 0, 0)
                last = None
                continue
            assert last is not None, "padding stands at the end of a row only"
            if segment == last:
                found[-1][0].append(int(rows.tokens[r, t]))
                found[-1][1].append(float(rows.loss_mask[r, t]))
            else:
                assert segment == last + 1
                found.append(([int(rows.tokens[r, t])], [float(rows.loss_mask[r, t])]))
            assert position == len(found[-1][0]) - 1
            last = segment
    return found


def test_concat_and_split_by_hand():
    packed = concat_and_split([document(1, 2, 3), document(4, 5, 6, 7, 8, 9), document(7)], 4, PAD)
    assert packed.rows.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 7, PAD, PAD]]
    assert packed.rows.segments.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 0, 0]]
    assert packed.rows.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert packed.rows.loss_mask.tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]
    report = packed.report
    assert (report.documents, report.rows, report.tokens, report.padding, report.split) == (3, 3, 10, 2, 1)
    assert report.summary() == "3 documents, 10 tokens in 3 rows (83.3% full), 1 split"
    assert packed.rows.tokens.dtype == np.int32 and packed.rows.loss_mask.dtype == np.float32


def test_best_fit_by_hand():
    # Longest first: 4 opens a row, 3 another; the first 2 fills up the second row, the other 2 opens a third.
    documents = [document(1, 1), document(2, 2, 2), document(3, 4), document(5, 5, 5, 5)]
    packed = best_fit(documents, 5, PAD)
    assert packed.rows.tokens.tolist() == [[5, 5, 5, 5, PAD], [2, 2, 2, 1, 1], [3, 4, PAD, PAD, PAD]]
    assert packed.rows.segments.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    tight = best_fit([document(*[1] * n) for n in (6, 4, 3, 3, 2, 2)], 10, PAD)
    assert len(tight.rows.tokens) == 2 and tight.report.padding == 0


def test_targets_follow_their_tokens():
    packed = best_fit([document(1, 2, 3, targets="011"), document(4, 5, targets="11")], 5, PAD)
    assert packed.rows.loss_mask.tolist() == [[0, 1, 1, 0, 1]]


DOCUMENTS = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).map(lambda tokens: document(*tokens)), min_size=1, max_size=12
)


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(2, 9))
def test_concat_and_split_conserves_every_token(documents, width):
    packed = concat_and_split(documents, width, PAD)
    tokens = [token for piece, _ in pieces(packed) for token in piece]
    assert tokens == [int(token) for document in documents for token in document.tokens]
    assert (packed.rows.segments[:-1] > 0).all()
    assert all(mask == [0.0] + [1.0] * (len(piece) - 1) for piece, mask in pieces(packed))


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(2, 9), st.sampled_from(["left", "right", "drop"]), st.booleans())
def test_fitting_conserves_whole_documents(documents, width, too_long, several):
    cut = {"left": lambda d: d[-width:], "right": lambda d: d[:width], "drop": lambda d: d if len(d) <= width else []}
    wanted = [cut[too_long](document.tokens.tolist()) for document in documents]
    wanted = [tokens for tokens in wanted if len(tokens) > 1]  # a single token has no target: nothing comes before it
    if not wanted:
        with pytest.raises(UserError, match="no document is left"):
            best_fit(documents, width, PAD, too_long)
        return
    packed = (best_fit if several else one_per_row)(documents, width, PAD, too_long)
    found = [tokens for tokens, _ in pieces(packed)]
    assert (sorted(found) == sorted(wanted)) if several else (found == wanted)
    report = packed.report
    assert report.tokens == sum(map(len, wanted)) == int((packed.rows.segments > 0).sum())
    assert report.tokens + report.lost_tokens == sum(map(len, documents))
    assert report.dropped == len(documents) - len(wanted)
    assert report.padding == int((packed.rows.segments == 0).sum())


def test_what_is_too_long_is_an_error_unless_said_otherwise():
    documents = [document(1, 2), document(1, 2, 3, 4, targets="0011")]
    with pytest.raises(UserError, match="document 1 has 4 tokens; expected at most 3.*'left', 'right' or 'drop'"):
        best_fit(documents, 3, PAD)
    assert best_fit(documents, 3, PAD, "left").rows.loss_mask.tolist() == [[0, 1, 1], [0, 1, 0]]
    report = best_fit(documents, 3, PAD, "right").report
    assert (report.truncated, report.lost_tokens, report.dropped) == (1, 1, 0)
    # Cut to its prompt, the second document has nothing to learn.
    report = best_fit(documents, 2, PAD, "right").report
    assert (report.truncated, report.lost_tokens, report.dropped) == (0, 4, 1)
    assert report.summary() == "2 documents, 2 tokens in 1 rows (100.0% full), 1 dropped, 4 tokens lost"
    with pytest.raises(UserError, match="too_long='cut'"):
        best_fit(documents, 3, PAD, "cut")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="rows of 1 tokens"):
        concat_and_split(documents, 1, PAD)
    with pytest.raises(UserError, match="no document is left"):
        concat_and_split([], 4, PAD)
