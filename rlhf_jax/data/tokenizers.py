"""Tokenizers as values: bytes, characters, byte-pair encoding trained here, any saved ``tokenizer.json``.

All of them keep two laws: EOS and padding are different ids, and no text that is encoded can produce a special id
(text that happens to contain ``<|eos|>`` stays text).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers as library

from rlhf_jax.errors import BAD_DATA, MISSING_INPUT, REFUSED, UserError

log = logging.getLogger(__name__)

SETTINGS_FILE = "tokenizer_settings.json"
DEFINITION_FILE = "tokenizer.json"
EOS_NAMES = ("<|eos|>", "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "[EOS]")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
BOS_NAMES = ("<|bos|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer. ``decode`` leaves special tokens out."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def save(self, folder: str | Path) -> None: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """One id per UTF-8 byte, then padding, EOS and BOS."""

    vocab_size = 259
    pad_id = 256
    eos_id = 257
    bos_id = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; what is no valid UTF-8 (a model may write anything) becomes U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        _write_settings(folder, {"kind": "bytes"})


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character of a fixed alphabet, then padding and EOS."""

    alphabet: str

    def __post_init__(self) -> None:
        repeated = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if not self.alphabet or repeated:
            raise UserError(f"alphabet {self.alphabet!r} is empty or repeats {repeated}", at="CharTokenizer.alphabet",
                            expected="at least one character, each once", fix="write every character once")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet) + 2

    @property
    def pad_id(self) -> int:
        return len(self.alphabet)

    @property
    def eos_id(self) -> int:
        return len(self.alphabet) + 1

    @property
    def bos_id(self) -> None:
        return None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> list[int]:
        unknown = next((c for c in text if c not in self._ids), None)
        if unknown is not None:
            raise UserError(f"character {unknown!r} of {text[:60]!r} has no id", at="CharTokenizer",
                            expected=f"only characters of {self.alphabet!r}",
                            fix="add it to the alphabet or use ByteTokenizer()", exit_code=BAD_DATA)  # fmt: skip
        return [self._ids[c] for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i] for i in ids if 0 <= i < len(self.alphabet))

    def save(self, folder: str | Path) -> None:
        _write_settings(folder, {"kind": "characters", "alphabet": self.alphabet})


class _Subwords:
    """Encoding and decoding through the ``tokenizers`` library; subclasses say where definition and ids come from."""

    definition: Any
    eos_id: Any
    pad_id: Any
    bos_id: Any

    @cached_property
    def _library(self) -> library.Tokenizer:
        tokenizer = library.Tokenizer.from_str(self.definition)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # special tokens written in a text are text
        return tokenizer

    @cached_property
    def _library_with_specials(self) -> library.Tokenizer:
        tokenizer = library.Tokenizer.from_str(self.definition)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: one more than the largest id, the padding id included."""
        return max(self._largest_id, self.eos_id, self.pad_id) + 1

    @cached_property
    def _largest_id(self) -> int:
        return max(self._library.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_with_specials(self, text: str) -> list[int]:
        """As ``encode``, but names of special tokens become their ids: for chat templates, never for user text."""
        return self._library_with_specials.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.eos_id, self.pad_id, self.bos_id}
        return self._library.decode([int(i) for i in ids if int(i) not in special and i >= 0])

    def token(self, token_id: int) -> str | None:
        """The written form of an id, None for one that was added here."""
        return self._library.id_to_token(token_id)

    def save(self, folder: str | Path) -> None:
        ids = {"eos_id": self.eos_id, "pad_id": self.pad_id, "bos_id": self.bos_id}
        _write_settings(folder, {"kind": "subwords", **ids})
        (Path(folder) / DEFINITION_FILE).write_text(self.definition, encoding="utf-8")


@dataclass(frozen=True)
class SubwordTokenizer(_Subwords):
    """A trained tokenizer held as the text of its ``tokenizer.json``."""

    definition: str = field(repr=False)
    eos_id: int
    pad_id: int
    bos_id: int | None = None

    def __post_init__(self) -> None:
        _check_distinct(self.eos_id, self.pad_id, "SubwordTokenizer")


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> SubwordTokenizer:
    """Byte-level BPE trained on ``texts``: any string can be written, and ``decode(encode(x)) == x``.

    Args:
        texts: the training text; the same texts in the same order give the same tokenizer.
        vocab_size: ids in all, among them 256 bytes and padding, EOS, BOS. Little text may give fewer.
        min_frequency: a pair that is seen less often is not merged.
    """
    specials = ["<|pad|>", "<|eos|>", "<|bos|>"]
    if vocab_size < 256 + len(specials):
        raise UserError(f"vocabulary of {vocab_size}", at="train_bpe(vocab_size)",
                        expected=f"at least {256 + len(specials)} (256 bytes and {len(specials)} special tokens)",
                        fix="ask for more ids, or use ByteTokenizer()")  # fmt: skip
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    pad, eos, bos = (vocabulary[name] for name in specials)
    return SubwordTokenizer(tokenizer.to_str(), eos_id=eos, pad_id=pad, bos_id=bos)


@dataclass(frozen=True)
class SavedTokenizer(_Subwords):
    """Somebody's ``tokenizer.json`` (a file, or the folder that holds it).

    Special tokens are those named here, else those named in ``tokenizer_config.json`` beside the file, else the one
    well-known name that the vocabulary has. A missing padding token is added as a new id, and logged.
    """

    path: str
    eos: str | None = None
    pad: str | None = None
    bos: str | None = None

    @property
    def _file(self) -> Path:
        path = Path(self.path)
        return path / DEFINITION_FILE if path.is_dir() else path

    @cached_property
    def definition(self) -> str:
        text = _read_text(self._file, fix="give the path of a tokenizer.json or of the folder that holds it")
        try:
            library.Tokenizer.from_str(text)
        except Exception as fault:  # the library raises bare Exception
            raise UserError(f"no readable tokenizer ({fault})", at=str(self._file), expected="a tokenizer.json",
                            fix="save it again in the `tokenizers` format", exit_code=BAD_DATA) from fault  # fmt: skip
        return text

    @cached_property
    def settings(self) -> dict[str, Any]:
        """``tokenizer_config.json`` beside the tokenizer, empty where there is none."""
        path = self._file.with_name("tokenizer_config.json")
        settings = _read_json(path) if path.is_file() else {}
        if "auto_map" in settings:
            raise UserError("it asks to run code of its own ('auto_map')", at=str(path), expected="data only",
                            fix="use a tokenizer that is a plain tokenizer.json", exit_code=REFUSED)  # fmt: skip
        return settings

    @property
    def chat_template(self) -> str | None:
        template = self.settings.get("chat_template")
        return template if isinstance(template, str) else None

    @property
    def eos_id(self) -> int:
        return self._special_ids[0]

    @property
    def pad_id(self) -> int:
        return self._special_ids[1]

    @property
    def bos_id(self) -> int | None:
        return self._special_ids[2]

    @cached_property
    def _special_ids(self) -> tuple[int, int, int | None]:
        """EOS, padding and BOS."""
        eos = self._find("eos", self.eos, EOS_NAMES)
        if eos is None:
            raise UserError("the tokenizer has no end-of-sequence token", at=str(self._file),
                            expected=f"one of {', '.join(EOS_NAMES)}, or a name in tokenizer_config.json",
                            fix="name it: SavedTokenizer(path, eos='...')", exit_code=BAD_DATA)  # fmt: skip
        pad = self._find("pad", self.pad, PAD_NAMES)
        if self.pad is not None and pad is not None:
            _check_distinct(eos, pad, str(self._file))
        if pad is None or pad == eos:
            reason = "no padding token" if pad is None else "one token for both padding and end of sequence"
            pad = self._largest_id + 1
            log.warning("%s has %s: padding gets the new id %d", self._file, reason, pad)
        return eos, pad, self._find("bos", self.bos, BOS_NAMES)

    def _find(self, role: str, name: str | None, known: tuple[str, ...]) -> int | None:
        """Id of a special token: by the name given, by the settings' name, by the only well-known name present."""
        if name is not None and self._library.token_to_id(name) is None:
            raise UserError(f"no token {name!r}", at=str(self._file), expected=f"a token of the vocabulary as {role}",
                            fix=f"correct SavedTokenizer(path, {role}=...)", exit_code=BAD_DATA)  # fmt: skip
        configured = self.settings.get(f"{role}_token")
        if isinstance(configured, dict):
            configured = configured.get("content")
        for candidate in (name, configured):
            if isinstance(candidate, str) and self._library.token_to_id(candidate) is not None:
                return self._library.token_to_id(candidate)
        present = [token for token in known if self._library.token_to_id(token) is not None]
        if len(present) > 1 and role == "eos":
            raise UserError(f"several tokens could end a sequence: {', '.join(present)}", at=str(self._file),
                            expected="one", exit_code=BAD_DATA,
                            fix="name it: SavedTokenizer(path, eos='...')")  # fmt: skip
        return self._library.token_to_id(present[0]) if present else None


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote into ``folder``."""
    path = Path(folder) / SETTINGS_FILE
    settings = _read_json(path)
    match settings:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "characters", "alphabet": str(alphabet)}:
            return CharTokenizer(alphabet)
        case {"kind": "subwords", "eos_id": int(eos), "pad_id": int(pad), "bos_id": bos}:
            definition = _read_text(path.with_name(DEFINITION_FILE), fix="save the tokenizer again")
            return SubwordTokenizer(definition, eos, pad, bos)
    raise UserError(f"got {settings!r:.80}", at=str(path), expected="settings written by a tokenizer's save()",
                    fix="save the tokenizer again", exit_code=BAD_DATA)  # fmt: skip


def fingerprint(tokenizer: Tokenizer) -> str:
    """Twelve hex digits that differ when two tokenizers would give a text different ids."""
    definition = tokenizer.definition if isinstance(tokenizer, _Subwords) else asdict(tokenizer)  # type: ignore[call-overload]
    ids = [type(tokenizer).__name__ if not isinstance(tokenizer, _Subwords) else "subwords",
           tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id]  # fmt: skip
    return hashlib.sha256(json.dumps([definition, *ids]).encode()).hexdigest()[:12]


def _check_distinct(eos_id: int, pad_id: int, at: str) -> None:
    if eos_id == pad_id:
        raise UserError(f"end of sequence and padding are both id {eos_id}", at=at, expected="two different tokens",
                        fix="leave `pad` out to have an id added, or name another token")  # fmt: skip


def _write_settings(folder: str | Path, settings: dict[str, Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SETTINGS_FILE).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_text(path: Path, *, fix: str) -> str:
    if not path.is_file():
        raise UserError("there is no such file", at=str(path), expected="a saved tokenizer", fix=fix,
                        exit_code=MISSING_INPUT)  # fmt: skip
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise UserError(f"invalid UTF-8 at byte {fault.start}", at=str(path), expected="UTF-8 text", fix=fix,
                        exit_code=BAD_DATA) from fault  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path, fix="save the tokenizer again"))
    except (json.JSONDecodeError, RecursionError) as fault:
        raise UserError(f"broken JSON ({fault})", at=str(path), expected="a JSON object",
                        fix="save the tokenizer again", exit_code=BAD_DATA) from fault  # fmt: skip
    if not isinstance(value, dict):
        raise UserError(f"got a {type(value).__name__}", at=str(path), expected="a JSON object",
                        fix="save the tokenizer again", exit_code=BAD_DATA)  # fmt: skip
    return value
