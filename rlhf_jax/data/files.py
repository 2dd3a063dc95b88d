"""Rows out of files: JSON Lines, Parquet and plain text, plain or gzip, every fault named with file and line.

Lines end at ``\\n`` alone (``str.splitlines`` would also cut at U+2028 inside a JSON string), a byte-order mark at the
start is accepted, and what Python's ``json`` lets through although it is no JSON (NaN, Infinity, 1e999, duplicate
keys, lone surrogates) is refused. What the fields of a row mean is the business of ``readers``.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.errors import BAD_DATA, MISSING_INPUT, UserError

MAX_LINE_BYTES = 16 * 2**20
MAX_FILE_BYTES = 4 * 2**30
MAX_DEPTH = 64
MAX_DIGITS = 18
BOM = b"\xef\xbb\xbf"
JSON_LINES = (".jsonl", ".jsonl.gz")
PARQUET = (".parquet",)
TEXT = (".txt", ".txt.gz")

OnFault = Callable[[UserError], None]
"""Raises the fault, or notes it and lets reading go on with the next line."""


def bad_data(what: str, *, at: str, expected: str, fix: str) -> UserError:
    """A fault of the user's data, with the exit code for it."""
    return UserError(what, at=at, expected=expected, fix=fix, exit_code=BAD_DATA)


def ending(path: Path, accepted: tuple[str, ...]) -> str:
    """The one of ``accepted`` name endings that ``path`` has."""
    found = next((end for end in accepted if path.name.lower().endswith(end)), None)
    if found is None:
        raise bad_data(f"a file named {path.name!r}", at=str(path), expected=f"the ending {' or '.join(accepted)}",
                       fix="rename it if its contents have one of these formats, else convert it")  # fmt: skip
    return found


def check_present(path: Path) -> None:
    """Refuse what is missing, no file, or empty."""
    if not path.exists():
        raise UserError("there is no such file", at=str(path), expected="a data file", fix="correct the path",
                        exit_code=MISSING_INPUT)  # fmt: skip
    if not path.is_file():
        raise UserError("this is a folder", at=str(path), expected="a data file", fix="name a file in it",
                        exit_code=MISSING_INPUT)  # fmt: skip
    if path.stat().st_size == 0:
        raise bad_data("the file is empty (0 bytes)", at=str(path), expected="at least one record",
                       fix="write the file again; the program that made it may have been stopped")  # fmt: skip


def read_rows(path: Path, on_fault: OnFault) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(place, row)`` of every row of a JSON Lines or Parquet file; ``place`` is what errors name."""
    kind = ending(path, JSON_LINES + PARQUET)
    check_present(path)
    yield from _parquet_rows(path) if kind in PARQUET else _json_rows(path, on_fault)


def read_lines(path: Path, on_fault: OnFault) -> Iterator[tuple[str, str]]:
    """``(file:line, text)`` of every line of UTF-8 text, without its end."""
    check_present(path)
    offset = 0
    for number, raw in enumerate(_raw_lines(path), start=1):
        place, start = f"{path}:{number}", offset
        offset += len(raw)
        if number == 1 and raw.startswith(BOM):
            raw, start = raw[len(BOM) :], len(BOM)
        try:
            text = raw.removesuffix(b"\n").decode("utf-8")
        except UnicodeDecodeError as fault:
            on_fault(_not_utf8(raw, start + fault.start, fault, place))
            continue
        if "\0" in text:
            on_fault(bad_data(f"a NUL character at byte {start + raw.index(0)}", at=place, expected="UTF-8 text",
                              fix="convert it from UTF-16 or a binary format to UTF-8"))  # fmt: skip
            continue
        yield place, text


def parse_json_object(text: str, place: str) -> dict[str, Any]:
    """One JSON object by the letter of the standard, no deeper than 64 levels; anything else is a ``UserError``."""
    try:
        value = _DECODER.decode(text)
        _check_value(value, 0)
    except _NotAccepted as fault:
        raise bad_data(f"{fault} in {text[:80]!r}", at=place, expected=fault.expected, fix=fault.fix) from None
    except json.JSONDecodeError as fault:
        raise bad_data(f"broken JSON ({fault.msg} at column {fault.colno}) in {text[:80]!r}", at=place,
                       expected="one JSON object a line",
                       fix='mend the line, or read with on_bad_line="skip"') from None  # fmt: skip
    except RecursionError:
        raise bad_data(f"JSON that is nested too deep in {text[:80]!r}", at=place,
                       expected=f"at most {MAX_DEPTH} levels", fix="flatten the record") from None  # fmt: skip
    if not isinstance(value, dict):
        raise bad_data(f"a JSON {_json_kind(value)} {text[:80]!r}", at=place, expected='an object: {"field": ...}',
                       fix="write one object a line (JSON Lines), not one list with all records")  # fmt: skip
    return value


def _json_rows(path: Path, on_fault: OnFault) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in read_lines(path, on_fault):
        if not line.strip(" \t\r"):
            continue
        try:
            row = parse_json_object(line, place)
        except UserError as fault:
            on_fault(fault)
        else:
            yield place, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # takes longer to load than the rest of this module together
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as fault:
        raise bad_data(f"unreadable Parquet ({str(fault)[:160]})", at=str(path), expected="a whole Parquet file",
                       fix="write or copy the file again") from fault  # fmt: skip


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, decompressed; a line or a file beyond the limits is refused before it fills the memory."""
    total = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                total += len(raw)
                if len(raw) > MAX_LINE_BYTES or total > MAX_FILE_BYTES:
                    raise bad_data(f"a line over {MAX_LINE_BYTES} bytes or a file over {MAX_FILE_BYTES} bytes",
                                   at=str(path), expected="shorter lines and files", fix="split the file")  # fmt: skip
                yield raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as fault:
        raise bad_data(f"damaged gzip ({fault}) after {total} bytes of text", at=str(path),
                       expected="a whole gzip file", fix="compress or copy the file again") from fault  # fmt: skip
    except PermissionError as fault:
        raise UserError("the file may not be read", at=str(path), expected="read permission", fix="change its mode",
                        exit_code=MISSING_INPUT) from fault  # fmt: skip


def _not_utf8(raw: bytes, offset: int, fault: UnicodeDecodeError, place: str) -> UserError:
    guess = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:2] == b"\0" else "Latin-1 or Windows-1252"
    return bad_data(f"invalid UTF-8: byte 0x{raw[fault.start]:02x} at byte {offset} of the text", at=place,
                    expected="UTF-8", fix=f"convert the file (it looks like {guess}) with iconv -t UTF-8")  # fmt: skip


class _NotAccepted(Exception):
    """JSON that Python reads and we do not."""

    def __init__(self, what: str, expected: str, fix: str):
        super().__init__(what)
        self.expected, self.fix = expected, fix


def _constant(name: str) -> float:
    raise _NotAccepted(f"the number {name}", "finite numbers", "JSON has no such value: drop the record or the field")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NotAccepted(f"the number {text[:40]}", "a number that fits a double", "correct the number")
    return number


def _int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise _NotAccepted(f"an integer of {len(text)} digits", f"at most {MAX_DIGITS} digits", "write it as a string")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _NotAccepted(f"the key {twice!r} twice in one object", "each key once", "rename or remove one of them")
    return row


def _check_value(value: Any, depth: int) -> None:
    """Refuse deep nesting and lone surrogates, which cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _NotAccepted("half a character (a lone surrogate)", "whole characters",
                               "escape characters beyond U+FFFF as a pair") from None  # fmt: skip
    elif isinstance(value, dict | list):
        if depth >= MAX_DEPTH:
            raise _NotAccepted("JSON that is nested too deep", f"at most {MAX_DEPTH} levels", "flatten the record")
        for child in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            _check_value(child, depth + 1)


def _json_kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object)
