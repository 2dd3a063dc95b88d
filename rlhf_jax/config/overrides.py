"""Change a frozen value by dotted paths: ``{"stages.ppo.algorithm.kl_coef": "0.1"}``.

All assignments of one object are applied by one construction, so a change of two fields that only fit together
(``heads`` and ``d_model``) is one step.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.config.parsing import Mismatch, parse
from rlhf_jax.config.paths import children, element_names, field_hints, is_linen, is_node, leaves, nearest
from rlhf_jax.errors import USAGE, UserError


def parse_assignments(words: Iterable[str]) -> dict[str, str]:
    """Read ``path=value`` words of a command line."""
    assignments: dict[str, str] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path.strip():
            raise UserError(f"cannot read the override {word!r}", expected="path=value, such as train.lr=1e-4")
        if path.strip() in assignments:
            raise UserError(f"{path.strip()!r} is set twice", fix="keep one of the two")
        assignments[path.strip()] = text
    return assignments


def override(value: Any, assignments: Mapping[str, Any]) -> Any:
    """A copy of ``value`` with each path set.

    Texts are read by the field's annotation and current value; anything else is taken as it is (a sweep may set
    whole objects).

    Raises:
        UserError: for an unknown path (naming the nearest), or a value of the wrong type or outside its range.
    """
    change = _Change(value)
    return change.apply(value, [(path.split("."), path, new) for path, new in assignments.items()], "", Any)


_Pending = list[tuple[list[str], str, Any]]  # (what is left of the path, the whole path, the new value)


@dataclasses.dataclass(frozen=True)
class _Change:
    root: Any

    def apply(self, value: Any, pending: _Pending, at: str, hint: Any) -> Any:
        """``value`` with the pending assignments below it done."""
        whole = [item for item in pending if not item[0]]
        if whole:
            if len(pending) > 1:
                raise UserError(f"{at!r} is set as a whole and in its parts", fix="keep one of the two")
            return _converted(whole[0][2], hint, value, at)
        if not pending:
            return value
        if is_node(value):
            return self._apply_fields(value, pending, at)
        if isinstance(value, Mapping):
            return self._apply_items(value, pending, at, hint)
        if isinstance(value, tuple | list):
            return self._apply_elements(value, pending, at, hint)
        raise self._unknown(pending[0][1], f"{at!r} is {value!r} and has no fields")

    def _apply_fields(self, value: Any, pending: _Pending, at: str) -> Any:
        hints, names = field_hints(type(value)), [name for name, _ in children(value) or []]
        updates = {}
        for name, below in self._grouped(pending, names, at).items():
            updates[name] = self.apply(getattr(value, name), below, _join(at, name), hints.get(name, Any))
        try:
            return value.clone(**updates) if is_linen(value) else dataclasses.replace(value, **updates)
        except (ValueError, TypeError) as error:
            changed = ", ".join(_join(at, name) for name in updates)
            raise UserError(str(error), at=changed, exit_code=getattr(error, "exit_code", USAGE)) from error

    def _apply_items(self, value: Mapping[Any, Any], pending: _Pending, at: str, hint: Any) -> dict[Any, Any]:
        keys = {str(key): key for key in value}
        arguments = typing.get_args(hint)
        element_hint = arguments[1] if len(arguments) == 2 else Any
        changed = dict(value)
        for name, below in self._grouped(pending, list(keys), at).items():
            changed[keys[name]] = self.apply(value[keys[name]], below, _join(at, name), element_hint)
        return changed

    def _apply_elements(self, value: Any, pending: _Pending, at: str, hint: Any) -> Any:
        indices = {str(index): index for index in range(len(value))}
        names = element_names(value)
        indices |= {name: index for index, name in enumerate(names or [])}
        arguments = typing.get_args(hint)
        changed = list(value)
        below_index: dict[int, _Pending] = {}
        for name, below in self._grouped(pending, list(indices), at).items():
            below_index.setdefault(indices[name], []).extend(below)
        for index, below in below_index.items():
            one = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else Any
            element_hint = arguments[index] if len(arguments) == len(value) else one
            place = _join(at, names[index] if names else str(index))
            changed[index] = self.apply(value[index], below, place, Any if element_hint is Ellipsis else element_hint)
        return tuple(changed) if isinstance(value, tuple) else changed

    def _grouped(self, pending: _Pending, names: list[str], at: str) -> dict[str, _Pending]:
        """The pending assignments by the child that they go to; a dictionary's keys may hold dots themselves."""
        groups: dict[str, _Pending] = {}
        for parts, path, new in pending:
            fits = [count for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in names]
            if not fits:
                raise self._unknown(path, f"there is no {parts[0]!r} {'in ' + repr(at) if at else 'at the top'}")
            groups.setdefault(".".join(parts[: fits[0]]), []).append((parts[fits[0] :], path, new))
        return groups

    def _unknown(self, path: str, why: str) -> UserError:
        known = list(leaves(self.root))
        close = nearest(path, known)
        fix = f"did you mean {' or '.join(close)}?" if close else "rlhf-jax show FILE lists every path"
        return UserError(f"unknown field {path!r} ({why})", fix=fix)


def _converted(new: Any, hint: Any, current: Any, at: str) -> Any:
    """The new value in the field's type; ``at`` is named when it does not fit."""
    if not isinstance(new, str):
        return _checked_number(new, hint, current, at)
    try:
        return parse(new, hint, current)
    except Mismatch as mismatch:
        if is_node(current):
            fields = ", ".join(_join(at, name) for name, _ in children(current) or [])
            raise UserError(f"got {new!r}", at=at, expected=str(mismatch), fix=f"or set one of {fields}") from None
        raise UserError(f"got {new!r}", at=at, expected=str(mismatch)) from None


def _checked_number(new: Any, hint: Any, current: Any, at: str) -> Any:
    """Take an object as it is, but keep numbers in the field's own kind."""
    if isinstance(new, float) and math.isnan(new):
        raise UserError("got nan", at=at, expected="a finite number")
    kind = hint if hint in (bool, int, float) else type(current) if hint is Any else None
    if kind is float and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    if kind in (bool, int, float) and new is not None and type(new) is not kind:
        raise UserError(f"got {new!r}", at=at, expected=f"a value of type {kind.__name__}")
    return new


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
