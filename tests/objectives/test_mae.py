"""Masked autoencoding: what a sample hides, which recipes are refused, decay, schedule, pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fundusfm.errors import UserError
from fundusfm.models.masked import normalised, patchify
from fundusfm.objectives.base import warmup_cosine
from fundusfm.objectives.mae import Mae
from fundusfm.objectives.pictures import reconstruction_picture
from fundusfm.recipe.schema import Fidelity, OptimConfig
from tests.goldens import load
from tests.objectives.tiny_masked import batch_for, masked_recipe


def _mae(**objective: Any) -> Mae:
    torch.manual_seed(0)
    return Mae(masked_recipe("mae", **objective), 0)


def test_masking__a_matter_of_the_sample() -> None:
    """The same patches whatever the batch; of each kind of image as many as its ratio says."""
    mae, batch = _mae(mask_ratio_by_modality={"oct": 0.5}), batch_for("mae", 6)
    whole = mae.masking(batch)
    pieces = [mae.masking(piece).hidden_BP for piece in batch.pieces(4)]
    assert torch.cat(pieces).equal(whole.hidden_BP)
    assert whole.hidden_BP.sum(1).tolist() == [12, 8, 12, 8, 12, 8]
    assert len({tuple(row) for row in whole.restore_BP.tolist()}) == 6


@pytest.mark.parametrize(
    ("objective", "complaint"),
    [
        ({"mask_ratio_by_modality": {"FFA": 0.5}}, "does not name ffa"),
        ({"mask_ratio": 0.99}, "leaves 0 to 0 visible"),
    ],
)
def test_impossible__refused(objective: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        _mae(**objective)


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio_by_modality": {"OCT": 0.0}}, "mask_ratio_by_modality.OCT"),
        ({"decoder_heads": 3}, "decoder_width"),
        ({"decoder_depth": 0}, "decoder_depth"),
    ],
)
def test_config__impossible_values_named(objective: dict[str, Any], key: str) -> None:
    assert list(masked_recipe("mae", **objective).objective.impossible()) == [key]


@pytest.mark.parametrize("name", ["pretrain_mae", "eyeclip_pretrain"])
def test_golden__schedule(name: str) -> None:
    arrays, told = load("mae/optim_schedule")
    facts = told["schedules"][name]
    config = OptimConfig(lr=facts["lr"], warmup_steps=facts["warmup_epochs"])
    factor = warmup_cosine(config, facts["epochs"], first=0)
    for epoch, (rate, _) in zip(arrays[f"epochs_{name}"], arrays[f"lrs_{name}"], strict=True):
        assert facts["lr"] * factor(epoch) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_golden__schedule_of_the_released_code() -> None:
    """By optimiser steps, of which the goldens' epochs have one: the first has rate 0."""
    arrays, _ = load("mae/optim_schedule")
    recipe = masked_recipe("mae", fidelity=Fidelity.released)
    recipe.optim.warmup_steps, recipe.trainer.max_steps = 40, 400
    factor = Mae(recipe, 0).rate_factor()
    for epoch, (rate, _) in zip(arrays["epochs_pretrain_mae"], arrays["lrs_pretrain_mae"], strict=True):
        assert 1e-3 * factor(epoch) == pytest.approx(rate, rel=1e-9, abs=1e-15)
    assert factor(0) == 0
    assert _mae().rate_factor()(0) > 0


def test_decay__vectors_spared_and_in_the_corrected_rule_tokens_too() -> None:
    for fidelity, spares_tokens in ((Fidelity.corrected, True), (Fidelity.released, False)):
        mae = _mae(fidelity=fidelity)
        decayed, spared = (set(map(id, group["params"])) for group in mae.optimiser_groups())
        tokens = {id(mae.trunk.cls_token), id(mae.decoder.mask_token)}
        assert tokens <= (spared if spares_tokens else decayed)
        assert id(mae.trunk.blocks[0].norm1.weight) in spared
        assert id(mae.trunk.blocks[0].mlp.fc1.weight) in decayed
        assert not {id(mae.trunk.pos_embed), id(mae.decoder.pos_embed)} & (decayed | spared)


@pytest.mark.parametrize("normalised_target", [False, True])
def test_picture__a_perfect_model_gives_the_image_back(normalised_target: bool) -> None:
    """Input, what is seen of it, and output stand side by side, one image a line."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    shown = torch.rand(2, 3, 32, 32)
    shape = (1, 3, 1, 1)
    images = (shown - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    hidden = torch.rand(2, 16) < 0.5
    patches = patchify(images, 8)
    drawn = normalised(patches) if normalised_target else patches
    drawn = torch.where(hidden[..., None], drawn, torch.nan)
    picture = reconstruction_picture(images, drawn, hidden, mean, std, normalised_target=normalised_target)
    assert picture.shape == (3, 68, 104)
    torch.testing.assert_close(picture[:, :32, :32], shown[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(picture[:, 36:, 72:], shown[1], rtol=0, atol=1e-4)
    seen = patchify(picture[None, :, :32, 36:68], 8)[0]
    assert (seen[hidden[0]] == 0.5).all()
    torch.testing.assert_close(seen[~hidden[0]], patchify(shown, 8)[0][~hidden[0]], rtol=0, atol=1e-5)


def test_pictures__of_the_objective() -> None:
    mae, batch = _mae().eval(), batch_for("mae", 8)
    batch.images = batch.images.float()
    with torch.no_grad():
        picture = mae.pictures(batch)["reconstruction"]
    assert picture.shape == (3, 6 * 36 - 4, 3 * 36 - 4)
    assert 0 <= picture.min() <= picture.max() <= 1
