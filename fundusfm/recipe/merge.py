"""Stacking layers against the schema: later over earlier, sections merge, lists replace, misfits noted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from fundusfm.recipe.layers import KeyPath, Layer, Typed
from fundusfm.recipe.problems import Problem, nearest
from fundusfm.recipe.schema import ObjectiveConfig, Recipe
from fundusfm.recipe.types import is_section, item_config, keys_of, misfit


def dotted(path: KeyPath) -> str:
    """("data", "sources", 0, "weight") -> `data.sources[0].weight`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def leaf_keys(config: type, prefix: str = "") -> list[str]:
    """Every dotted key of a section, in the order of the schema."""
    keys = []
    for name, hint in keys_of(config).items():
        keys += leaf_keys(hint, f"{prefix}{name}.") if is_section(hint) else [f"{prefix}{name}"]
    return keys


@dataclass
class Stack:
    """The values so far (`tree`), where each came from (`origin`, by dotted key), and all `problems` met.

    `objective` holds the keys of the objective; None while its name is not known, then they go unchecked.
    """

    objective: type[ObjectiveConfig] | None
    tree: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def lay(self, layer: Layer) -> None:
        """Put a layer on top."""
        self._section(Recipe, self.tree, layer.tree, (), layer)

    def _section(self, config: type, into: dict[str, Any], given: Any, path: KeyPath, layer: Layer) -> None:
        hints = keys_of(config)
        if not isinstance(given, dict):
            self._note(path, f"is a section with the keys {', '.join(hints)}", layer)
            return
        for key, value in given.items():
            here = (*path, key)
            if key in hints:
                self._value(hints[key], into, key, value, here, layer)
            elif config is not ObjectiveConfig or self.objective:
                self._note(here, "there is no such key" + nearest(str(key), hints, leaf_keys(Recipe)), layer)

    def _value(
        self, hint: Any, into: dict[str, Any], key: str, value: Any, path: KeyPath, layer: Layer
    ) -> None:
        if hint is ObjectiveConfig:
            hint = self.objective or ObjectiveConfig
        item = item_config(hint)
        if is_section(hint):
            self._section(hint, into.setdefault(key, {}), value, path, layer)
        elif item is not None:
            self._items(item, into, key, value, path, layer)
        elif get_origin(hint) is dict and isinstance(value, dict):
            self._mapping(get_args(hint)[1], into.setdefault(key, {}), value, path, layer)
        else:
            self._leaf(hint, into, key, value, path, layer)

    def _items(
        self, item: type, into: dict[str, Any], key: str, value: Any, path: KeyPath, layer: Layer
    ) -> None:
        """A list of sections: a list replaces it, a mapping of numbers to sections changes those items."""
        given = value.value if isinstance(value, Typed) else value
        if isinstance(given, list):
            into[key] = [{} for _ in given]
            self._forget(path)
            if not given:
                self.origin[dotted(path)] = layer.where(path)
            given = dict(enumerate(given))
        if not isinstance(given, dict):
            self._note(path, f"is a list of sections with the keys {', '.join(keys_of(item))}", layer)
            return
        items = into.get(key, [])
        for number, section in given.items():
            if number in range(len(items)):
                self._section(item, items[number], section, (*path, number), layer)
            else:
                self._note((*path, number), f"there are {len(items)} items, counted from 0", layer)

    def _mapping(self, hint: Any, into: dict[str, Any], given: Any, path: KeyPath, layer: Layer) -> None:
        """A mapping with free keys; one inside of it merges like one of the schema."""
        if not given:
            self.origin[dotted(path)] = layer.where(path)
        for name, value in given.items():
            if isinstance(value, dict) and isinstance(name, str) and hint is Any:
                below = into.get(name)
                into[name] = below if isinstance(below, dict) else {}
                self._mapping(hint, into[name], value, (*path, name), layer)
            elif is_section(hint) and isinstance(name, str):
                self._section(hint, into.setdefault(name, {}), value, (*path, name), layer)
            else:
                self._leaf(hint, into, name, value, (*path, name), layer)

    def _leaf(
        self, hint: Any, into: dict[str, Any], key: Any, value: Any, path: KeyPath, layer: Layer
    ) -> None:
        if isinstance(value, Typed):
            takes_text = (
                not isinstance(value.value, str) and misfit(value.value, hint) and not misfit("", hint)
            )
            value = value.text if takes_text else value.value
        if not isinstance(key, str):
            self._note(path, f"the key {key!r} is not text; put it in quotes", layer)
            return
        if asked := misfit(value, hint):
            self._note(path, f"{value!r} is not {asked}", layer)
            return
        into[key] = value
        self._forget(path)
        self.origin[dotted(path)] = layer.where(path)

    def _note(self, path: KeyPath, text: str, layer: Layer) -> None:
        self.problems.append(Problem(dotted(path), text, layer.where(path)))

    def _forget(self, path: KeyPath) -> None:
        """Drop the origins of what a new value replaces."""
        name = dotted(path)
        for key in [k for k in self.origin if k.startswith((f"{name}.", f"{name}["))]:
            del self.origin[key]
