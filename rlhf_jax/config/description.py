"""Write a configuration as JSON, and read such JSON back without executing anything that it names.

An object becomes ``{"class": "module:Name", field: ...}``, a function ``{"function": "module:name"}``, a dtype
``{"dtype": "bfloat16"}``, an enum member ``{"enum": "module:Name", "member": ...}``; tuples become lists and read back
as tuples. What an experiment file defines itself is filed under the module name ``experiment``, wherever the file lies.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_jax.config.loading import MODULE_PREFIX, ConfigFile
from rlhf_jax.config.parsing import dtype_named, is_dtype
from rlhf_jax.config.paths import field_hints, field_names, is_node
from rlhf_jax.errors import BAD_DATA, REFUSED, UserError

EXPERIMENT = "experiment"
PACKAGE = __name__.partition(".")[0]
_TAGS = frozenset({"class", "function", "dtype", "enum", "path", "float", "items"})
_FUNCTION_HOMES = ("jax.nn", "jax.numpy", "jax.lax", "flax.linen")


def describe(value: Any, at: str = "") -> Any:
    """The JSON form of ``value``; two values describe equally exactly if they configure the same.

    Raises:
        UserError: for what has no lasting name or no exact text (lambdas, arrays, nan).
    """
    if value is None or isinstance(value, bool | int | str) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, float):
        return _describe_float(value, at)
    if is_node(value):
        return {"class": _class_name(type(value))} | _describe_fields(value, at)
    if isinstance(value, enum.Enum):
        return {"enum": _class_name(type(value)), "member": value.name}
    if isinstance(value, Mapping):
        return _describe_mapping(value, at)
    if isinstance(value, tuple | list):
        return [describe(element, f"{at}.{index}") for index, element in enumerate(value)]
    if isinstance(value, Path):
        return {"path": str(value)}
    if is_dtype(value):
        return {"dtype": sys.modules["numpy"].dtype(value).name}
    if callable(value) and hasattr(value, "__qualname__") and not isinstance(value, type):
        return {"function": _function_name(value, at)}
    kind = type(value).__qualname__
    raise UserError(
        f"a value of type {kind} cannot be written to config.json",
        at=at.lstrip("."),
        expected="dataclasses, Linen modules, tuples, dictionaries, numbers, texts, dtypes, named functions",
    )


def _describe_fields(value: Any, at: str) -> dict[str, Any]:
    hints = field_hints(type(value))
    described = {}
    for name in field_names(value):
        field = getattr(value, name)
        if hints.get(name) is float and type(field) is int:
            field = float(field)  # 1 and 1.0 configure the same
        described[name] = describe(field, f"{at}.{name}")
    return described


def _describe_float(value: float, at: str) -> Any:
    if math.isnan(value):
        raise UserError("got nan", at=at.lstrip("."), expected="a number")
    return value if math.isfinite(value) else {"float": str(value)}


def _describe_mapping(value: Mapping[Any, Any], at: str) -> dict[str, Any]:
    plain = all(isinstance(key, str) for key in value) and not _TAGS.intersection(value)
    if plain:
        return {key: describe(element, f"{at}.{key}") for key, element in value.items()}
    return {"items": [[describe(key, at), describe(element, f"{at}.{key}")] for key, element in value.items()]}


def _class_name(cls: type) -> str:
    return f"{_module_name(cls.__module__)}:{cls.__qualname__}"


def _module_name(module: str) -> str:
    return EXPERIMENT if module.startswith(MODULE_PREFIX) else module


def _function_name(function: Any, at: str) -> str:
    name = function.__qualname__
    for home in _FUNCTION_HOMES:  # jax.nn.gelu says that it lives in jax._src
        if getattr(sys.modules.get(home), name, None) is function:
            return f"{home}:{name}"
    if "<" in name:
        fix = "define it with def at the top level of a file"
        raise UserError(f"the function {name} has no lasting name", at=at.lstrip("."), fix=fix)
    return f"{_module_name(function.__module__)}:{name}"


def names(value: Any) -> dict[str, Any]:
    """The classes and functions in ``value`` by the names that ``describe`` gives them."""
    if is_node(value):
        found = {_class_name(type(value)): type(value)}
        for name in field_names(value):
            found |= names(getattr(value, name))
        return found
    if isinstance(value, enum.Enum):
        return {_class_name(type(value)): type(value)}
    if isinstance(value, Mapping):
        return names((*value.keys(), *value.values()))
    if isinstance(value, tuple | list):
        return {name: named for element in value for name, named in names(element).items()}
    if callable(value) and hasattr(value, "__qualname__") and not isinstance(value, type) and not is_dtype(value):
        return {_function_name(value, ""): value}
    return {}


def names_in(file: ConfigFile) -> dict[str, Any]:
    """The classes and functions that an experiment file defines, by the names that ``describe`` gives them."""
    return {
        f"{EXPERIMENT}:{name}": named
        for name, named in vars(file.module).items()
        if callable(named) and _module_name(str(getattr(named, "__module__", ""))) == EXPERIMENT
    }


def revive(description: Any, known: Mapping[str, Any] | None = None, at: str = "") -> Any:
    """The value that ``description`` describes, built of this package's own classes and those of ``known`` alone.

    Args:
        description: what ``describe`` returned, possibly by way of a file that somebody else wrote.
        known: the user's own classes and functions by name: ``names`` of a value that the user made, or ``names_in``
            an experiment file that the user named.

    Raises:
        UserError: for a class or function from anywhere else, or fields that the class does not have.
    """
    if isinstance(description, list):
        return tuple(revive(element, known, f"{at}.{index}") for index, element in enumerate(description))
    if not isinstance(description, dict):
        return description
    tag = "class" if "class" in description else next(iter(_TAGS.intersection(description)), None)
    body = {key: element for key, element in description.items() if key != tag}
    if tag is None:
        return {key: revive(element, known, f"{at}.{key}") for key, element in description.items()}
    if tag == "items":
        return {revive(key, known, at): revive(element, known, at) for key, element in description[tag]}
    if tag == "path":
        return Path(description[tag])
    if tag == "float":
        return float(description[tag])
    if tag == "dtype":
        return _revive_dtype(description[tag], at)
    if tag == "function":
        return _named(description[tag], known, at, functions=True)
    cls = _named(description[tag], known, at)
    if tag == "enum" and isinstance(cls, type) and issubclass(cls, enum.Enum):
        return _revive_member(cls, description.get("member"), at)
    if tag != "class" or not isinstance(cls, type) or not hasattr(cls, "__dataclass_fields__"):
        raise _unreadable(at, f"{description[tag]!r} is not a class of configurations")
    return _build(cls, {name: revive(field, known, f"{at}.{name}") for name, field in body.items()}, at)


def _build(cls: type, fields: dict[str, Any], at: str) -> Any:
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise _unreadable(at, f"{cls.__qualname__} does not accept its fields: {error}") from error


def _revive_member(cls: type[enum.Enum], member: Any, at: str) -> enum.Enum:
    if member not in cls.__members__:
        raise _unreadable(at, f"{member!r} is not a {cls.__qualname__}")
    return cls[member]


def _revive_dtype(name: Any, at: str) -> Any:
    found = dtype_named(str(name))
    if found is None:
        raise _unreadable(at, f"there is no dtype {name!r}")
    return found


def _named(name: Any, known: Mapping[str, Any] | None, at: str, functions: bool = False) -> Any:
    if known is not None and name in known:
        return known[name]
    module_name, _, qualname = str(name).partition(":")
    found: Any = _trusted_module(module_name, at, functions)
    outside = module_name in _FUNCTION_HOMES
    for part in qualname.split("."):
        inside = isinstance(found, type | ModuleType) and not part.startswith("__")
        found = vars(found).get(part) if inside else None
        if isinstance(found, ModuleType):  # what a module imports is not its own
            found = None
    home = _module_name(str(getattr(found, "__module__", None)))
    if not callable(found) or (home != module_name and not outside):
        raise _unreadable(at, f"there is no {name!r} in this version")
    return found


def _trusted_module(name: str, at: str, functions: bool) -> ModuleType:
    if name == EXPERIMENT:
        raise UserError(
            "the configuration uses a class of its own experiment file",
            at=at.lstrip("."),
            fix="name that file again (--experiment FILE); the copy in the run directory is never imported",
            exit_code=REFUSED,
        )
    if name.split(".")[0] != PACKAGE and not (functions and name in _FUNCTION_HOMES):
        raise UserError(
            f"refusing to load {name!r}",
            at=at.lstrip("."),
            expected=f"classes of {PACKAGE}",
            fix="define the class in the experiment file and name that file again",
            exit_code=REFUSED,
        )
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _unreadable(at, f"there is no module {name!r} in this version") from error


def _unreadable(at: str, why: str) -> UserError:
    fix = "use the version of the package that wrote it, or run the experiment file anew"
    return UserError(why, at=at.lstrip("."), fix=fix, exit_code=BAD_DATA)


def fingerprint(description: Any, without: tuple[str, ...] = ()) -> str:
    """The sha256 of the canonical JSON text, leaving out the named top-level fields (``("seed",)``)."""
    if isinstance(description, dict):
        description = {key: element for key, element in description.items() if key not in without}
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
