"""Walk through a configuration: which fields a value has, and the dotted path of each leaf."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

_LINEN_FIELDS = frozenset({"parent", "name"})


def is_linen(value: Any) -> bool:
    """Whether ``value`` is a Linen module (without importing Flax: a module can only exist once Flax is loaded)."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(value, linen.Module)


def is_node(value: Any) -> bool:
    """Whether ``value`` is an instance with named fields."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def field_names(value: Any) -> list[str]:
    """The fields that a user sets: those of the constructor, less what Linen adds to every module."""
    hidden = _LINEN_FIELDS if is_linen(value) else frozenset()
    return [field.name for field in dataclasses.fields(value) if field.init and field.name not in hidden]


def field_hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass, with ``Any`` for each one whose names cannot be resolved."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # one unresolvable name fails the whole class; the others are still worth having
        return {field.name: _resolve(cls, field) for field in dataclasses.fields(cls)}


def _resolve(cls: type, field: dataclasses.Field) -> Any:
    for owner in cls.__mro__:
        if field.name in vars(owner).get("__annotations__", {}):
            probe = type("probe", (), {"__annotations__": {field.name: field.type}, "__module__": owner.__module__})
            try:
                return typing.get_type_hints(probe)[field.name]
            except Exception:  # for example a name imported under TYPE_CHECKING
                return Any
    return Any


def element_names(sequence: Iterable[Any]) -> list[str] | None:
    """The names of a sequence's elements, if each has its own: ``stages.ppo`` reads better than ``stages.3``."""
    names = [getattr(element, "name", None) for element in sequence if not is_linen(element)]
    named = len(names) > 0 and all(isinstance(name, str) and name != "" and "." not in name for name in names)
    complete = named and len(set(names)) == len(names) == len(list(sequence))
    return typing.cast(list[str], names) if complete else None


def children(value: Any) -> list[tuple[str, Any]] | None:
    """The (path component, value) pairs one level below, or None for a leaf."""
    if is_node(value):
        return [(name, getattr(value, name)) for name in field_names(value)]
    if isinstance(value, Mapping):
        return [(str(key), element) for key, element in value.items()]
    if isinstance(value, tuple | list):
        names = element_names(value)
        if names is None and all(children(element) is None for element in value):
            return None  # a tuple of scalars is set as a whole
        return list(zip(names or map(str, range(len(value))), value, strict=True))
    return None


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted path that ends in a scalar, a tuple of scalars, or another indivisible value."""
    below = children(value)
    if below is None:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, child in below:
        found |= leaves(child, f"{prefix}.{name}" if prefix else name)
    return found


def nearest(path: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates that ``path`` was most probably meant to be, best first."""
    scored = sorted((-_likeness(path, candidate), candidate) for candidate in candidates)
    return [candidate for score, candidate in scored[:count] if score < -0.5]


def _likeness(path: str, candidate: str) -> float:
    """Similarity in [0, 1]: of the whole paths, or of the last parts, where an abbreviation (lr) counts as equal."""
    head, _, tail = path.rpartition(".")
    other_head, _, other_tail = candidate.rpartition(".")
    whole = difflib.SequenceMatcher(None, path, candidate).ratio()
    heads = difflib.SequenceMatcher(None, head, other_head).ratio() if head and other_head else 0.0
    tails = difflib.SequenceMatcher(None, tail, other_tail).ratio()
    if _abbreviates(tail, other_tail) or _abbreviates(other_tail, tail):
        tails = 0.95
    if set(tail.split("_")) > set(other_tail.split("_")) or set(tail.split("_")) < set(other_tail.split("_")):
        tails = max(tails, 0.9)  # n_heads is heads
    if tail == other_tail:
        tails = 1.0
    return max(whole, 0.35 * heads + 0.65 * tails)


def _abbreviates(short: str, long: str) -> bool:
    return 1 < len(short) and short == "".join(word[:1] for word in long.split("_"))
