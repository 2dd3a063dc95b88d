"""The puzzles of recall against the properties of their protocols."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax import config
from rlhf_jax.data.tables import demonstration_table
from rlhf_jax.data.tasks.base import TaskDemonstrations
from rlhf_jax.data.tasks.recall import FIRST_LETTER, MQAR, Copy, Induction, Unmarked, alphabet
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.errors import UserError

PUZZLES = (MQAR(32, 5, 40), MQAR(24, 6, 30, power=1.0, filled=False), Induction(12, 9), Copy(5, 9))


def rows(task, count=6):
    records = TaskDemonstrations(task, count, seed=3).records()
    return demonstration_table(records, CharTokenizer(alphabet(task.vocab)), Unmarked(), width(task), pack=False).rows


def width(task):
    return task.examples(1, 0)[0].shape[1]


@pytest.mark.parametrize("task", PUZZLES, ids=repr)
def test_a_larger_set_extends_a_smaller_one_and_seeds_differ(task):
    few, many = task.examples(4, 0), task.examples(9, 0)
    for one, other in zip(few, many, strict=True):
        assert np.array_equal(one, other[:4])
    assert not np.array_equal(few[0], task.examples(4, 1)[0])


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (256, 64)])
def test_mqar_is_the_published_protocol(length, pairs):
    task = MQAR(length, pairs)
    assert task.vocab == 8192 and task.power == 0.01 and task.filled
    tokens, answers = task.examples(12, 0)
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() < 4096 and values.min() >= 4096 and values.max() < 8192
    for row in range(12):
        assert len(set(keys[row])) == len(set(values[row])) == pairs  # drawn without replacement
        asked = np.flatnonzero(answers[row] >= 0)
        assert len(asked) == pairs and asked.min() >= 2 * pairs and (asked % 2 == 0).all()
        assert set(tokens[row, asked]) == set(keys[row])  # each key once
        value = dict(zip(keys[row], values[row], strict=True))
        assert [value[key] for key in tokens[row, asked]] == answers[row, asked].tolist()
    rest = np.delete(np.arange(length), np.arange(2 * pairs))
    free = tokens[:, rest][answers[:, rest] < 0]
    assert len(free) == 12 * (length - 3 * pairs) and free.max() > 4096 > free.min()
    assert (MQAR(length, pairs, filled=False).examples(12, 0)[0][:, rest][answers[:, rest] < 0] >= 0).all()


def test_without_filling_everything_between_is_zero():
    tokens, answers = MQAR(32, 3, 20, filled=False).examples(5, 0)
    assert (tokens[:, 6:][answers[:, 6:] < 0] == 0).all() and (tokens[:, 6:][answers[:, 6:] >= 0] > 0).all()


def test_gaps_follow_the_power_law():
    """One pair in eight places: place ``g`` is drawn with weight ``a g^(a - 1)``, counted over many examples."""
    task, count = MQAR(18, 1, 8, power=0.3), 8_000
    _, answers = task.examples(count, 0)
    places = np.bincount((np.argmax(answers >= 0, axis=1) - 2) // 2, minlength=8) / count
    weights = [0.3 * g ** (0.3 - 1) for g in range(1, 9)]
    np.testing.assert_allclose(places, np.array(weights) / sum(weights), atol=0.02)


def test_induction_asks_for_the_token_behind_the_first_mark():
    tokens, answers = Induction(16, 5).examples(50, 0)
    for row, right in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert row.count(0) == 2 and row[-2] == 0
        assert [place for place, answer in enumerate(right) if answer >= 0] == [14]
        assert right[14] == row[row.index(0) + 1] != 0
    assert len(set(np.argmax(tokens == 0, axis=1))) == 13  # every place from 0 to 12


def test_copy_repeats_behind_the_mark():
    tokens, answers = Copy(6, 7).examples(20, 0)
    assert tokens.shape == (20, 13) and (tokens[:, 6] == 0).all() and (tokens[:, :6] > 0).all()
    assert np.array_equal(tokens[:, :6], tokens[:, 7:])
    assert np.array_equal(answers[:, 6:12], tokens[:, 7:]) and (np.delete(answers, range(6, 12), axis=1) == -1).all()


@pytest.mark.parametrize("task", PUZZLES, ids=repr)
def test_rows_have_the_answer_behind_its_question_as_the_only_target(task):
    found, (tokens, answers) = rows(task), task.examples(6, 3)
    asked = answers >= 0
    assert found.tokens.shape == tokens.shape and (found.segments == 1).all()
    assert np.array_equal(found.loss_mask[:, 1:] > 0, asked[:, :-1]) and (found.loss_mask[:, 0] == 0).all()
    assert np.array_equal(found.tokens[:, 1:][asked[:, :-1]], answers[asked])
    same = ~np.pad(asked[:, :-1], ((0, 0), (1, 0)))
    assert np.array_equal(found.tokens[same], tokens[same])


def test_turns_stand_directly_behind_each_other():
    tokenizer, chat = CharTokenizer("abcd"), Unmarked()
    said = [("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "a"), ("user", "b")]
    messages = [{"role": role, "content": content} for role, content in said]
    document = chat.dialogue_tokens(tokenizer, messages)
    assert document.tokens.tolist() == [0, 1, 2, 3, 0, 1]
    assert document.targets.tolist() == [False, False, True, False, True, False]
    assert chat.dialogue_tokens(tokenizer, messages, "last_response").targets.tolist() == [False] * 4 + [True, False]
    assert chat.dialogue_tokens(tokenizer, messages, "everything").targets.all()
    before = chat.prompt_tokens(tokenizer, messages[:1]) + chat.response_tokens(tokenizer, "c")
    assert before == document.tokens[:3].tolist()


def test_letters_are_one_for_each_token():
    letters = alphabet(8192)
    assert len(set(letters)) == 8192 and ord(letters[0]) == FIRST_LETTER and all(letter.isalpha() for letter in letters)
    assert config.revive(config.describe(Unmarked())) == Unmarked()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MQAR(63, 4), "an even length"),
        (lambda: MQAR(12, 4), "length 12 for 4 pairs"),
        (lambda: MQAR(64, 0), "at least one pair"),
        (lambda: MQAR(64, 8, vocab=16), "at most 7"),
        (lambda: MQAR(power=0.0), "a positive number"),
        (lambda: MQAR(vocab=30_000), "20992"),
        (lambda: Induction(3), "at least 4"),
        (lambda: Induction(vocab=2), "3 to"),
        (lambda: Copy(0), "at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
