"""Turn the text of ``--set path=value`` into a value of the field's own type."""

from __future__ import annotations

import enum
import math
import sys
import types
import typing
from pathlib import Path
from typing import Any


class Mismatch(Exception):
    """The text is not of the type; the message says what would be (``"an integer"``)."""


def parse(text: str, hint: Any, current: Any) -> Any:
    """Read ``text`` as ``hint``, or as the type of the ``current`` value where the annotation says nothing."""
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return _parse_like(text, current)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return parse(text, arguments[0], current)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, arguments, current)
    if origin is typing.Literal:
        return _parse_literal(text, arguments)
    if origin in (tuple, list) or hint in (tuple, list):
        return _parse_sequence(text, arguments, current)
    if hint is None or hint is types.NoneType:
        return _parse_none(text)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _parse_enum(text, hint)
    if hint in _SCALARS:
        return _SCALARS[hint](text)
    return _parse_like(text, current)


def _parse_like(text: str, current: Any) -> Any:
    if isinstance(current, enum.Enum):
        return _parse_enum(text, type(current))
    if type(current) in _SCALARS:
        return _SCALARS[type(current)](text)
    if isinstance(current, tuple):
        return _parse_sequence(text, (), current)
    if is_dtype(current):
        return _parse_dtype(text)
    if current is None:
        return _parse_union(text, (type(None), bool, int, float, str), current)
    kind = getattr(current, "__qualname__", type(current).__name__)
    raise Mismatch(f"a value like {kind}, which cannot be written as text: change it in the experiment file")


def _parse_union(text: str, members: tuple[Any, ...], current: Any) -> Any:
    expected = []
    for member in sorted(members, key=_strictness):
        try:
            return parse(text, member, current if _plausible(current, member) else None)
        except Mismatch as mismatch:
            expected.append(str(mismatch))
    raise Mismatch(" or ".join(dict.fromkeys(expected)))


def _strictness(member: Any) -> int:
    """Text matches everything, so it is tried last; None, literals and flags first."""
    order = {type(None): 0, bool: 2, int: 3, float: 4, Path: 8, str: 9}
    if typing.get_origin(member) is typing.Literal:
        return 1
    return order.get(member, 6) if isinstance(member, type) else 6


def _plausible(current: Any, member: Any) -> bool:
    return isinstance(member, type) and isinstance(current, member)


def _parse_none(text: str) -> None:
    if text.strip().lower() not in ("none", "null"):
        raise Mismatch("None")


def _parse_bool(text: str) -> bool:
    choices = {"true": True, "false": False}
    if text.strip().lower() not in choices:
        raise Mismatch("true or false")
    return choices[text.strip().lower()]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)  # 1e6 is a count too
    except ValueError:
        number = math.nan
    if "e" not in text.lower() or not math.isfinite(number) or number != int(number):
        raise Mismatch("an integer")
    return int(number)


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise Mismatch("a number") from None
    if math.isnan(number) or (math.isinf(number) and "inf" not in text.lower()):
        raise Mismatch("a finite number")
    return number


def _parse_text(text: str) -> str:
    return text


def _parse_path(text: str) -> Path:
    return Path(text)


def _parse_literal(text: str, options: tuple[Any, ...]) -> Any:
    for option in options:
        if text == str(option):
            return option
    raise Mismatch("one of " + ", ".join(map(str, options)))


def _parse_enum(text: str, cls: type[enum.Enum]) -> enum.Enum:
    for member in cls:
        if text in (member.name, str(member.value)):
            return member
    raise Mismatch("one of " + ", ".join(member.name for member in cls))


def is_dtype(value: Any) -> bool:
    """Whether ``value`` names an array element type (``jnp.float32``, ``np.dtype("int8")``, ``np.float16``)."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    jax_scalar = type(getattr(sys.modules.get("jax.numpy"), "float32", None))
    numpy_scalar = isinstance(value, type) and issubclass(value, numpy.generic)
    return isinstance(value, numpy.dtype) or numpy_scalar or type(value) is jax_scalar is not type(None)


def dtype_named(name: str) -> Any:
    """The JAX scalar type of that name, or None."""
    import jax.numpy as jnp

    found = getattr(jnp, name if name != "bool" else "bool_", None)
    return found if found is not None and is_dtype(found) else None


def _parse_dtype(text: str) -> Any:
    found = dtype_named(text.strip())
    if found is None:
        raise Mismatch("a dtype such as float32 or bfloat16")
    return found


def _parse_sequence(text: str, hints: tuple[Any, ...], current: Any) -> tuple[Any, ...]:
    items = split_items(text)
    if hints == ((),):
        hints = ()
    like = current[0] if isinstance(current, tuple | list) and len(current) > 0 else None
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(items)
    elif len(hints) == 0:
        hints = (Any if like is None else type(like),) * len(items)
    if len(hints) != len(items):
        raise Mismatch(f"{len(hints)} values separated by commas")
    return tuple(parse(item, hint, like) for item, hint in zip(items, hints, strict=True))


def split_items(text: str) -> list[str]:
    """Split at the commas outside brackets; one pair of brackets around the whole is optional."""
    text = text.strip()
    if len(text) > 1 and text[0] + text[-1] in ("()", "[]"):
        text = text[1:-1]
    items, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return items + ([last] if last else [])


_SCALARS: dict[Any, Any] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    str: _parse_text,
    Path: _parse_path,
}
