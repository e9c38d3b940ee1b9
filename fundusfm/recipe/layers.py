"""The layers of a recipe: the files it extends, itself, the command line; each remembers its lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fundusfm.errors import UserError
from fundusfm.recipe.problems import Problem

COMMAND_LINE = "command line"
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Typed:
    """A value of the command line: as YAML reads it, and as it was typed (`name=007`)."""

    value: Any
    text: str


@dataclass(frozen=True)
class Layer:
    """Values to lay over those before. `name`: a file or `command line`; `root`: its YAML with the lines."""

    name: str
    tree: dict[Any, Any]
    root: yaml.Node | None = field(default=None, repr=False, compare=False)

    def where(self, path: KeyPath) -> str:
        """`recipes/x.yaml:12` of the key at `path`, or of its nearest parent that has a line of its own."""
        node, line = self.root, None
        for key in path:
            node, line = _child(node, key, line)
            if node is None:
                break
        return self.name if line is None else f"{self.name}:{line}"


def _child(node: yaml.Node | None, key: str | int, line: int | None) -> tuple[yaml.Node | None, int | None]:
    """The node under `key` and the line (from 1) of that key; (None, `line`) where there is none."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return value, name.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        item: yaml.Node = node.value[key]
        return item, item.start_mark.line + 1
    return None, line


def file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a recipe file, bases first. `above` holds the files that led here.

    UserError if one cannot be read or they extend each other in a circle.
    """
    if path.resolve() in [p.resolve() for p in above]:
        circle = " -> ".join(str(p) for p in (*above, path))
        raise UserError("recipes extend each other in a circle", where=circle, fix="remove one `extends`")
    layer = parse_layer(_read(path, above), str(path))
    bases = layer.tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        fix = "for example `extends: base.yaml`"
        raise UserError(
            "extends takes a file name or a list of them", where=layer.where(("extends",)), fix=fix
        )
    below = [one for base in bases for one in file_layers(path.parent / base, (*above, path))]
    return [*_once(below), layer]


def _once(layers: Sequence[Layer]) -> list[Layer]:
    """Each file at its first place: a base of two bases would else take back what the first one has set."""
    found: dict[Path, Layer] = {}
    for layer in layers:
        found.setdefault(Path(layer.name).resolve(), layer)
    return list(found.values())


def _read(path: Path, above: tuple[Path, ...]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("the recipe is not UTF-8 text", where=str(path), fix="save it as UTF-8") from error
    except OSError as error:
        extended = f" (extended by {above[-1]})" if above else ""
        fix = "`extends` is relative to the file that says it" if above else "give the path of a recipe file"
        raise UserError(
            f"the recipe cannot be read: {error.strerror}", where=f"{path}{extended}", fix=fix
        ) from error


def parse_layer(text: str, name: str) -> Layer:
    """A layer from YAML text; UserError with the line where it is no YAML or no mapping of keys."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return Layer(name, {})
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                "the recipe is no mapping of keys to values", where=name, fix="write `key: value` lines"
            )
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise UserError(
            f"the recipe is not valid YAML: {what}", where=where, fix="correct that line"
        ) from error
    assert isinstance(tree, dict)
    return Layer(name, tree, root)


def command_line_layer(overrides: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """The layer of dotted overrides (`optim.lr=1e-4`, `data.sources[0].weight=2`); a later one wins."""
    tree: dict[Any, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = _key_path(key.strip())
        if not equals or not path:
            problems.append(Problem(override, "an override is written key=value", COMMAND_LINE))
            continue
        try:
            if not _put(tree, path, _typed(text)):
                whole = "an override before gives a part of it as a whole; say both in one"
                problems.append(Problem(key, whole, COMMAND_LINE))
        except (yaml.YAMLError, OmegaConfBaseException, RecursionError):
            problems.append(Problem(key, f"{text!r} is not valid YAML; quote it", COMMAND_LINE))
    return Layer(COMMAND_LINE, tree), problems


def _key_path(key: str) -> KeyPath:
    """`data.sources[0].weight` -> ("data", "sources", 0, "weight")."""
    words = key.replace("[", ".").replace("]", "").split(".")
    return tuple(int(word) if word.isdecimal() else word for word in words) if all(words) else ()


def _typed(text: str) -> Any:
    """A mapping as it is, anything else with the text it was read from."""
    holder = OmegaConf.from_dotlist([f"value={text}"])
    value = OmegaConf.to_container(holder, resolve=False)["value"]  # type: ignore[index, call-overload]
    return value if isinstance(value, dict) else Typed(value, text)


def _put(tree: dict[Any, Any], path: KeyPath, value: Any) -> bool:
    """Set a value in the tree; False where a list or scalar, which cannot be reached into, is in the way."""
    for key in path[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            return False
        tree = below
    tree[path[-1]] = value
    return True
