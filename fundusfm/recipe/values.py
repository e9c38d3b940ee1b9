"""A recipe as a flat list of keys: for showing it and for comparing two."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from fundusfm.recipe.schema import Recipe


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf, in the order of the schema; sections in a list count from 0."""
    children: dict[str, Any] = {}
    if is_dataclass(value):
        children = {f"{key}.{field.name}".lstrip("."): getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, dict):
        children = {f"{key}.{name}": one for name, one in value.items()}
    elif isinstance(value, list) and value and all(is_dataclass(item) for item in value):
        children = {f"{key}[{number}]": item for number, item in enumerate(value)}
    if not children:
        return {key: value}
    return {name: leaf for child, one in children.items() for name, leaf in flatten(one, child).items()}


def diff_recipes(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """The keys in which two recipes differ, with both values; None where one of them has no such key."""
    flat_a, flat_b = flatten(a), flatten(b)
    pairs = [(key, flat_a.get(key), flat_b.get(key)) for key in in_one_order([*flat_a], [*flat_b])]
    return [pair for pair in pairs if pair[1] != pair[2] or (pair[0] in flat_a) != (pair[0] in flat_b)]


def in_one_order(a: list[str], b: list[str]) -> list[str]:
    """All keys of both: those of `b` alone come after the key that they follow there."""
    keys, known, place = list(a), set(a), 0
    for key in b:
        if key in known:
            place = keys.index(key) + 1
        else:
            keys.insert(place, key)
            place += 1
    return keys
