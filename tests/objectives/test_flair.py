"""FLAIR's soft targets, padding, temperature and decay, in both fidelities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fundusfm.errors import UserError
from fundusfm.objectives.flair import Flair, FlairConfig
from fundusfm.recipe.schema import Fidelity
from tests.objectives.tiny_flair import category_batch, recipe_with, tiny_flair


def _dense(model: Flair, share_BB: torch.Tensor) -> torch.Tensor:
    """The loss of a batch of six by hand, rows are images."""
    rows = model.encode(category_batch(6))
    kept = rows["valid"]
    logit_BB = model.log_scale.exp() * rows["image"][kept] @ rows["text"][kept].T
    share_BB = share_BB[kept][:, kept]
    of_images = -(share_BB / share_BB.sum(1, keepdim=True) * logit_BB.log_softmax(1)).sum(1).mean()
    of_texts = -(share_BB / share_BB.sum(0) * logit_BB.log_softmax(0)).sum(0).mean()
    return (of_images + of_texts) / 2


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_targets__labels_of_the_image_or_the_drawn_one(fidelity: Fidelity) -> None:
    model, batch = tiny_flair(fidelity).train(), category_batch(6)
    assert batch.text_valid_B.tolist() == [True, True, True, True, False, True]
    same_BB = (batch.category_B[:, None] == batch.category_B).float()
    named_BC = F.one_hot(batch.category_B.clamp(min=0), batch.labels_BC.shape[1]).float()
    shown_BB = batch.labels_BC.float() @ named_BC.T
    assert not shown_BB.equal(same_BB)
    wanted = _dense(model, same_BB if fidelity is Fidelity.released else shown_BB)
    torch.testing.assert_close(model.loss_terms(batch)["loss_public"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_padding__counts_in_the_released_pooling_only(fidelity: Fidelity) -> None:
    model, batch = tiny_flair(fidelity).eval(), category_batch(4)
    alone = model.embed_texts(batch.token_BT[:1, :6], batch.mask_BT[:1, :6], "")
    padded = model.embed_texts(batch.token_BT, batch.mask_BT, "")[:1]
    assert torch.allclose(alone, padded, rtol=1e-4, atol=1e-5) is (fidelity is Fidelity.corrected)


def test_image_without_labels__neither_query_nor_candidate() -> None:
    model = tiny_flair().train()
    batch = category_batch(6)
    first = model.loss_terms(batch)["loss_public"]
    batch.images[4] = 7.0
    torch.testing.assert_close(model.loss_terms(batch)["loss_public"], first)
    nothing = replace(batch, text_valid_B=torch.zeros(6, dtype=torch.bool))
    assert model.loss_terms(nothing)["loss_public"].item() == 0


@pytest.mark.parametrize(
    ("fidelity", "cap"), [(Fidelity.released, 4.6052), (Fidelity.corrected, math.log(50))]
)
def test_temperature__clamped_before_use_with_its_gradient(fidelity: Fidelity, cap: float) -> None:
    model = tiny_flair(fidelity, temperature_max=50.0).train()
    assert model.gauges()["scale"] == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    model.loss_terms(category_batch(6))["loss_public"].backward()
    assert model.log_scale.item() == pytest.approx(cap)
    assert model.log_scale.grad.abs().item() > 0.1
    with torch.no_grad():
        model.log_scale.fill_(-3.0)
        model.after_step()
    assert model.log_scale.item() == 0


def test_decay__released_spares_nothing() -> None:
    for fidelity, num_groups in ((Fidelity.released, 1), (Fidelity.corrected, 2)):
        groups = tiny_flair(fidelity).optimiser_groups()
        assert [bool(group["weight_decay"]) for group in groups] == [True, False][:num_groups]
        assert all(group["params"] for group in groups)


def test_embeddings__as_in_training() -> None:
    model, batch = tiny_flair().eval(), category_batch(3)
    rows = model.encode(batch)
    image_BD, text_BD = model.embed_exams(batch)
    assert image_BD.equal(rows["image"])
    assert text_BD.equal(rows["text"])
    torch.testing.assert_close(image_BD.norm(dim=1), torch.ones(3))
    assert model.probe_features(batch.images).shape == (3, 32)  # the trunk's width, not the shared one


def test_one_layer__refused() -> None:
    recipe = recipe_with(FlairConfig())
    recipe.model.text.layers = 1
    with pytest.raises(UserError, match="first two and its last"):
        Flair(recipe, 9)


def test_temperature__impossible_values() -> None:
    assert FlairConfig(temperature_init=0.5).impossible()
    assert FlairConfig(temperature_init=20, temperature_max=10).impossible()
    assert not FlairConfig().impossible()


def test_contrasted__with_other_ranks_unless_released() -> None:
    assert FlairConfig().num_contrasted(1, 8) == 8
    assert FlairConfig(fidelity=Fidelity.released).num_contrasted(1, 8) == 1
