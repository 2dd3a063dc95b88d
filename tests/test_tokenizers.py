"""Tokenizers: exact round trips, special ids that no text can produce, and one clear error for each bad one."""

from __future__ import annotations

import json
import logging

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SavedTokenizer,
    Tokenizer,
    fingerprint,
    load,
    train_bpe,
)
from rlhf_jax.errors import BAD_DATA, MISSING_INPUT, REFUSED, UserError

CORPUS = ["low lower lowest new newer newest " * 20, "红楼梦 红楼 红 " * 20]
BPE = train_bpe(CORPUS, 320)
ALL = [ByteTokenizer(), CharTokenizer("abc"), BPE]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: type(t).__name__)
def test_protocol_and_distinct_special_ids(tokenizer: Tokenizer, tmp_path):
    assert isinstance(tokenizer, Tokenizer)
    specials = [tokenizer.eos_id, tokenizer.pad_id, *([] if tokenizer.bos_id is None else [tokenizer.bos_id])]
    assert len(set(specials)) == len(specials)
    assert all(0 <= i < tokenizer.vocab_size for i in specials)
    ids = tokenizer.encode("abc")
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.eos_id]) == "abc"
    tokenizer.save(tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert again == tokenizer and hash(again) == hash(tokenizer) and again.encode("cab") == tokenizer.encode("cab")
    assert fingerprint(again) == fingerprint(tokenizer)


def test_fingerprints_differ():
    others = [CharTokenizer("acb"), train_bpe(CORPUS, 270)]
    assert len({fingerprint(tokenizer) for tokenizer in [*ALL, *others]}) == len(ALL) + len(others)


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_bytes_and_bpe_round_trip(text: str):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not {tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id} & set(ids)


def test_byte_ids_are_utf8():
    assert ByteTokenizer().encode("aé") == [97, 0xC3, 0xA9]
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_special_names_in_text_stay_text():
    ids = BPE.encode("a<|eos|>b<|pad|>")
    assert BPE.eos_id not in ids and BPE.pad_id not in ids
    assert BPE.decode(ids) == "a<|eos|>b<|pad|>"
    assert BPE.encode_with_specials("a<|eos|>")[-1] == BPE.eos_id


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = train_bpe(["abab abab abab cd"], 260)  # one merge: "ab" is seen six times, " a" three times
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("ab") == [259]
    assert len(tokenizer.encode("cd")) == 2


def test_bpe_is_deterministic_and_refuses_tiny_vocabularies():
    assert train_bpe(list(CORPUS), 320) == BPE
    assert train_bpe(CORPUS, 270).vocab_size == 270
    assert BPE.vocab_size < 320  # no more pairs to merge
    with pytest.raises(UserError, match="vocabulary of 100.*at least 259"):
        train_bpe(CORPUS, 100)


def test_char_tokenizer():
    tokenizer = CharTokenizer("xyz")
    assert tokenizer.encode("zx") == [2, 0] and tokenizer.vocab_size == 5
    with pytest.raises(UserError, match="character 'q'.*only characters of 'xyz'"):
        tokenizer.encode("xq")
    with pytest.raises(UserError, match="repeats \\['x'\\]"):
        CharTokenizer("xx")


def words(path, *tokens: str):
    """A word-level tokenizer.json with these tokens."""
    tokenizer = library.Tokenizer(library.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([token for token in tokens if token[0] in "<["])
    tokenizer.save(str(path / "tokenizer.json"))
    return str(path)


def test_saved_tokenizer_finds_its_special_tokens(tmp_path):
    path = words(tmp_path, "<unk>", "</s>", "<pad>", "hello", "<s>")
    tokenizer = SavedTokenizer(path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size) == (1, 2, 4, 5)
    assert tokenizer.encode("hello") == [3] == SavedTokenizer(path + "/tokenizer.json").encode("hello")
    assert SavedTokenizer(path, eos="<s>").eos_id == 4
    tokenizer.save(tmp_path / "copy")
    assert fingerprint(load(tmp_path / "copy")) == fingerprint(tokenizer)


def test_saved_tokenizer_without_eos_names_the_option(tmp_path):
    with pytest.raises(UserError, match=r"no end-of-sequence token.*SavedTokenizer\(path, eos='...'\)") as fault:
        _ = SavedTokenizer(words(tmp_path, "<unk>", "hello")).eos_id
    assert fault.value.exit_code == BAD_DATA
    with pytest.raises(UserError, match="no token '<end>'"):
        _ = SavedTokenizer(words(tmp_path, "<unk>", "hello"), eos="<end>").eos_id
    with pytest.raises(UserError, match="several tokens could end a sequence"):
        _ = SavedTokenizer(words(tmp_path, "<unk>", "</s>", "<|endoftext|>")).eos_id


def test_saved_tokenizer_adds_padding_and_says_so(tmp_path, caplog):
    path = words(tmp_path, "<unk>", "<|endoftext|>", "hello")
    with caplog.at_level(logging.WARNING):
        tokenizer = SavedTokenizer(path)
        assert (tokenizer.pad_id, tokenizer.vocab_size) == (3, 4)
    assert "no padding token: padding gets the new id 3" in caplog.text
    assert tokenizer.decode([2, 1, 3]) == "hello"
    tokenizer.save(tmp_path / "copy")
    assert load(tmp_path / "copy").vocab_size == 4


def test_saved_tokenizer_separates_padding_from_eos(tmp_path):
    path = words(tmp_path, "<unk>", "<|endoftext|>", "hello")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>"})
    )
    assert (SavedTokenizer(path).eos_id, SavedTokenizer(path).pad_id) == (1, 3)
    with pytest.raises(UserError, match="both id 1; expected two different tokens"):
        _ = SavedTokenizer(path, pad="<|endoftext|>").pad_id


def test_saved_tokenizer_refuses_code_and_damage(tmp_path):
    with pytest.raises(UserError, match="no such file") as fault:
        _ = SavedTokenizer(str(tmp_path)).eos_id
    assert fault.value.exit_code == MISSING_INPUT
    path = words(tmp_path, "<unk>", "</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.py", null]}}')
    with pytest.raises(UserError, match="run code of its own") as fault:
        _ = SavedTokenizer(path).eos_id
    assert fault.value.exit_code == REFUSED
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="got a list.*a JSON object"):
        _ = SavedTokenizer(path).eos_id
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="no readable tokenizer"):
        _ = SavedTokenizer(path).definition


def test_load_refuses_other_settings(tmp_path):
    (tmp_path / "tokenizer_settings.json").write_text('{"kind": "words"}')
    with pytest.raises(UserError, match="expected settings written by a tokenizer's save"):
        load(tmp_path)
