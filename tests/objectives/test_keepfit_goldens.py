"""KeepFIT against numbers of the published code: attention, the objective, its ablations, ten steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.models.revision import Revision, SoftmaxOver
from fundusfm.objectives.keepfit import KeepFit
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.view_category import CategoryBatch
from tests.goldens import load
from tests.objectives.tiny_flair import category_batch, tiny_keepfit

TOLERANCE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}
ROWS = {
    "img_emb": ("image", 0),
    "txt_emb": ("text", 0),
    "kd_img_emb": ("image", 1),
    "kd_txt_emb": ("text", 1),
}
_OURS = {"": "revision", "td2kd_": "fuse_public", "kd2td_": "fuse_expert"}


def _attention(arrays: dict[str, np.ndarray], attention: Revision, prefix: str = "") -> Revision:
    state = {f"{n}.weight": torch.from_numpy(arrays[f"{prefix}W_{n}"]) for n in "qkvo"}
    attention.load_state_dict(state)
    return attention


@pytest.mark.parametrize(("over", "suffix"), [(SoftmaxOver.heads, ""), (SoftmaxOver.experts, "_keysoftmax")])
def test_attention(over: SoftmaxOver, suffix: str) -> None:
    arrays, description = load("keepfit/attention_heads2")
    attention = _attention(arrays, Revision(16, description["heads"], 0.0, over))
    query, key, value = (torch.from_numpy(arrays[name][0]) for name in "qkv")
    found = attention.weights(query, key).detach()
    np.testing.assert_allclose(found, arrays[f"weights{suffix}"], **TOLERANCE)
    revised = attention(query, key, value).detach()
    np.testing.assert_allclose(revised, arrays[f"out{suffix}"][0], **TOLERANCE)


def _features(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the objective sees, expert rows behind the public ones, and its leaves by their golden names."""
    leaves = {name: torch.from_numpy(arrays[name]).requires_grad_() for name in ROWS}
    num_public, num_experts = len(leaves["img_emb"]), len(leaves["kd_img_emb"])
    number = num_public + num_experts
    is_expert = torch.arange(number) >= num_public
    none = torch.full((num_experts,), -1)
    return {
        "image": torch.cat([leaves["img_emb"], leaves["kd_img_emb"]]),
        "text": torch.cat([leaves["txt_emb"], leaves["kd_txt_emb"]]),
        "valid": torch.ones(number, dtype=torch.bool),
        "labels": torch.zeros(number, 1, dtype=torch.uint8),
        "category": torch.cat([torch.from_numpy(arrays["category_id"]), none]),
        "expert": is_expert,
        "caption": torch.where(is_expert, torch.arange(number), -1),
    }, leaves


def _loaded(arrays: dict[str, np.ndarray], **options: Any) -> KeepFit:
    model = tiny_keepfit(Fidelity.released, **options).train()
    with torch.no_grad():
        model.log_scale.fill_(float(arrays["logit_scale_param"]))
    for prefix, name in _OURS.items():
        if hasattr(model, name):
            _attention(arrays, getattr(model, name), prefix)
    return model


@pytest.mark.parametrize("variant", ["", "_drop", "_keysoftmax"])
def test_objective__value_and_every_gradient(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, _ = load("keepfit/objective_seed0")
    if variant == "_drop":
        mask = torch.from_numpy(arrays["dropout_mask"])
        monkeypatch.setattr("fundusfm.models.revision.F.dropout", lambda weight, p, training: weight * mask)
    softmax = SoftmaxOver.experts if variant == "_keysoftmax" else None
    model = _loaded(arrays, softmax=softmax)
    features, leaves = _features(arrays)
    query, key, value = (leaves[name] for name in ("img_emb", "kd_img_emb", "kd_txt_emb"))
    listened = model.revision.weights(query, key).detach()
    np.testing.assert_allclose(listened, arrays[f"attention_weights{variant}"], **TOLERANCE)
    revised = model.revision(query, key, value).detach()
    np.testing.assert_allclose(revised, arrays[f"revised_text{variant}"], **TOLERANCE)
    terms = model.terms_of(features)
    for term in ("public", "expert"):
        np.testing.assert_allclose(terms[f"loss_{term}"].item(), arrays[f"loss_{term}"], **TOLERANCE)
    np.testing.assert_allclose(terms["loss_revision"].item(), arrays[f"loss_revision{variant}"], **TOLERANCE)
    total = model.total_loss(terms)
    np.testing.assert_allclose(total.item(), arrays[f"loss_total{variant}"], **TOLERANCE)
    total.backward()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf.grad, arrays[f"grad_{name}{variant}"], err_msg=name, **TOLERANCE)
    for name in "qkvo":
        found = getattr(model.revision, name).weight.grad
        np.testing.assert_allclose(found, arrays[f"grad_W_{name}{variant}"], err_msg=name, **TOLERANCE)
    found = model.log_scale.grad.item()
    np.testing.assert_allclose(found, arrays[f"grad_logit_scale{variant}"], **TOLERANCE)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("revision_only", {"expert_weight": 0.0, "revision_weight": 1.0}),
        ("mixed_only", {"revision_weight": 0.0}),
        ("mixed_fusion", {"revision_weight": 0.0, "fusion": True}),
        ("mixed_fusion_revision", {"fusion": True}),
    ],
)
def test_ablation__value_and_gradients(case: str, options: dict[str, Any]) -> None:
    arrays, _ = load("keepfit/ablation_objectives_seed0")
    model = _loaded(arrays, **options)
    features, leaves = _features(arrays)
    total = model.total_loss(model.terms_of(features))
    np.testing.assert_allclose(total.item(), arrays[f"total_{case}"], **TOLERANCE)
    total.backward()
    for name in ("img_emb", "txt_emb"):
        wanted = arrays[f"grad_{name.removesuffix('_emb')}_{case}"]
        np.testing.assert_allclose(leaves[name].grad, wanted, err_msg=name, **TOLERANCE)


class Linear(KeepFit):
    """The objective over towers of one linear layer, as the golden has them."""

    def embed_images(self, image_NCHW: Tensor, eye: str) -> Tensor:
        return F.normalize(self.vision(image_NCHW.flatten(1)), dim=-1)

    def embed_texts(self, token_BT: Tensor, mask_BT: Tensor, eye: str) -> Tensor:
        return F.normalize(self.text(token_BT.float()), dim=-1)


def _linear(arrays: dict[str, np.ndarray]) -> Linear:
    model = tiny_keepfit(Fidelity.released, embed_dim=8)
    model.__class__ = Linear
    del model.text_proj
    model.vision, model.text = nn.Linear(12, 8, bias=False), nn.Linear(4, 8, bias=False)
    state = {
        "log_scale": arrays["logit_scale_init"].reshape(1),
        "vision.weight": arrays["vision_model_l_weight_init"],
        "text.weight": arrays["text_model_l_weight_init"],
        **{f"revision.{n}.weight": arrays[f"attention_W_{n}_weight_init"] for n in "qkvo"},
    }
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    config = model.recipe.optim
    config.lr, config.betas, config.eps, config.weight_decay = 1e-2, (0.9, 0.999), 1e-8, 1e-5
    config.warmup_steps, model.total_steps = 5, 10
    return model.train()  # type: ignore[return-value]


def _step_batch(arrays: dict[str, np.ndarray], step: int) -> CategoryBatch:
    batch = category_batch(12, experts=tuple(range(6, 12)), lacking=False)
    for own, names in (("images", ("images", "kd_images")), ("token_BT", ("token_ids", "kd_token_ids"))):
        setattr(batch, own, torch.from_numpy(np.concatenate([arrays[name][step] for name in names])))
    batch.mask_BT = torch.ones_like(batch.token_BT, dtype=torch.bool)
    batch.category_B[:6] = torch.from_numpy(arrays["category_id"][step])
    return batch


def test_ten_steps() -> None:
    arrays, _ = load("keepfit/train_steps_seed0")
    model = _linear(arrays)
    configured = model.configure_optimizers()
    optimiser, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses = []
    for step in range(10):
        np.testing.assert_allclose(optimiser.param_groups[0]["lr"], arrays["lr_per_step"][step], rtol=1e-6)
        terms = model.loss_terms(_step_batch(arrays, step % 5))
        for term in ("public", "expert"):
            wanted = arrays[f"loss_{term}_per_step"][step]
            np.testing.assert_allclose(terms[f"loss_{term}"].item(), wanted, rtol=1e-3)
        total = model.total_loss(terms)
        losses.append(total.item())
        optimiser.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        np.testing.assert_allclose(norm, arrays["grad_norm_per_step"][step], rtol=1e-3)
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose(np.reshape(losses, (2, 5)).mean(1), arrays["epoch_mean_loss"], rtol=1e-3)
    final = {"log_scale": "logit_scale", "vision.weight": "vision_model_l_weight"}
    final |= {"text.weight": "text_model_l_weight"}
    final |= {f"revision.{n}.weight": f"attention_W_{n}_weight" for n in "qkvo"}
    assert final.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        wanted = arrays[f"{final[name]}_final"].reshape(parameter.shape)
        np.testing.assert_allclose(parameter.detach(), wanted, rtol=2e-3, atol=2e-4, err_msg=name)
