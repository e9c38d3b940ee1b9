"""KeepFIT's expert set: who is contrasted with whom, what revision sees, the bank, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fundusfm.errors import UserError
from fundusfm.models.bank import FeatureBank
from fundusfm.objectives import build_objective
from fundusfm.objectives.composite import CompositeConfig
from fundusfm.objectives.keepfit import KeepFitConfig
from fundusfm.recipe.schema import Fidelity
from tests.objectives.tiny import VOCAB_SIZE
from tests.objectives.tiny_flair import category_batch, recipe_with, tiny_flair, tiny_keepfit

EXPERTS = (1, 3, 5, 6)  # the last repeats the caption of the first


def test_public_term__flairs_on_the_public_exams() -> None:
    model, flair = tiny_keepfit().train(), tiny_flair().train()
    flair.load_state_dict({k: v for k, v in model.state_dict().items() if k in flair.state_dict()})
    batch = category_batch(8, experts=EXPERTS)
    public = replace(batch, text_valid_B=batch.text_valid_B & ~batch.expert_B)
    wanted = flair.loss_terms(public)["loss_public"]
    torch.testing.assert_close(model.loss_terms(batch)["loss_public"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_expert_term__equal_captions_together_unless_released(fidelity: Fidelity) -> None:
    model, batch = tiny_keepfit(fidelity).train(), category_batch(8, experts=EXPERTS)
    rows = model.encode(batch)
    logits = model.log_scale.exp() * rows["image"][list(EXPERTS)] @ rows["text"][list(EXPERTS)].T
    share = torch.eye(4)
    if fidelity is Fidelity.corrected:
        share[0, 3] = share[3, 0] = 1
        share = share / share.sum(1, keepdim=True)
    wanted = -(share * (logits.log_softmax(0) + logits.log_softmax(1))).sum() / 8
    torch.testing.assert_close(model.terms_of(rows)["loss_expert"], wanted, rtol=1e-4, atol=1e-5)


def test_revision__by_hand_with_one_head() -> None:
    model, batch = tiny_keepfit(heads=1).train(), category_batch(8, experts=EXPERTS)
    rows, attention = model.encode(batch), model.revision
    public = batch.text_valid_B & ~batch.expert_B
    image, text = rows["image"][public], rows["text"][public]
    expert_image, expert_text = (rows[name][list(EXPERTS)] for name in ("image", "text"))
    score = attention.q(image) @ attention.k(expert_image).T / 16**0.5
    revised = attention.o(score.softmax(1) @ attention.v(expert_text))
    wanted = (text - revised).square().mean()
    torch.testing.assert_close(model.terms_of(rows)["loss_revision"], wanted, rtol=1e-4, atol=1e-6)


def test_without_experts__no_revision_and_gradients_of_zero() -> None:
    model = tiny_keepfit().train()
    terms = model.loss_terms(category_batch(6))
    assert terms["loss_revision"].item() == terms["loss_expert"].item() == 0
    model.total_loss(terms).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.revision.parameters())
    assert model.vision.proj.weight.grad.any()


def test_captions_and_labels__neither_padded_to_the_other() -> None:
    """In the released pooling, which counts padding, a long caption would change every sentence."""
    model, batch = tiny_keepfit(Fidelity.released).eval(), category_batch(8, experts=EXPERTS)
    batch.token_BT[~batch.expert_B, 4:] = 0
    batch.mask_BT = batch.token_BT != 0
    found = model.encode(batch)["text"]
    public = ~batch.expert_B
    wanted = model.embed_texts(batch.token_BT[public, :4], batch.mask_BT[public, :4], "")
    torch.testing.assert_close(found[public], wanted, rtol=1e-4, atol=1e-5)
    whole = model.embed_texts(batch.token_BT[batch.expert_B], batch.mask_BT[batch.expert_B], "")
    torch.testing.assert_close(found[batch.expert_B], whole, rtol=1e-4, atol=1e-5)


def test_fused_texts__unit_rows_unless_released() -> None:
    batch = category_batch(8, experts=EXPERTS)
    for fidelity in Fidelity:
        model = tiny_keepfit(fidelity, fusion=True).train()
        rows = model.encode(batch)
        experts = model._gathered(rows, batch.expert_B, None)
        length = model._fused(rows, experts, ~batch.expert_B).norm(dim=1)
        assert torch.allclose(length, torch.ones(8), atol=1e-3) is (fidelity is Fidelity.corrected)
        assert model.total_loss(model.terms_of(rows)).isfinite()


def test_bank__newest_rows_take_the_place_of_the_oldest() -> None:
    bank = FeatureBank(4, 2)
    rows = torch.arange(14, dtype=torch.float).reshape(7, 2)
    bank.push(rows[:3], -rows[:3])
    assert bank.rows()[0].equal(rows[:3])
    bank.push(rows[3:5], -rows[3:5])
    image_MD, text_MD = bank.rows()
    assert sorted(image_MD[:, 0].tolist()) == [2, 4, 6, 8]
    assert text_MD.equal(-image_MD)
    again = FeatureBank(4, 2)
    again.restore(bank.content())
    for one in (bank, again):
        one.push(rows, rows)
        assert sorted(one.rows()[0][:, 0].tolist()) == [6, 8, 10, 12]
    assert again.rows()[0].equal(bank.rows()[0])


def test_bank__seen_by_revision_after_the_step_and_kept_with_checkpoints() -> None:
    model, batch = tiny_keepfit(bank_size=6).train(), category_batch(8, experts=EXPERTS)
    first = model.loss_terms(batch)["loss_revision"]
    assert model.bank.num_pushed == 0
    with torch.no_grad():
        model.after_step()
    assert model.bank.num_pushed == 4
    model.eval()
    no_experts = category_batch(6, seed=1)
    seen = model.loss_terms(no_experts)["loss_revision"]
    assert seen.item() > 0
    with torch.no_grad():
        model.after_step()
    assert model.bank.num_pushed == 4  # validation leaves nothing behind
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    assert not any("bank" in name for name in model.state_dict())
    fresh = tiny_keepfit(bank_size=6).eval()
    assert fresh.loss_terms(no_experts)["loss_revision"].item() == 0
    fresh.on_load_checkpoint(checkpoint)
    torch.testing.assert_close(fresh.loss_terms(no_experts)["loss_revision"], seen)
    assert first.item() > 0


def test_attention_dropout__while_training_only() -> None:
    model, batch = tiny_keepfit(attention_dropout=0.5), category_batch(8, experts=EXPERTS)
    kept = [model.eval().loss_terms(batch)["loss_revision"] for _ in range(2)]
    dropped = [model.train().loss_terms(batch)["loss_revision"] for _ in range(2)]
    assert kept[0].equal(kept[1])
    assert not dropped[0].equal(dropped[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [("expert_weight", -1), ("revision_weight", float("nan")), ("heads", 0), ("attention_dropout", 1.0),
     ("bank_size", -1)],
)  # fmt: skip
def test_impossible_values(key: str, value: float) -> None:
    assert list(KeepFitConfig(**{key: value}).impossible()) == [key]


def test_expert_set__only_where_a_term_wants_it() -> None:
    off = KeepFitConfig(expert_weight=0, revision_weight=0)
    assert not off.has_expert_set
    assert off.view_options() == {"experts": False}
    assert KeepFitConfig(expert_weight=0, revision_weight=1).has_expert_set
    assert KeepFitConfig(expert_weight=0, revision_weight=0, bank_size=3).impossible()
    with pytest.raises(UserError, match="not divisible by 3 heads"):
        tiny_keepfit(heads=3)


def test_terms__weighted_as_the_recipe_says() -> None:
    model = tiny_keepfit(expert_weight=0.5, revision_weight=7.0)
    assert model.term_weights() == {"loss_public": 1.0, "loss_expert": 0.5, "loss_revision": 7.0}
    image_BD, _ = model.embed_exams(category_batch(2))
    torch.testing.assert_close(image_BD, F.normalize(image_BD, dim=-1))


def test_in_a_composite__its_bank_goes_with_checkpoints() -> None:
    parts = {"flair": {}, "keepfit": {"bank_size": 3}}
    recipe = recipe_with(CompositeConfig(name="composite", parts=parts))
    assert recipe.objective.has_expert_set
    model, fresh = (build_objective(recipe, VOCAB_SIZE) for _ in range(2))
    row_1D = torch.ones(1, recipe.model.embed_dim)
    model.part_objectives()["keepfit"].bank.push(row_1D, -row_1D)  # type: ignore[operator]
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    fresh.on_load_checkpoint(checkpoint)
    image_MD, text_MD = fresh.part_objectives()["keepfit"].bank.rows()  # type: ignore[operator]
    assert image_MD.equal(row_1D)
    assert text_MD.equal(-row_1D)
