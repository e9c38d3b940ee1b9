"""FLAIR against numbers of the published code: loss, heads, pooling, zero-shot reading, schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fundusfm.evaluation.zero_shot import ensembles
from fundusfm.models.pooling import mean_of_layers
from fundusfm.objectives.flair import unit_projection
from fundusfm.recipe.schema import Fidelity
from tests.goldens import load
from tests.objectives.tiny_flair import tiny_flair

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
FLOAT32: dict[str, Any] = {"rtol": 2e-4, "atol": 1e-5}


@pytest.mark.parametrize("case", ["seed0", "allsame", "clamp_high"])
def test_released_loss__value_and_gradients(case: str) -> None:
    arrays, _ = load(f"flair/softtarget_loss_{case}")
    model = tiny_flair(Fidelity.released).train()
    with torch.no_grad():
        model.log_scale.fill_(float(arrays["logit_scale_param"]))
    rows = {
        name: torch.from_numpy(arrays[f"{key}_emb"]).requires_grad_()
        for name, key in (("image", "img"), ("text", "txt"))
    }
    number = len(arrays["category_id"])
    features = {
        **rows,
        "valid": torch.ones(number, dtype=torch.bool),
        "labels": torch.zeros(number, 1, dtype=torch.uint8),
        "category": torch.from_numpy(arrays["category_id"]),
    }
    loss = model.total_loss(model.terms_of(features))
    loss.backward()
    np.testing.assert_allclose(loss.item(), arrays["loss_f64"], **TOLERANCE)
    np.testing.assert_allclose(model.log_scale.item(), arrays["logit_scale_after_clamp"], **TOLERANCE)
    np.testing.assert_allclose(model.log_scale.grad.item(), arrays["grad_logit_scale"], **FLOAT32)
    np.testing.assert_allclose(rows["image"].grad, arrays["grad_img"], **FLOAT32)
    np.testing.assert_allclose(rows["text"].grad, arrays["grad_txt"], **FLOAT32)
    norm = torch.stack([g.norm() for g in (rows["image"].grad, rows["text"].grad, model.log_scale.grad)])
    np.testing.assert_allclose(norm.norm(), arrays["grad_norm_before_clip"], **FLOAT32)


def test_projection_head__value_and_gradients() -> None:
    arrays, _ = load("flair/projection_head_seed0")
    feature = torch.from_numpy(arrays["x"]).requires_grad_()
    head = nn.Linear(feature.shape[1], len(arrays["weight"]), bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(arrays["weight"]))
    found = unit_projection(feature, head)
    np.testing.assert_allclose(found.detach(), arrays["y_p1_n1"], **TOLERANCE)
    found.backward(torch.from_numpy(arrays["upstream"])[:, : found.shape[1]])
    np.testing.assert_allclose(feature.grad, arrays["gx_p1_n1"], **TOLERANCE)
    np.testing.assert_allclose(head.weight.grad, arrays["gw_p1_n1"], **TOLERANCE)


def test_text_pooling__released_counts_padding() -> None:
    arrays, _ = load("flair/text_pooling_seed0")
    states = [torch.from_numpy(arrays[f"hidden_{layer}"]) for layer in (1, 1, 2, "last")]
    pooled = mean_of_layers(states, None)
    np.testing.assert_allclose(pooled, arrays["pooled"], **TOLERANCE)
    head = nn.Linear(pooled.shape[1], len(arrays["weight"]), bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(arrays["weight"]))
    np.testing.assert_allclose(unit_projection(pooled, head).detach(), arrays["embedding"], **TOLERANCE)
    mask = torch.from_numpy(arrays["attention_mask"]).bool()
    masked = mean_of_layers(states, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        wanted = np.mean([arrays[f"hidden_{k}"][row, :length].mean(0) for k in (1, 2, "last")], axis=0)
        np.testing.assert_allclose(masked[row], wanted, **TOLERANCE)
    assert not np.allclose(masked, arrays["pooled"], atol=1e-3)


@pytest.mark.parametrize("system", ["flair", "keepfit"])
@pytest.mark.parametrize("kind", ["ens", "name"])
def test_zero_shot__prototypes_and_logits(system: str, kind: str) -> None:
    arrays, description = load(f"{system}/zero_shot_seed0")
    owner, classes = arrays[f"prompt_class_{kind}"], description["classes"]
    prompts = {
        name: {"en": [str(row) for row in np.flatnonzero(owner == number)]}
        for number, name in enumerate(classes)
    }

    def embed(texts: list[str], eye: str) -> Any:
        return arrays[f"prompt_emb_{kind}"][[int(text) for text in texts]]

    rows = ensembles(
        prompts, "", ["en"], {"en": "{finding}"}, embed, unit=tiny_flair(Fidelity.released).unit_prototypes
    )
    prototypes = np.stack([rows[name] for name in classes])
    np.testing.assert_allclose(prototypes, arrays[f"prototypes_{kind}"], **TOLERANCE)
    logits = np.exp(arrays["logit_scale_param"]) * arrays["features"] @ prototypes.T
    np.testing.assert_allclose(logits, arrays[f"logits_{kind}"], **FLOAT32)
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(dim=1), arrays[f"probs_{kind}"], **FLOAT32)
    assert tiny_flair().unit_prototypes


@pytest.mark.parametrize(("case", "steps_an_epoch"), [("lr_20its", 20), ("lr_7its", 7)])
def test_released_schedule__a_hundred_epochs_long(case: str, steps_an_epoch: int) -> None:
    arrays, description = load("flair/lr_schedule")
    model = tiny_flair(Fidelity.released)
    model.recipe.optim.warmup_steps, model.total_steps = steps_an_epoch, len(arrays[case])
    factor = model.rate_factor()
    found = [description["base_lr"] * factor(step) for step in range(len(arrays[case]))]
    np.testing.assert_allclose(found, arrays[case], rtol=1e-10)
    corrected = tiny_flair()
    corrected.total_steps = 50
    assert corrected.rate_factor()(49) < 0.01
