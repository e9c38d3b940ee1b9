"""The released EyeCLIP against the published code: each term, the whole loss, gradients of all parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.models import published_eyeclip
from fundusfm.models.masked import hide_patches, num_kept, patchify
from fundusfm.models.positions import sincos_table
from fundusfm.models.published import translate
from fundusfm.models.published_eyeclip import all_tokens, draw_as_published, shifted
from fundusfm.models.weights import load_strictly
from fundusfm.objectives import eyeclip
from fundusfm.objectives.eyeclip import EyeClip
from tests.goldens import load, load_parts
from tests.objectives.tiny_eyeclip import VOCAB_SIZE, golden_batch, golden_recipe

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def _published() -> dict[str, Tensor]:
    arrays, _ = load_parts("eyeclip/tiny_model_weights")
    return {key.removeprefix("w."): torch.from_numpy(array) for key, array in arrays.items()}


def _model(image_size: int = 128) -> EyeClip:
    model = EyeClip(golden_recipe(image_size=image_size), VOCAB_SIZE)
    ours, audit = translate("eyeclip", _published())
    assert not audit.unexplained
    load_strictly(model, ours, "golden")  # type: ignore[arg-type]
    return model.train()


def _noise(monkeypatch: pytest.MonkeyPatch, noise_NP: np.ndarray) -> None:
    """The golden's masking noise, for as many images as there are in the batch."""
    monkeypatch.setattr(eyeclip, "uniforms", lambda seed_N, count: torch.from_numpy(noise_NP)[: len(seed_N)])


def _gradients(model: EyeClip, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by our names, zero where the loss does not reach."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def _compare_gradients(found: dict[str, Tensor], arrays: dict[str, np.ndarray], prefix: str) -> int:
    """Every whole gradient that the golden has, moved to our names and shapes like the weights themselves."""
    theirs = {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith("g.")}
    wanted, audit = translate("eyeclip", {prefix + k: torch.from_numpy(v) for k, v in theirs.items()})
    assert not audit.unexplained
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=2e-3, atol=2e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    return len(wanted)


def _norm(found: dict[str, Tensor], published_name: str) -> float:
    """The norm of a gradient that the golden tells only the norm of."""
    shapes = _published()
    ours, _ = translate("eyeclip", {published_name: torch.zeros_like(shapes[published_name])})
    return float(torch.stack([found[name].double().norm() for name in ours]).norm())


@pytest.mark.parametrize("term", ["image_image", "image_text"])
def test_contrastive_term(term: str) -> None:
    arrays, _ = load(f"eyeclip/{term}_contrastive_seed0")
    first, second = (torch.from_numpy(arrays[f"feat_{n}"]).requires_grad_() for n in (1, 2))
    model = _model()
    model.log_scale.data.fill_(float(arrays["log_scale"]))
    first_BD, second_BD = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    is_pair = term == "image_image"
    ids_B, ones_B = torch.arange(4), torch.ones(4, dtype=torch.bool)
    features = {
        "image": torch.stack([first_BD, second_BD] if is_pair else [first_BD, torch.zeros(4, 16)], dim=1),
        "image_valid": torch.stack([ones_B, ones_B if is_pair else ~ones_B], dim=1),
        "modality": torch.zeros(4, 2, dtype=torch.int64),
        "eye": torch.zeros(4, 2, dtype=torch.int64),
        "error": torch.zeros(4),
        "hidden": torch.zeros(4, dtype=torch.int64),
        "text": second_BD,
        "text_valid": ones_B if not is_pair else ~ones_B,
        "text_id": ids_B,
        "patient": torch.zeros(4, dtype=torch.int64),  # one patient: the published code does not look
    }
    terms = model.terms_of(features)
    other = "image_text" if is_pair else "image_image"
    assert terms[f"loss_{other}"] == terms["loss_reconstruction"] == 0, "a term without rows is 0"
    loss = terms[f"loss_{term}"]
    loss.backward()
    np.testing.assert_allclose(loss.detach(), arrays["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first.grad, arrays["grad_1"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(second.grad, arrays["grad_2"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(model.log_scale.grad, [arrays["grad_logit_scale"]], rtol=1e-4)


def test_reconstruction_branch__every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, description = load("eyeclip/recon_branch_seed0")
    model = _model(image_size=160)
    images, noise_NP = torch.from_numpy(arrays["imgs"]), torch.from_numpy(arrays["noise"])
    masking = hide_patches(noise_NP, [num_kept(25, description["mask_ratio"])])
    np.testing.assert_array_equal(masking.hidden_BP, arrays["mask"].astype(bool))
    np.testing.assert_array_equal(masking.restore_BP, arrays["ids_restore"])
    trunk: Any = model.vision.trunk
    with torch.no_grad():
        token_BPW = all_tokens(trunk, images)
        latent_BKW = token_BPW.gather(1, masking.keep_BK[..., None].expand(-1, -1, 64))
        drawn_BPX = draw_as_published(trunk, model.decoder, images, masking)
        entering_BLV = shifted(model.decoder, model.decoder.embed(latent_BKW), masking)
    np.testing.assert_allclose(token_BPW, arrays["tokens"], **TOLERANCE)
    np.testing.assert_allclose(latent_BKW, arrays["latent"], **TOLERANCE)
    np.testing.assert_allclose(entering_BLV, arrays["decoder_in"], **TOLERANCE)
    np.testing.assert_allclose(drawn_BPX[..., ::16], arrays["pred"], **TOLERANCE)
    np.testing.assert_allclose(drawn_BPX.sum(-1), arrays["pred_sum"], rtol=2e-4, atol=2e-3)
    np.testing.assert_allclose(patchify(images, 32).sum(-1), arrays["target_sum"], rtol=1e-5, atol=1e-3)
    for image_PX, hidden_P in zip(drawn_BPX, masking.hidden_BP, strict=True):
        spread = (image_PX[hidden_P].amax(0) - image_PX[hidden_P].amin(0)).max()
        assert spread <= 1e-5, "the published branch draws one patch everywhere"
    assert not arrays["masked_pred_spread"].any()

    _noise(monkeypatch, arrays["noise"])
    loss = model.loss_terms(golden_batch(arrays["imgs"]))["loss_reconstruction"]
    np.testing.assert_allclose(loss.detach(), arrays["loss"], rtol=1e-5)
    found = _gradients(model, loss)
    assert _compare_gradients(found, arrays, "visual.") == sum(key.startswith("g.") for key in arrays)
    norms = {key.removeprefix("gnorm."): float(a) for key, a in arrays.items() if key.startswith("gnorm.")}
    assert norms
    for name, norm in norms.items():
        assert _norm(found, f"visual.{name}") == pytest.approx(norm, rel=1e-3), name
    untouched = ("vision.trunk.cls_token", "vision.trunk.pos_embed", "vision.proj.weight")
    assert not any(found[name].any() for name in untouched)


def test_reconstruction_branch__with_the_table_that_the_published_code_leaves_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All else being as published: with positions, hidden places no longer come out the same."""
    arrays, description = load("eyeclip/recon_branch_seed0")
    model = _model(image_size=160)
    table_LV = sincos_table(model.decoder.pos_embed.shape[-1], 5).float()
    monkeypatch.setattr(published_eyeclip, "shifted", lambda *given: shifted(*given) + table_LV)
    _noise(monkeypatch, arrays["noise"])
    loss = model.loss_terms(golden_batch(arrays["imgs"]))["loss_reconstruction"]
    np.testing.assert_allclose(loss.detach(), arrays["loss_with_decoder_sincos"], rtol=1e-5)
    masking = hide_patches(torch.from_numpy(arrays["noise"]), [num_kept(25, description["mask_ratio"])])
    trunk: Any = model.vision.trunk
    with torch.no_grad():
        drawn_BPX = draw_as_published(trunk, model.decoder, torch.from_numpy(arrays["imgs"]), masking)
    of_hidden = [image_PX[hidden_P] for image_PX, hidden_P in zip(drawn_BPX, masking.hidden_BP, strict=True)]
    spread = [float((patches - patches[0]).abs().max()) for patches in of_hidden]
    np.testing.assert_allclose(spread, arrays["masked_pred_spread_with_decoder_sincos"], **TOLERANCE)


def test_total_loss__three_loaders_three_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published script draws each term's images by themselves, so each term is taken of its own batch."""
    arrays, description = load_parts("eyeclip/total_loss_seed0")
    model = _model()
    _noise(monkeypatch, np.concatenate([arrays["noise"]] * 2))
    drawn = model.loss_terms(golden_batch(arrays["mae_imgs"]))
    paired = model.loss_terms(golden_batch(arrays["pair_imgs_1"], arrays["pair_imgs_2"]))
    captioned = model.loss_terms(golden_batch(arrays["caption_imgs"], tokens=arrays["caption_tokens"]))
    terms = {
        "loss_reconstruction": drawn["loss_reconstruction"],
        "loss_image_image": paired["loss_image_image"],
        "loss_image_text": captioned["loss_image_text"],
    }
    for name, key in zip(terms, ("loss_recon", "loss_img_img", "loss_img_text"), strict=True):
        np.testing.assert_allclose(terms[name].detach(), arrays[key], rtol=2e-5, err_msg=name)
    assert drawn["loss_image_image"] == drawn["loss_image_text"] == paired["loss_image_text"] == 0
    loss = model.total_loss(terms)
    np.testing.assert_allclose(loss.detach(), arrays["loss_total"], rtol=2e-5)
    for without, lacking in {
        "no_pair": ["loss_image_image"],
        "no_text": ["loss_image_text"],
        "recon_only": ["loss_image_image", "loss_image_text"],
    }.items():
        left = model.total_loss({**terms, **{name: drawn[name] for name in lacking}})
        np.testing.assert_allclose(left.detach(), arrays[f"loss_total_{without}"], rtol=2e-5, err_msg=without)
    masking = hide_patches(torch.from_numpy(arrays["noise"]), [num_kept(16, description["mask_ratio"])])
    np.testing.assert_array_equal(masking.hidden_BP, arrays["mask"].astype(bool))
    found = _gradients(model, loss)
    assert _compare_gradients(found, arrays, "") >= 13
    for name, norm in zip(description["grad_norm_names"], arrays["grad_norms"], strict=True):
        assert _norm(found, name) == pytest.approx(norm, rel=1e-3), name


def test_features() -> None:
    arrays, _ = load_parts("eyeclip/total_loss_seed0")
    model = _model().eval()
    batch = golden_batch(arrays["caption_imgs"], tokens=arrays["caption_tokens"])
    with torch.no_grad():
        feature_BD = model.probe_features(batch.images)
        text_BD = model.text_head(model.text(batch.token_BT, batch.mask_BT))
        rows = model.embed_exams(batch)
    np.testing.assert_allclose(feature_BD, arrays["feat_img"], **TOLERANCE)
    np.testing.assert_allclose(text_BD, arrays["feat_text"], **TOLERANCE)
    similarity_BB = model.contrast_scale("") * rows[0] @ rows[1].T
    np.testing.assert_allclose(similarity_BB, arrays["logits_img_text"], **TOLERANCE)
    with torch.no_grad():
        pair = [model.embed_images(torch.from_numpy(arrays[f"pair_imgs_{n}"]), "") for n in (1, 2)]
    similarity_BB = model.contrast_scale("") * pair[0] @ pair[1].T
    np.testing.assert_allclose(similarity_BB, arrays["logits_img_img"], **TOLERANCE)
    torch.testing.assert_close(rows[0], F.normalize(feature_BD, dim=-1))
    torch.testing.assert_close(rows[1], F.normalize(text_BD, dim=-1))
    torch.testing.assert_close(rows[0], model.embed_images(batch.images, "left"))
    torch.testing.assert_close(rows[1], model.embed_texts(batch.token_BT, batch.mask_BT, ""))
