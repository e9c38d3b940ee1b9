"""Several objectives in one run over shared towers; the loss is the weighted sum of theirs.

    objective:
      name: composite
      parts:
        ret_clip: {temperature_init: 14.3}    # keys of that objective, checked like its own recipe's
        mae: {}
      weights: {mae: 0.5}                     # of the sum of a part's terms; 1 where nothing is said

Each part is the objective itself, built from the same recipe, and keeps its heads, its terms and its view.
Parts share the trunk of their image towers, and that of their text towers: the recipe describes one of each.
The first part brings it, with its start values and its frozen tables.
`fidelity` and `negatives` hold for all parts. Evaluation asks the first part that can answer.

Every exam of a batch is an item of each part: exams that one of the parts cannot use are not read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from omegaconf import OmegaConf
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.objectives.base import Eye, Objective
from fundusfm.objectives.cached import Features
from fundusfm.recipe.problems import nearest
from fundusfm.recipe.schema import ObjectiveConfig, Recipe
from fundusfm.recipe.types import keys_of, misfit
from fundusfm.stream.view_composite import CompositeBatch

_SHARED_KEYS = tuple(one.name for one in fields(ObjectiveConfig))
_TOWERS = ("vision", "text")


@dataclass
class CompositeConfig(ObjectiveConfig):
    """`parts`: objective -> its own keys; `weights`: objective -> weight of its terms in the sum."""

    parts: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def reads_text(self) -> bool:
        return any(config.reads_text for config in self.configs().values())

    @property
    def has_expert_set(self) -> bool:
        return any(config.has_expert_set for config in self.configs().values())

    def configs(self) -> dict[str, ObjectiveConfig]:
        """The typed keys of each part in which nothing is wrong."""
        return {name: self._config(name) for name in self.parts if not self._misfits(name)}

    def weight(self, name: str) -> float:
        """The weight of a part."""
        return self.weights.get(name, 1.0)

    def view_options(self) -> dict[str, Any]:
        return {name: (_class_of(name).view, config) for name, config in self.configs().items()}

    def num_contrasted(self, of_rank: int, num_ranks: int) -> int | None:
        counts = [config.num_contrasted(of_rank, num_ranks) for config in self.configs().values()]
        return min((count for count in counts if count is not None), default=None)

    def impossible(self) -> dict[str, str]:
        excuses = {} if self.parts else {"parts": "names no objective: give two or more, like {ret_clip: {}}"}
        for name in self.parts:
            found = self._misfits(name) or self._config(name).impossible()
            excuses |= {f"parts.{name}.{key}".rstrip("."): text for key, text in found.items()}
        for name, weight in self.weights.items():
            if name not in self.parts:
                excuses[f"weights.{name}"] = "is no part" + nearest(name, self.parts)
            elif not 0 < weight < math.inf:
                excuses[f"weights.{name}"] = f"{weight} must be above 0; take the part out instead"
        return excuses

    def _misfits(self, name: str) -> dict[str, str]:
        """What is wrong with a part before it can be made; key -> sentence, no key for the part itself."""
        try:
            config: type = _class_of(name).Config
        except UserError as error:
            return {"": f"{error.what}; {error.fix}".rstrip("; ")}
        given = self.parts[name]
        if not isinstance(given, Mapping):
            return {"": "is a section with the keys of that objective; {} for none"}
        own = {key: hint for key, hint in keys_of(config).items() if key not in _SHARED_KEYS}
        return {key: text for key, value in given.items() if (text := _excuse(key, value, own))}

    def _config(self, name: str) -> ObjectiveConfig:
        given: dict[Any, Any] = {**self.parts[name], "name": name}
        given |= {"fidelity": self.fidelity, "negatives": self.negatives}
        merged = OmegaConf.merge(OmegaConf.structured(_class_of(name).Config), given)
        config = OmegaConf.to_object(merged)
        assert isinstance(config, ObjectiveConfig)
        return config


def _class_of(name: str) -> type[Objective]:
    from fundusfm.objectives import objective_class  # which imports this module by name

    found = objective_class(name)
    if issubclass(found, Composite):
        raise UserError("a composite cannot be a part of another", fix="name its parts side by side")
    return found


def _excuse(key: str, value: Any, hints: Mapping[str, Any]) -> str:
    if key in _SHARED_KEYS:
        return f"holds for all parts; set objective.{key}"
    if key not in hints:
        return "there is no such key" + nearest(key, hints)
    asked = misfit(value, hints[key])
    return f"{value!r} is not {asked}" if asked else ""


class Composite(Objective):
    """The objective; a term of a part is called `<part>/<term>`, and so are features, gauges and pictures."""

    Config = CompositeConfig
    view: ClassVar[str] = "composite"

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, CompositeConfig)
        self.config: CompositeConfig = recipe.objective
        configs = self.config.configs()
        self.names = {_slug(name): name for name in configs}
        self.parts = nn.ModuleDict()
        for slug, name in self.names.items():
            part_recipe = replace(copy.deepcopy(recipe), objective=configs[name])
            self.parts[slug] = _class_of(name)(part_recipe, vocab_size)  # type: ignore[call-arg]
        share_trunks(self.part_objectives())
        self.cuts_gradients = any(part.cuts_gradients for part in self.part_objectives().values())
        self.aligns_text = any(part.aligns_text for part in self.part_objectives().values())
        if self.aligns_text:
            self.unit_prototypes = self._aligned()[1].unit_prototypes

    def part_objectives(self) -> dict[str, Objective]:
        """Part -> its objective."""
        return {name: self.parts[slug] for slug, name in self.names.items()}  # type: ignore[misc]

    def encode(self, batch: CompositeBatch) -> Features:
        return _prefixed(
            (name, part.encode(batch.parts[name])) for name, part in self.part_objectives().items()
        )

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        return _prefixed(
            (name, part.terms_of(_of_part(name, features))) for name, part in self.part_objectives().items()
        )

    def term_weights(self) -> dict[str, float]:
        weights = _prefixed((name, part.term_weights()) for name, part in self.part_objectives().items())
        return {term: weight * self.config.weight(term.partition("/")[0]) for term, weight in weights.items()}

    def after_step(self) -> None:
        for part in self.part_objectives().values():
            part.after_step()

    def cut_gradients(self) -> None:
        for part in self.part_objectives().values():
            if part.cuts_gradients:
                part.cut_gradients()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["parts"] = {name: {} for name in self.part_objectives()}
        for name, part in self.part_objectives().items():
            part.on_save_checkpoint(checkpoint["parts"][name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, part in self.part_objectives().items():
            part.on_load_checkpoint(checkpoint["parts"][name])

    def gauges(self) -> dict[str, float]:
        return _prefixed((name, part.gauges()) for name, part in self.part_objectives().items())

    def pictures(self, batch: CompositeBatch) -> dict[str, Tensor]:
        return _prefixed(
            (name, part.pictures(batch.parts[name])) for name, part in self.part_objectives().items()
        )

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        _, slug, own_name = name.split(".", 2)
        return self.part_objectives()[self.names[slug]].no_decay(own_name, parameter)

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        return next(iter(self.part_objectives().values())).probe_features(image_NCHW)

    def contrast_scale(self, eye: Eye) -> float:
        return self._aligned()[1].contrast_scale(eye)

    def embed_images(self, image_NCHW: Tensor, eye: Eye) -> Tensor:
        return self._aligned()[1].embed_images(image_NCHW, eye)

    def embed_texts(self, token_BT: Tensor, mask_BT: Tensor, eye: Eye) -> Tensor:
        return self._aligned()[1].embed_texts(token_BT, mask_BT, eye)

    def embed_exams(self, batch: CompositeBatch) -> tuple[Tensor, Tensor]:
        name, part = self._aligned()
        return part.embed_exams(batch.parts[name])

    def _aligned(self) -> tuple[str, Objective]:
        return next((name, part) for name, part in self.part_objectives().items() if part.aligns_text)


def share_trunks(parts: Mapping[str, nn.Module]) -> None:
    """Let parts use one trunk of images and one of texts; UserError if theirs are not of one make.

    It is the first part's. Whether a parameter is trained is for the first part to say that needs it.
    """
    for tower in _TOWERS:
        owners = {name: getattr(part, tower) for name, part in parts.items() if hasattr(part, tower)}
        first = next(iter(owners), "")
        trained: dict[str, bool] = {}
        for name, owner in owners.items():
            if differing := _differing(owners[first].trunk, owner.trunk):
                raise UserError(
                    f"{first} and {name} build {tower} towers that cannot be one: {', '.join(differing[:6])}",
                    where="objective.parts",
                    fix="train them in runs of their own",
                )
            for key, parameter in owner.trunk.named_parameters():
                if f"{tower}.trunk.{key}" not in getattr(parts[name], "unused", ()):
                    trained.setdefault(key, parameter.requires_grad)
            owner.trunk = owners[first].trunk
        for key, is_trained in trained.items():
            owners[first].trunk.get_parameter(key).requires_grad_(is_trained)


def _differing(one: nn.Module, other: nn.Module) -> list[str]:
    """What is not of the same class or shape in two trunks."""
    shapes = [{key: tensor.shape for key, tensor in trunk.state_dict().items()} for trunk in (one, other)]
    names = [key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key)]
    return names if type(one) is type(other) else [type(one).__name__, type(other).__name__]


def _slug(name: str) -> str:
    """A name as modules take it: an import path holds dots."""
    return name.replace(".", "_").replace(":", "_")


def _prefixed(groups: Iterator[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {f"{name}/{key}": value for name, group in groups for key, value in group.items()}


def _of_part(name: str, features: Features) -> Features:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in features.items() if key.startswith(prefix)}
