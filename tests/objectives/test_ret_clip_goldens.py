"""The objective against numbers of the published code, whole model and four optimiser steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fundusfm.models.published import translate
from fundusfm.objectives.base import warmup_cosine
from fundusfm.objectives.ret_clip import TERMS, RetClip
from fundusfm.recipe.schema import Fidelity, OptimConfig
from tests.goldens import load
from tests.objectives.tiny import golden_batch, tiny_ret_clip


def _with_weights(model: RetClip, arrays: dict[str, np.ndarray], prefix: str) -> RetClip:
    published = {
        k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)
    }
    ours, audit = translate("ret_clip", published)
    assert not audit.unexplained
    model.load_state_dict(ours)
    return model


@pytest.fixture(params=list(Fidelity))
def fidelity(request: pytest.FixtureRequest) -> Fidelity:
    return request.param


def test_forward__features_loss_and_every_gradient(fidelity: Fidelity) -> None:
    arrays, description = load("ret_clip/forward_tiny_f32")
    tolerance = {"rtol": description["suggested_rtol"], "atol": 1e-5}
    model = _with_weights(tiny_ret_clip(fidelity), arrays, "param/").train()
    batch = golden_batch(arrays["in_img_left"], arrays["in_img_right"], arrays["in_tokens"])

    features = model.features(batch)
    for term in TERMS:
        np.testing.assert_allclose(features.image[term].detach(), arrays[f"out_{term}_image"], **tolerance)
        np.testing.assert_allclose(features.text[term].detach(), arrays[f"out_{term}_text"], **tolerance)
    left = torch.from_numpy(arrays["in_img_left"])
    np.testing.assert_allclose(model.probe_features(left).detach(), arrays["single_eye_left"], **tolerance)

    terms = model.loss_terms(batch)
    for term in TERMS:
        np.testing.assert_allclose(terms[f"loss_{term}"].item(), arrays[f"{term}_loss"], **tolerance)
    total = model.total_loss(terms)
    np.testing.assert_allclose(total.item(), arrays["total_loss"], **tolerance)
    total.backward()
    grads, _ = translate(
        "ret_clip",
        {k.removeprefix("grad/"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("grad/")},
    )
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, grads[name], **tolerance, err_msg=name)


def test_four_steps__released() -> None:
    arrays, description = load("ret_clip/train_tiny_4steps_f32")
    tolerance = {"rtol": description["suggested_rtol"], "atol": 2e-4}
    model = _with_weights(tiny_ret_clip(Fidelity.released), arrays, "init/").train()
    setup = model.configure_optimizers()
    optimiser, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    for step in range(4):
        assert optimiser.param_groups[0]["lr"] == pytest.approx(arrays["lr_trace"][step], rel=1e-9)
        scales = [model.log_scales[t].item() for t in TERMS]
        np.testing.assert_allclose(scales, arrays["log_scale_trace"][step], rtol=1e-4)
        batch = golden_batch(*(arrays[k][step] for k in ("in_img_left", "in_img_right", "in_tokens")))
        terms = model.loss_terms(batch)
        loss = model.total_loss(terms)
        found = [loss.item(), *(terms[f"loss_{t}"].item() for t in TERMS)]
        np.testing.assert_allclose(found, arrays["loss_trace"][step], **tolerance)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.after_step()
        schedule.step()
    final, _ = translate(
        "ret_clip",
        {k.removeprefix("final/"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("final/")},
    )
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach(), final[name], **tolerance, err_msg=name)


@pytest.mark.parametrize("case", ["lr_a", "lr_b"])
def test_schedule(case: str) -> None:
    arrays, description = load("ret_clip/lr_schedule")
    sizes = description["cases"][case]
    factor = warmup_cosine(OptimConfig(warmup_steps=sizes["warmup"]), sizes["total"])
    found = [sizes["base"] * factor(step) for step in range(sizes["total"])]
    np.testing.assert_allclose(found, arrays[case], rtol=1e-12, atol=1e-18)


def test_layout_and_decay_groups__published_size() -> None:
    _, description = load("ret_clip/state_dict_layout_vitb16_robertabase")
    entries = description["entries"]
    published = {f"module.{e['key']}": torch.empty(e["shape"], device="meta") for e in entries}
    ours, audit = translate("ret_clip", published)
    assert not audit.unexplained
    assert len(ours) == description["n_keys"]
    assert sum(t.numel() for t in ours.values()) == description["n_params"]

    model = tiny_ret_clip(Fidelity.released)
    for entry in entries:
        own_name = audit.matched[f"module.{entry['key']}"]
        spared = model.no_decay(own_name, torch.nn.Parameter(ours[own_name]))
        assert spared is not entry["weight_decay"], entry["key"]
