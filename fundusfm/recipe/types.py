"""Does a YAML value fit a type of the schema? Stricter than OmegaConf, to which `no` is the text "False"."""

from __future__ import annotations

import functools
import types
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

MISSING = "???"


@functools.cache
def keys_of(config: type) -> dict[str, Any]:
    """The keys of a section and their types."""
    return get_type_hints(config)


def is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


def item_config(hint: Any) -> type | None:
    """The section type of a list of sections, None for anything else."""
    (item,) = get_args(hint) if get_origin(hint) is list else (None,)
    return item if is_section(item) else None


def is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def misfit(value: Any, hint: Any) -> str:
    """What `hint` asks for in plain words if `value` is something else; empty if it fits.

    An interpolation or `???` fits everything here: what it becomes is checked later.
    """
    return "" if value == MISSING or is_interpolation(value) or _fits(value, hint) else describe(hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        fixed = isinstance(value, list) and len(value) == len(arguments)
        return fixed and all(_fits(item, one) for item, one in zip(value, arguments, strict=True))
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, arguments[1]) for k, v in value.items()
        )
    return _fits_scalar(value, hint)


def _fits_scalar(value: Any, hint: type) -> bool:
    if issubclass(hint, Enum):
        return value in [member.name for member in hint]
    if isinstance(value, bool):  # a bool is an int to Python, not to a reader
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text (in quotes if it looks like a number or yes/no)",
    bool: "true or false",
    type(None): "null",
}


def describe(hint: Any) -> str:
    """A type in words: `a whole number or null`, `a list of 2: a number, a number`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in arguments)
    if origin is list:
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(describe(one) for one in arguments)}"
    if origin is dict:
        return f"a mapping, each value {describe(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    return _WORDS.get(hint, "any value")
