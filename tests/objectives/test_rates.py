"""Rates by depth and over time: the published fine-tuning numbers, and what each tower makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fundusfm.errors import UserError
from fundusfm.objectives import build_objective
from fundusfm.objectives.base import Objective, warmup_cosine
from fundusfm.objectives.flair import FlairConfig
from fundusfm.objectives.mae import Mae
from fundusfm.objectives.rates import layer_of, layer_scales, refuse_other_than_blocks
from fundusfm.recipe.schema import OptimConfig, Recipe
from tests.goldens import load
from tests.objectives.test_composite import tiny_composite
from tests.objectives.tiny import tiny_ret_clip
from tests.objectives.tiny_caption import tiny_caption
from tests.objectives.tiny_eyeclip import tiny_eyeclip
from tests.objectives.tiny_flair import recipe_with
from tests.objectives.tiny_masked import VOCAB_SIZE, masked_recipe

DECAY = 0.65


def _rates(facts: dict[str, Any], epochs: np.ndarray, scales: list[float]) -> np.ndarray:
    """(epochs, layers): step for step as the published code, whose first rate is 0."""
    config = OptimConfig(lr=facts["lr"], warmup_steps=facts["warmup_epochs"], min_lr=facts["min_lr"])
    factor = warmup_cosine(config, facts["epochs"], first=0)
    return np.asarray([[scale * facts["lr"] * factor(epoch) for scale in scales] for epoch in epochs])


def test_golden__retfound_fine_tuning() -> None:
    arrays, told = load("mae/optim_schedule")
    np.testing.assert_allclose(layer_scales(24, DECAY), arrays["layer_scales_24_blocks_decay065"], rtol=1e-12)
    facts = told["schedules"]["finetune_retfound"]
    found = _rates(facts, arrays["epochs_finetune_retfound"], [1.0, DECAY**3])
    np.testing.assert_allclose(found, arrays["lrs_finetune_retfound"], rtol=1e-9, atol=1e-15)


def test_golden__urfound_fine_tuning() -> None:
    arrays, told = load("urfound/schedules")
    scalars = told["scalars"]
    scales = layer_scales(12, scalars["finetune"]["layer_decay"])
    np.testing.assert_allclose(scales, arrays["layer_scale"], rtol=1e-12)
    found = _rates(scalars["finetune"], arrays["finetune_epoch"], scales)
    np.testing.assert_allclose(found, arrays["finetune_lr_per_layer"], rtol=1e-9, atol=1e-15)
    assert {name: layer_of(name, 12) for name in scalars["layer_ids"]} == scalars["layer_ids"]


def test_golden__groups_of_a_tiny_tower() -> None:
    """Rates of all its parameters; decay of those that pretraining has too."""
    told = load("mae/optim_schedule")[1]["tiny_vit_groups"]
    wanted = told["parameter -> [lr multiplier, weight decay]"]
    scales = layer_scales(told["blocks"], told["layer_decay"])
    assert {n: scales[layer_of(n, told["blocks"])] for n in wanted} == pytest.approx(
        {name: scale for name, (scale, _) in wanted.items()}
    )
    recipe = masked_recipe("mae")
    recipe.optim.layer_decay, recipe.optim.weight_decay = told["layer_decay"], told["weight_decay"]
    model = Mae(recipe, 0)
    found = {n.removeprefix("vision.trunk."): pair for n, pair in _by_name(model, recipe).items()}
    shared = found.keys() & wanted.keys()
    assert wanted.keys() - shared == {
        "pos_embed",
        "head.weight",
        "head.bias",
        "fc_norm.weight",
        "fc_norm.bias",
    }
    for name in shared:
        assert found[name] == pytest.approx(wanted[name]), name


def _by_name(model: Objective, recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Factor of the rate, and weight decay, of each trained parameter."""
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    groups = model.optimiser_groups()
    found = {
        names[id(p)]: (group["lr"] / recipe.optim.lr, group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert found.keys() == {*names.values()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert groups[0]["lr"] == recipe.optim.lr, "the first rate is the one that is logged"
    return found


@pytest.mark.parametrize("build", [tiny_ret_clip, tiny_eyeclip, tiny_composite])
def test_layers__both_towers_decay_and_nothing_else(build: Callable[[], Objective]) -> None:
    model = build()
    model.recipe.optim.layer_decay = 0.5
    scales = {name: scale for name, (scale, _) in _by_name(model, model.recipe).items()}
    for tower in ("vision", "text"):
        own = {n: s for n, s in scales.items() if f"{tower}.trunk." in n}
        lowest = min(own.values())
        assert 0 < lowest < 0.5, "embeddings and two or more blocks"
        embeddings = [s for n, s in own.items() if "embed" in n.partition(".trunk.")[2]]
        assert embeddings and set(embeddings) == {lowest}
        assert {s for n, s in own.items() if ".0." in n} == {2 * lowest}
    assert {s for n, s in scales.items() if ".trunk." not in n} == {1.0}
    model.recipe.optim.layer_decay = 1.0
    assert len(model.optimiser_groups()) == 2


def test_layers__of_a_trunk_that_has_its_own_rate() -> None:
    model = tiny_caption(trunk_rate=0.25)
    model.recipe.optim.layer_decay = 0.5
    scales = {name: scale for name, (scale, _) in _by_name(model, model.recipe).items()}
    depth = 1 + max(int(n.split(".")[3]) for n in scales if n.startswith("vision.trunk.blocks."))
    assert scales["vision.trunk.patch_embed.proj.weight"] == pytest.approx(0.25 * 0.5 ** (depth + 1))
    assert all(group["params"] for group in model.optimiser_groups())


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["vision.trunk.stem.weight", "vision.proj.weight"], "'vision' is no row of transformer blocks"),
        (
            ["vision.trunk.stages.0.blocks.0.weight", "text.trunk.encoder.layer.0.weight"],
            "'vision' is no row",
        ),
        (["layer.weight"], "there is no tower"),
    ],
)
def test_no_blocks__refused(names: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        refuse_other_than_blocks(names)


def test_no_blocks__refused_before_any_data_is_read() -> None:
    recipe = masked_recipe("mae")
    recipe.optim.layer_decay = 0.9
    build_objective(recipe, 0)
    recipe = recipe_with(FlairConfig(name="flair"))
    recipe.model.vision.name, recipe.model.vision.options = "resnet18", {}
    build_objective(recipe, VOCAB_SIZE)
    recipe.optim.layer_decay = 0.9
    with pytest.raises(UserError, match="'vision' is no row of transformer blocks"):
        build_objective(recipe, VOCAB_SIZE)


def test_steps__a_decayed_layer_moves_less() -> None:
    """AdamW's first step is as long as the rate."""
    recipe = masked_recipe("mae")
    recipe.optim.layer_decay, recipe.optim.weight_decay = 0.5, 0.0
    model = Mae(recipe, 0)
    optimiser = model.configure_optimizers()["optimizer"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    moved = {
        n: float((before[n] - p.detach()).abs().mean())
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    block = "vision.trunk.blocks.{}.mlp.fc1.weight"
    assert moved[block.format(0)] == pytest.approx(moved[block.format(1)] / 2, rel=1e-3)
    assert moved[block.format(1)] == pytest.approx(moved["decoder.embed.weight"] / 2, rel=1e-3)
