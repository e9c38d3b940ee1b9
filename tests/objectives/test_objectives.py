"""Objectives by name, and every recipe that is shipped built for real."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fundusfm.errors import UserError
from fundusfm.models.published import translate
from fundusfm.objectives import build_objective, config_of, objective_class
from fundusfm.objectives.base import Objective, warmup_cosine
from fundusfm.objectives.ret_clip import RetClip, RetClipConfig
from fundusfm.recipe.load import load_recipe
from fundusfm.recipe.schema import ObjectiveConfig, OptimConfig, Recipe
from tests.goldens import load
from tests.objectives.test_composite import tiny_composite
from tests.objectives.tiny import tiny_recipe, tiny_ret_clip
from tests.objectives.tiny_eyeclip import tiny_eyeclip
from tests.objectives.tiny_flair import tiny_flair, tiny_keepfit
from tests.recipe.test_recipes import FILES, RECIPES, WHAT_BASE_LEAVES_OPEN

PUBLISHED_VOCABULARY = 21128
ABLATIONS = [file for file in FILES if file.parent.name == "ablations"]


class OwnConfig(ObjectiveConfig):
    pass


class Own(Objective):
    """An objective of a user's own."""

    Config = OwnConfig

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        self.layer = torch.nn.Linear(vocab_size, 1)


class NoObjective:
    pass


def test_config_of__known_name() -> None:
    assert config_of("ret_clip") is RetClipConfig
    assert objective_class("ret_clip") is RetClip


def test_config_of__import_path() -> None:
    assert config_of(f"{__name__}:Own") is OwnConfig
    recipe = tiny_recipe()
    recipe.objective = OwnConfig(name=f"{__name__}:Own")
    assert isinstance(build_objective(recipe, 5), Own)


@pytest.mark.parametrize("build", [tiny_flair, tiny_keepfit, tiny_eyeclip, tiny_composite])
def test_contrast_scale__the_temperature_of_the_objective(build: Callable[[], Objective]) -> None:
    model = build()
    temperatures = [p for n, p in model.named_parameters() if "log_scale" in n]
    assert temperatures
    for one in temperatures:
        one.data.fill_(math.log(17))
    assert model.contrast_scale("left") == pytest.approx(17)


def test_contrast_scale__of_the_heads_that_read_the_eye() -> None:
    model = tiny_ret_clip()
    for scale, term in zip((5, 7, 11), ("left", "right", "patient"), strict=True):
        model.log_scales[term].data.fill_(math.log(scale))
    assert [model.contrast_scale(eye) for eye in ("left", "right", "")] == pytest.approx([5, 7, 11])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ret_klip", "did you mean ret_clip"),
        ("something", "known: .*ret_clip"),
        ("no_such_module:Own", "cannot be imported"),
        (f"{__name__}:Absent", "cannot be imported"),
        (f"{__name__}:NoObjective", "no subclass"),
        (f"{__name__}:PUBLISHED_VOCABULARY", "no subclass"),
    ],
)
def test_config_of__refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config_of(name)


def test_seed__fixes_the_start() -> None:
    recipes = [tiny_recipe() for _ in range(3)]
    recipes[2].seed = 1
    first, again, other = (build_objective(recipe, 9).state_dict() for recipe in recipes)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not first["vision.proj.weight"].equal(other["vision.proj.weight"])


def _built(file: Path) -> Objective:
    overrides = WHAT_BASE_LEAVES_OPEN if file.stem == "base" else []
    recipe = load_recipe(file, overrides, objective_config=config_of).recipe
    with torch.device("meta"):
        return build_objective(recipe, PUBLISHED_VOCABULARY)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_built(file: Path) -> None:
    objective = _built(file)
    trained = [p for group in objective.optimiser_groups() for p in group["params"]]
    wanted = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    assert wanted and {*map(id, trained)} == {*map(id, wanted)} and len(trained) == len(wanted)


def test_ablations_are_among_them() -> None:
    assert {"ret_clip_no_patient_term", "ret_clip_no_eye_terms"} < {file.stem for file in FILES}
    assert all(file.stem == load_recipe(file, objective_config=config_of).recipe.name for file in ABLATIONS)


def test_texts_longer_than_the_position_table__refused() -> None:
    """A tower that brings its own sizes is not known before it is built."""
    recipe = tiny_recipe()
    recipe.data.context_length = 25
    with pytest.raises(UserError, match="25 tokens do not fit into a text tower of 24 positions"):
        build_objective(recipe, 9)


def test_published_size__every_key_and_shape() -> None:
    _, description = load("ret_clip/state_dict_layout_vitb16_robertabase")
    published = {e["key"]: torch.empty(e["shape"], device="meta") for e in description["entries"]}
    theirs, _ = translate("ret_clip", published)
    ours = _built(RECIPES / "ret_clip.yaml").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(ours) == description["n_keys"] == 367
    assert sum(v.numel() for v in ours.values()) == description["n_params"] == 191_871_235


def test_schedule__held_at_the_peak() -> None:
    factor = warmup_cosine(OptimConfig(warmup_steps=10, hold_fraction=0.5), 110)
    assert [factor(step) for step in (0, 9, 10, 59, 60)] == [0.1, 1, 1, 1, 1]
    assert factor(85) == pytest.approx(0.5)
    assert factor(109) == pytest.approx(0, abs=2e-3)
