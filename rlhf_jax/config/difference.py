"""What differs between two configurations, as (path, old, new) rows."""

from __future__ import annotations

from typing import Any

from rlhf_jax.config.description import describe

ABSENT = "(absent)"


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The leaves that differ between two values, by path; ``ABSENT`` stands for a leaf that one of them lacks."""
    return differences(describe(old), describe(new))


def differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The same for two descriptions (as in ``config.json``)."""
    before, after = flatten(old), flatten(new)
    paths = list(before) + [path for path in after if path not in before]
    rows = [(path, before.get(path, ABSENT), after.get(path, ABSENT)) for path in paths]
    return [row for row in rows if row[1] != row[2] or type(row[1]) is not type(row[2])]


def flatten(description: Any, prefix: str = "") -> dict[str, Any]:
    """Path -> scalar of a description; the elements of a list go by their name where each has one."""
    if isinstance(description, dict):
        pairs = list(description.items())
        if list(description) in (["dtype"], ["function"], ["path"], ["float"]):
            return {prefix: pairs[0][1]}
    elif isinstance(description, list):
        if not any(isinstance(element, dict | list) for element in description):
            return {prefix: tuple(description)}
        names = [element.get("name") if isinstance(element, dict) else None for element in description]
        unique = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
        pairs = list(zip(names if unique else map(str, range(len(names))), description, strict=True))
    else:
        return {prefix: description}
    rows: dict[str, Any] = {}
    for key, element in pairs:
        rows |= flatten(element, f"{prefix}.{key}" if prefix else str(key))
    return rows
