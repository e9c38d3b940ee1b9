"""What EyeCLIP makes of exams that lack modalities, eyes or texts; its masking, its switches, its keys."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.objectives import build_objective
from fundusfm.objectives.eyeclip import TERMS, EyeClip, EyeClipConfig
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.view import LEFT, UNKNOWN
from fundusfm.stream.view_multi import ExamBatch, EyeRule, PairRule
from tests.objectives.tiny_eyeclip import CFP, VOCAB_SIZE, random_batch, tiny_eyeclip, tiny_recipe


def _cross_entropy(
    model: EyeClip, rows: list[tuple[Tensor, Tensor, int, int]], extra: list[Tensor]
) -> Tensor:
    """Both directions, row by row: the partner against the seconds (firsts) of all rows that are not alike.

    `rows`: first, second, patient, text (-1: told by the patient alone). `extra`: further firsts.
    """
    scale = model.log_scale.exp()
    losses = []
    for n, (first, second, patient, text) in enumerate(rows):
        others = [
            m for m, row in enumerate(rows) if m != n and row[2] != patient and (text < 0 or row[3] != text)
        ]
        for query, own, side in ((first, second, 1), (second, first, 0)):
            candidates = [own, *(rows[m][side] for m in others), *(extra if side == 0 else [])]
            cosine = torch.stack([scale[0] * query @ one for one in candidates])
            losses.append(cosine.logsumexp(0) - cosine[0])
    return torch.stack(losses).mean()


def _by_hand(model: EyeClip, batch: ExamBatch, pairs: PairRule, eyes: EyeRule) -> dict[str, Tensor]:
    """The contrastive terms by loops over exams and images, from single images and texts."""
    image_ND = model.embed_images(batch.images, "")
    text_BD = model.embed_texts(batch.token_BT, batch.mask_BT, "")
    paired, captioned, silent = [], [], []
    for n, exam in enumerate(batch.exam_N.tolist()):
        patient, text = int(batch.patient_B[exam]), int(batch.text_B[exam])
        if batch.text_valid_B[exam]:
            captioned.append((image_ND[n], text_BD[exam], patient, text))
        else:
            silent.append(image_ND[n])
        for m in range(n + 1, len(batch.exam_N)):
            is_cross = batch.modality_N[n] != batch.modality_N[m] or pairs is PairRule.any
            is_one_eye = (batch.eye_N[n] == batch.eye_N[m] != UNKNOWN) or eyes is EyeRule.any
            if batch.exam_N[m] == exam and is_cross and is_one_eye:
                paired.append((image_ND[n], image_ND[m], patient, -1))
    return {
        "loss_image_image": _cross_entropy(model, paired, []),
        "loss_image_text": _cross_entropy(model, captioned, silent),
    }


@pytest.mark.parametrize("pairs", list(PairRule))
@pytest.mark.parametrize("eyes", list(EyeRule))
def test_contrastive_terms__those_of_loops_over_exams(pairs: PairRule, eyes: EyeRule) -> None:
    model, batch = tiny_eyeclip(pairs=pairs, pair_eyes=eyes).double(), random_batch(9)
    batch.images = batch.images.double()
    terms, wanted = model.loss_terms(batch), _by_hand(model, batch, pairs, eyes)
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=0, msg=name)
    # Nine exams: the first four of `EXAMS` twice, the last once.
    counts = {"cross_modality same": 2 * (3 + 2), "any any": 2 * (3 + 1 + 6) + 1}
    counts |= {"cross_modality any": 2 * (3 + 1 + 5) + 1, "any same": 2 * (3 + 2)}
    assert model.gauges()["num_pairs"] == counts[f"{pairs.value} {eyes.value}"]


def test_reconstruction__hidden_pixels_are_not_seen() -> None:
    """Other pixels in hidden places change the target and nothing that is drawn; seen ones change it."""
    model, batch = tiny_eyeclip().eval(), random_batch(3)
    with torch.no_grad():
        drawn_NPX, masking = model._draw(batch)
        hidden_NHW = masking.hidden_BP.view(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
        noise = torch.randn_like(batch.images)
        elsewhere = replace(batch, images=torch.where(hidden_NHW[:, None], noise, batch.images))
        seen = replace(batch, images=torch.where(hidden_NHW[:, None], batch.images, noise))
        assert model._draw(elsewhere)[0].equal(drawn_NPX)
        assert not torch.isclose(model._draw(seen)[0], drawn_NPX).any(-1).all()
    assert (masking.hidden_BP.sum(1) == 13).all(), "3 of 16 patches stay at a ratio of 0.8"
    for image_PX, hidden_P in zip(drawn_NPX, masking.hidden_BP, strict=True):
        distances = torch.pdist(image_PX[hidden_P])
        assert distances.min() > 1e-4, "every hidden patch is redrawn in its own place"


def test_reconstruction__mean_over_all_hidden_patches() -> None:
    for is_normalised in (False, True):
        model, batch = tiny_eyeclip(normalise_target=is_normalised), random_batch(4)
        drawn_NPX, masking = model._draw(batch)
        patch_NPX = F.unfold(batch.images, 8, stride=8).transpose(1, 2).unflatten(2, (3, 64))
        patch_NPX = patch_NPX.transpose(2, 3).flatten(2)
        if is_normalised:
            mean, variance = patch_NPX.mean(-1, keepdim=True), patch_NPX.var(-1, keepdim=True)
            patch_NPX = (patch_NPX - mean) / (variance + 1e-6).sqrt()
        wanted = (drawn_NPX - patch_NPX)[masking.hidden_BP].square().mean()
        torch.testing.assert_close(model.loss_terms(batch)["loss_reconstruction"], wanted)


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_picture__seen_patches_as_they_are(fidelity: Fidelity) -> None:
    """Two exams, three images and one: a line each of image, what was seen of it, what was made of that."""
    model, batch = tiny_eyeclip(fidelity).eval(), random_batch(5)
    with torch.no_grad():
        picture_CHW = model.pictures(batch)["reconstruction"]
    assert picture_CHW.shape == (3, 4 * 32 + 3 * 4, 3 * 32 + 2 * 4)
    image, seen, redrawn = (picture_CHW[:, :32, start : start + 32] for start in (0, 36, 72))
    is_seen_HW = (seen == image).all(0)
    assert is_seen_HW.float().mean() == pytest.approx(3 / 16, abs=0.01)
    assert redrawn[:, is_seen_HW].equal(image[:, is_seen_HW])
    assert not torch.isclose(redrawn, image)[:, ~is_seen_HW].all()


def test_terms_without_rows__0_and_counted() -> None:
    model, batch = tiny_eyeclip(), random_batch(4, exams=[[(CFP, LEFT)]])
    batch.text_valid_B[:] = False
    terms = model.loss_terms(batch)
    assert terms["loss_image_image"] == terms["loss_image_text"] == 0
    assert terms["loss_reconstruction"] > 0
    model.total_loss(terms).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), (
        "all ranks must agree on that"
    )
    counted = {k: v for k, v in model.gauges().items() if k.startswith("num_")}
    assert counted == {"num_pairs": 0, "num_captions": 0, "num_images": 4}


@pytest.mark.parametrize("fidelity", list(Fidelity))
@pytest.mark.parametrize("left_out", [pair for n in (1, 2) for pair in itertools.combinations(TERMS, n)])
def test_weight_0__not_computed_the_others_as_before(fidelity: Fidelity, left_out: tuple[str, ...]) -> None:
    whole, batch = tiny_eyeclip(fidelity), random_batch(6)
    model = tiny_eyeclip(fidelity, **{f"{term}_weight": 0.0 for term in left_out})
    model.load_state_dict(whole.state_dict())
    terms, wanted = model.loss_terms(batch), whole.loss_terms(batch)
    assert list(terms) == [f"loss_{term}" for term in TERMS if term not in left_out]
    for name, term in terms.items():
        torch.testing.assert_close(term, wanted[name])
    model.total_loss(terms).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), name
        assert (name in model.unused) <= (not parameter.requires_grad), name
    assert ("scale" in model.gauges()) is (len({"image_image", "image_text"} - {*left_out}) > 0)
    assert model.aligns_text is ("image_text" not in left_out)
    assert bool(model.pictures(batch)) is ("reconstruction" not in left_out)


def test_weight_0__its_towers_are_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_eyeclip(image_text_weight=0.0, reconstruction_weight=0.0), random_batch(6)
    for part in (model.text, model.decoder):
        monkeypatch.setattr(part, "forward", None)
    assert model.loss_terms(batch)["loss_image_image"] > 0


def test_pieces__every_image_with_its_exam() -> None:
    batch = random_batch(9)
    pieces = batch.pieces(4)
    assert [len(piece.keys) for piece in pieces] == [4, 4, 1]
    assert torch.cat([piece.images for piece in pieces]).equal(batch.images)
    rows = [piece.exam_N + 4 * number for number, piece in enumerate(pieces)]
    assert torch.cat(rows).equal(batch.exam_N)
    for name in ("slot_N", "modality_N", "eye_N", "mask_seed_N", "patient_B", "text_B", "token_BT"):
        assert torch.cat([getattr(piece, name) for piece in pieces]).equal(getattr(batch, name))


def test_exams__mean_direction_of_their_images() -> None:
    model, batch = tiny_eyeclip().eval(), random_batch(4)
    with torch.no_grad():
        image_BD, text_BD = model.embed_exams(batch)
        image_ND = model.embed_images(batch.images, "")
        for exam in range(4):
            wanted = F.normalize(image_ND[batch.exam_N == exam].mean(0), dim=0)
            torch.testing.assert_close(image_BD[exam], wanted)
        assert text_BD.equal(model.embed_texts(batch.token_BT, batch.mask_BT, "left"))


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_temperature__capped_only_if_corrected(fidelity: Fidelity) -> None:
    model = tiny_eyeclip(fidelity)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
        model.after_step()
    scale = model.gauges()["scale"]
    assert scale == pytest.approx(100 if fidelity is Fidelity.corrected else math.exp(9))
    decayed = model.optimiser_groups()[0]["params"]
    assert any(p is model.log_scale for p in decayed) is (fidelity is Fidelity.released)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_text_weight", {"image_text_weight": -1.0}),
        ("reconstruction_weight", {"reconstruction_weight": math.inf}),
        (
            "reconstruction_weight",
            {"reconstruction_weight": 0.0, "image_image_weight": 0.0, "image_text_weight": 0.0},
        ),
        ("mask_ratio", {"mask_ratio": 1.0}),
        ("decoder_width", {"decoder_width": 20, "decoder_heads": 3}),
        ("decoder_width", {"decoder_width": 18, "decoder_heads": 3}),
        ("decoder_depth", {"decoder_depth": 0}),
        ("temperature_init", {"temperature_init": 200.0}),
    ],
)
def test_impossible_values__named(key: str, values: dict[str, float]) -> None:
    assert key in EyeClipConfig(**values).impossible()  # type: ignore[arg-type]
    assert not EyeClipConfig().impossible()


def test_mask_that_leaves_nothing__refused() -> None:
    with pytest.raises(UserError, match="none of 16 patches"):
        tiny_eyeclip(mask_ratio=0.95)


def test_trunk_without_class_token__refused() -> None:
    recipe = tiny_recipe()
    recipe.model.vision.name = "resnetv2_18"
    recipe.model.vision.options = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}
    with pytest.raises(UserError, match="vision transformer"):
        build_objective(recipe, VOCAB_SIZE)
