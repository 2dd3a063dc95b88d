"""Tables and the streams over them: contents by hand, determinism, epochs, mixtures, exact resumption everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.data.chat import PLAIN, ChatFormat
from rlhf_jax.data.pipelines import MixedBatches, one_pass, shuffled_batches
from rlhf_jax.data.tables import demonstration_table, prompt_table, ranking_table, text_table
from rlhf_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.types import PromptBatch, RankingBatch, TokenBatch

DIGITS = CharTokenizer("0123456789")
PAD, EOS = DIGITS.pad_id, DIGITS.eos_id


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows(count: int, first: int = 0) -> TokenBatch:
    """A table whose row ``i`` begins with the token ``first + i``."""
    tokens = np.arange(first, first + count, dtype=np.int32)[:, None] * np.ones((1, 3), np.int32)
    ones = np.ones_like(tokens)
    return TokenBatch(tokens, np.arange(3, dtype=np.int32) * ones, ones, ones.astype(np.float32))


def prompts(count: int) -> PromptBatch:
    return PromptBatch(rows(count).tokens, np.full(count, 3, np.int32), np.arange(count, dtype=np.int32))


def rankings(count: int, most: int) -> RankingBatch:
    tokens = np.broadcast_to(rows(count).tokens[:, None], (count, most, 3)).copy()
    ranks = np.broadcast_to(np.arange(most, dtype=np.int32), (count, most)).copy()
    return RankingBatch(tokens, np.full((count, most), 3, np.int32), ranks)


def first_tokens(batch) -> list[int]:
    return np.asarray(batch.tokens).reshape(len(batch.tokens), -1)[:, 0].tolist()


def same(a, b) -> bool:
    return type(a) is type(b) and all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def leaves(batch) -> list[np.ndarray]:
    return list(vars(batch).values())


def test_text_table():
    table = text_table([{"text": "12345"}, {"text": "67"}], DIGITS, 4)
    assert table.rows.tokens.tolist() == [[1, 2, 3, 4], [5, EOS, 6, 7], [EOS, PAD, PAD, PAD]]
    assert table.rows.segments.tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 0, 0, 0]]
    assert text_table([{"text": "x"}], ByteTokenizer(), 4, bos=True).rows.tokens.tolist() == [[258, 120, 257, 256]]
    with pytest.raises(UserError, match="no beginning-of-sequence token"):
        text_table([{"text": "1"}], DIGITS, 4, bos=True)


def test_demonstration_table():
    records = [{"messages": [user("12"), {"role": "assistant", "content": "3"}]}] * 2
    table = demonstration_table(records, DIGITS, PLAIN, 9)
    assert table.rows.tokens.tolist() == [[1, 2, 3, EOS, 1, 2, 3, EOS, PAD]]
    assert table.rows.loss_mask.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1, 0]]
    table = demonstration_table(records, DIGITS, PLAIN, 5, loss_on="everything", pack=False)
    assert table.rows.loss_mask.tolist() == [[0, 1, 1, 1, 0]] * 2


def test_ranking_table():
    records = [
        {"messages": [user("12")], "responses": ["3", "45", "6"], "ranks": [0, 1, 1]},
        {"messages": [user("1")], "responses": ["2", "3"], "ranks": [1, 0]},
    ]
    table = ranking_table(records, DIGITS, PLAIN, 5)
    assert table.rows.tokens.tolist() == [
        [[1, 2, 3, EOS, PAD], [1, 2, 4, 5, EOS], [1, 2, 6, EOS, PAD]],
        [[1, 2, EOS, PAD, PAD], [1, 3, EOS, PAD, PAD], [PAD] * 5],
    ]
    assert table.rows.lengths.tolist() == [[4, 5, 4], [3, 3, 0]]
    assert table.rows.ranks.tolist() == [[0, 1, 1], [1, 0, -1]]
    with pytest.raises(UserError, match="ranking 0 has 5 tokens; expected at most 4"):
        ranking_table(records, DIGITS, PLAIN, 4)
    left, right, drop = (ranking_table(records, DIGITS, PLAIN, 4, too_long=way) for way in ("left", "right", "drop"))
    assert left.rows.tokens[0].tolist() == [[2, 3, EOS, PAD], [2, 4, 5, EOS], [2, 6, EOS, PAD]]
    assert right.rows.tokens[0].tolist() == [[1, 2, 3, EOS], [1, 2, 4, 5], [1, 2, 6, EOS]]
    assert drop.rows.tokens.tolist() == [[[1, 2, EOS, PAD], [1, 3, EOS, PAD]]]
    assert [r.summary() for r in (left.report, drop.report)] == [
        "2 records, 1 truncated, 0 dropped for their length",
        "1 records, 0 truncated, 1 dropped for their length",
    ]
    assert ranking_table(records, DIGITS, PLAIN, 3, too_long="left").report.dropped == 1


def test_prompt_table():
    records = [{"messages": [user("123")]}, {"messages": [user("4")]}]
    table = prompt_table(records, DIGITS, PLAIN, 4)
    assert table.rows.tokens.tolist() == [[1, 2, 3, PAD], [4, PAD, PAD, PAD]]
    assert prompt_table(records, DIGITS, PLAIN, 3).rows.tokens.tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert (table.rows.lengths.tolist(), table.rows.index.tolist()) == ([3, 1], [0, 1])
    with pytest.raises(UserError, match="prompt 0 has 3 tokens; expected at most 2.*too_long='drop'"):
        prompt_table(records, DIGITS, PLAIN, 2)
    table = prompt_table(records, DIGITS, PLAIN, 2, too_long="drop")
    assert (table.rows.tokens.tolist(), table.report.dropped, table.records) == ([[4, PAD]], 1, (records[1],))
    with pytest.raises(UserError, match="no prompt is left .2 dropped."):
        prompt_table(records, DIGITS, ChatFormat("1111", "", "", "", "", ""), 2, too_long="drop")
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        prompt_table([{"messages": [user("")]}], DIGITS, PLAIN, 2)


def test_every_epoch_is_another_permutation():
    stream = shuffled_batches([rows(6)], 3, seed=0)
    epochs = [first_tokens(next(stream)) + first_tokens(next(stream)) for _ in range(8)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    assert epochs[0] != first_tokens(next(shuffled_batches([rows(6)], 6, seed=1)))


def test_batches_larger_than_the_data_and_across_epochs():
    stream = shuffled_batches([rows(3)], 4, seed=0)
    drawn = [token for _ in range(3) for token in first_tokens(next(stream))]
    assert all(sorted(drawn[i : i + 3]) == [0, 1, 2] for i in range(0, 12, 3))


STREAMS = {
    "text": lambda seed=3: shuffled_batches([rows(5)], 2, seed),
    "mixture": lambda seed=3: shuffled_batches([rows(5), rows(4, 10), rows(3, 20)], 4, seed, weights=[0.5, 0.3, 0.2]),
    "rankings": lambda seed=3: shuffled_batches([rankings(5, 2)], 2, seed),
    "prompts": lambda seed=3: shuffled_batches([prompts(5)], 2, seed),
}


@pytest.mark.parametrize("name", STREAMS)
def test_resume_is_exact_from_every_position(name):
    make = STREAMS[name]
    stream = make()
    states, batches = [], []
    for _ in range(12):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    for i, state in enumerate(states):
        fresh = make()
        next(fresh)
        fresh.set_state(json.loads(state))
        assert json.dumps(fresh.get_state()) == state
        for batch in batches[i : i + 4]:
            assert same(next(fresh), batch)
    stream.set_state(json.loads(states[0]))  # also backwards
    assert same(next(stream), batches[0])
    assert not all(same(next(make()), next(make(seed=seed))) for seed in (4, 5, 6))


def test_a_changed_stream_is_refused():
    state = shuffled_batches([rows(5)], 2, seed=3).get_state()
    for other, message in [
        (shuffled_batches([rows(5)], 3, seed=3), "batch_size was 2, is 3"),
        (shuffled_batches([rows(5)], 2, seed=4), "seed was 3, is 4"),
        (shuffled_batches([rows(5, 1)], 2, seed=3), "contents was"),
        (shuffled_batches([rows(6)], 2, seed=3), r"rows was \[5\], is \[6\]"),
    ]:
        with pytest.raises(UserError, match=message):
            other.set_state(state)


def test_mixture_shares():
    tables = [rows(3), rows(50, 100)]

    def share(**weights) -> float:
        stream = shuffled_batches(tables, 10, seed=0, **weights)
        return sum(token < 100 for _ in range(53) for token in first_tokens(next(stream))) / 530

    assert share(weights=[3.0, 1.0]) == pytest.approx(0.75, abs=0.01)
    assert share() == pytest.approx(3 / 53, abs=0.01)
    with pytest.raises(UserError, match=r"weights \[1.0\] for 2 parts of a mixture"):
        share(weights=[1.0])
    with pytest.raises(UserError, match="one positive number for each"):
        share(weights=[1.0, 0.0])


def test_mixed_rankings_are_padded_to_the_largest_k():
    stream = shuffled_batches([rankings(2, 2), rankings(2, 4)], 4, seed=0)
    batch = next(stream)
    assert batch.tokens.shape == (4, 4, 3)
    assert sorted(batch.ranks.tolist()) == [[0, 1, -1, -1]] * 2 + [[0, 1, 2, 3]] * 2
    with pytest.raises(UserError, match=r"rows of \[3, 4\] tokens; expected one width"):
        shuffled_batches([rows(2), text_table([{"text": "1"}], DIGITS, 4).rows], 2, seed=0)


def test_prompts_are_numbered_by_their_place_in_the_stream():
    stream = shuffled_batches([prompts(3)], 2, seed=0)
    assert [next(stream).index.tolist() for _ in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert next(stream).index.dtype == np.int32


def test_one_pass_fills_the_last_batch_with_empty_rows():
    batches = list(one_pass(rows(5), 2))
    assert [first_tokens(batch) for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert batches[-1].segments[1].tolist() == [0, 0, 0] == batches[-1].loss_mask[1].tolist()
    last = list(one_pass(rankings(3, 2), 2))[-1]
    assert (last.ranks[1].tolist(), last.lengths[1].tolist()) == ([-1, -1], [0, 0])
    last = list(one_pass(prompts(3), 2))[-1]
    assert (last.index.tolist(), last.lengths.tolist()) == ([2, -1], [3, 0])
    assert all(leaf.shape[0] == 2 for batch in batches for leaf in leaves(batch))
    with pytest.raises(UserError, match="batch size 0"):
        list(one_pass(rows(2), 0))


def test_empty_tables_are_refused():
    with pytest.raises(UserError, match="a table without rows"):
        shuffled_batches([rows(0)], 2, seed=0)
    with pytest.raises(UserError, match="a table without rows"):
        shuffled_batches([], 2, seed=0)
    with pytest.raises(UserError, match="seed -1"):
        shuffled_batches([rows(2)], 2, seed=-1)


def test_mixed_batches_keep_their_shares_and_resume_exactly():
    def make():
        pairs, rankings = ranking_rows(8, 2), ranking_rows(5, 4)
        streams = [shuffled_batches([pairs], 2, seed=1), shuffled_batches([rankings], 2, seed=2)]
        return MixedBatches(streams, [3.0, 1.0])

    whole = make()
    batches, states = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(whole.get_state())))
        batches.append(next(whole))
    widths = [batch.ranks.shape[1] for batch in batches]
    assert widths.count(2) == 9 and widths.count(4) == 3  # nothing is padded to the larger K
    assert [sum(w == 2 for w in widths[: n + 1]) for n in range(4)] == [1, 2, 2, 3]
    for position in range(12):
        again = make()
        again.set_state(states[position])
        for expected in batches[position:]:
            np.testing.assert_array_equal(next(again).tokens, expected.tokens)


def test_mixed_batches_refuse_wrong_weights_and_another_number_of_streams():
    stream = shuffled_batches([ranking_rows(4, 2)], 2, seed=0)
    with pytest.raises(UserError, match="one positive number for each"):
        MixedBatches([stream], [1.0, 2.0])
    with pytest.raises(UserError, match="2 streams then, 1 now"):
        MixedBatches([stream], [1.0]).set_state({"taken": [0, 0], "streams": [{}, {}]})


def ranking_rows(prompts: int, responses: int) -> RankingBatch:
    """Rankings whose tokens tell them apart."""
    tokens = np.arange(prompts * responses * 3, dtype=np.int32).reshape(prompts, responses, 3)
    ranks = np.tile(np.arange(responses, dtype=np.int32), (prompts, 1))
    return RankingBatch(tokens, np.full((prompts, responses), 3, np.int32), ranks)
