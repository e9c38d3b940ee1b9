"""From recipe files and overrides to one typed `Recipe`, or one error that lists everything wrong with them.

`extends` is relative to the file that says it; paths of data, tokenizers and weights are relative to the
working directory. Nothing here opens data or asks for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fundusfm.errors import UserError
from fundusfm.recipe.check import find_impossible
from fundusfm.recipe.layers import KeyPath, Layer, command_line_layer, file_layers, parse_layer
from fundusfm.recipe.merge import Stack, dotted
from fundusfm.recipe.problems import Problem, refusal
from fundusfm.recipe.schema import ObjectiveConfig, Recipe
from fundusfm.recipe.types import MISSING
from fundusfm.recipe.values import flatten

ConfigOf = Callable[[str], type[ObjectiveConfig]]


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and where each value came from.

    `origin`: dotted key -> `default`, `file:line` or `command line`.
    """

    recipe: Recipe
    origin: dict[str, str]

    def to_yaml(self) -> str:
        """The whole recipe as YAML that loads to an equal recipe."""
        return recipe_to_yaml(self.recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """Every key of a recipe as YAML; `recipe_from_yaml_text` gives an equal recipe back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def load_recipe(path: Path, overrides: Sequence[str] = (), *, objective_config: ConfigOf) -> ResolvedRecipe:
    """The recipe of a file, what it extends, and dotted overrides `a.b=value` on top.

    `objective_config` gives the keys of an objective by its name, UserError if there is none. Raises one
    UserError that lists every unknown key, misfit, missing value and impossible combination.
    """
    layers = file_layers(path)
    on_top, problems = command_line_layer(overrides)
    return _resolve([*layers, on_top], problems, str(path), objective_config)


def recipe_from_yaml_text(text: str, *, objective_config: ConfigOf, where: str = "saved recipe") -> Recipe:
    """The recipe of a run folder or checkpoint; `where` names it in errors."""
    return _resolve([parse_layer(text, where)], [], where, objective_config).recipe


def _resolve(
    layers: list[Layer], problems: list[Problem], where: str, objective_config: ConfigOf
) -> ResolvedRecipe:
    config, layers, name_problems = _objective_of(layers, objective_config)
    stack = Stack(config, problems=[*problems, *name_problems])
    for layer in layers:
        stack.lay(layer)
    merged = _merged(stack)
    problems = stack.problems + _unset(OmegaConf.to_container(merged)) + _unresolved(stack.origin, merged)
    problems += find_impossible(merged, {problem.key for problem in problems})
    if problems:
        raise refusal([_placed(problem, stack.origin) for problem in problems], where)
    recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, Recipe)
    return ResolvedRecipe(recipe, {key: stack.origin.get(key, "default") for key in flatten(recipe)})


def _objective_of(
    layers: list[Layer], objective_config: ConfigOf
) -> tuple[type[ObjectiveConfig] | None, list[Layer], list[Problem]]:
    """The keys of the objective that is finally named, and the layers without keys meant for another one.

    So one line, `objective.name`, swaps the objective of an extended recipe.
    """
    names: list[str] = []
    name, where = ObjectiveConfig().name, ""
    for layer in layers:
        section = layer.tree.get("objective")
        given = section.get("name", name) if isinstance(section, dict) else name
        given = getattr(given, "value", given)
        if isinstance(given, str) and given != name:
            name, where = given, layer.where(("objective", "name"))
        names.append(name)
    kept = [layer if n == name else _shared_keys_only(layer) for layer, n in zip(layers, names, strict=True)]
    try:
        return objective_config(name), kept, []
    except UserError as error:
        return None, kept, [Problem("objective.name", f"{error.what}; {error.fix}".rstrip("; "), where)]


def _shared_keys_only(layer: Layer) -> Layer:
    section = layer.tree.get("objective")
    if not isinstance(section, dict):
        return layer
    shared = {field.name for field in fields(ObjectiveConfig)}
    kept = {key: value for key, value in section.items() if key in shared}
    return Layer(layer.name, {**layer.tree, "objective": kept}, layer.root)


def _merged(stack: Stack) -> DictConfig:
    """The values over the schema's defaults: here lists become tuples, names enums, whole numbers floats."""
    schema = OmegaConf.structured(Recipe)
    schema.objective = OmegaConf.structured(stack.objective or ObjectiveConfig)
    merged = OmegaConf.merge(schema, stack.tree)
    assert isinstance(merged, DictConfig)
    return merged


def _unset(value: Any, path: KeyPath = ()) -> list[Problem]:
    """The keys that still hold `???`, of plain nested values."""
    if value == MISSING:
        return [Problem(dotted(path), "must be given")]
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [problem for key, one in children for problem in _unset(one, (*path, key))]


def _unresolved(keys: Iterable[str], merged: DictConfig) -> list[Problem]:
    """Interpolations (`${...}`) that lead nowhere or to a value of a wrong type."""
    return [Problem(key, excuse) for key in keys if (excuse := _resolution_error(key, merged))]


def _resolution_error(key: str, merged: DictConfig) -> str:
    try:
        value = OmegaConf.select(merged, key)
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        return str(error).splitlines()[0]
    return ""


def _placed(problem: Problem, origin: dict[str, str]) -> Problem:
    """The problem with the place where its key was written, if anything wrote it."""
    return problem if problem.where else replace(problem, where=origin.get(problem.key, ""))
