"""What RET-CLIP does with missing eyes and reports, its switches, its temperatures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fundusfm.errors import UserError
from fundusfm.objectives.ret_clip import TERMS, RetClip, RetClipConfig
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.views import LEFT, RIGHT, UNKNOWN, PatientPairBatch
from tests.objectives.tiny import random_batch, tiny_ret_clip


@pytest.fixture
def model() -> RetClip:
    return tiny_ret_clip(temperature_init=14.3).train()


@pytest.fixture
def batch() -> PatientPairBatch:
    return random_batch(8)


def _without(batch: PatientPairBatch, patient: int, eye: int) -> PatientPairBatch:
    kept_N = ~((batch.patient_N == patient) & (batch.eye_N == eye))
    return replace(
        batch, images=batch.images[kept_N], patient_N=batch.patient_N[kept_N], eye_N=batch.eye_N[kept_N]
    )


def test_validity__follows_what_exists(model: RetClip, batch: PatientPairBatch) -> None:
    """Patients in turn have both eyes, the left, the right, an unknown one; every third has no report."""
    features = model.features(batch)
    assert features.image_valid["patient"].all()
    assert features.image_valid["left"].tolist() == [True, True, False, False] * 2
    assert features.image_valid["right"].tolist() == [True, False, True, False] * 2
    assert features.text_valid_B.tolist() == [True, True, False] * 2 + [True, True]
    for term in TERMS:
        norms = features.image[term].norm(dim=1)
        torch.testing.assert_close(norms, features.image_valid[term].float())


def test_absent_eye__changes_nothing_of_other_patients(model: RetClip) -> None:
    whole = random_batch(4, lacking=False)
    all_eyes, one_less = model.features(whole), model.features(_without(whole, 1, RIGHT))
    others = torch.tensor([0, 2, 3])
    for term in TERMS:
        torch.testing.assert_close(one_less.image[term][others], all_eyes.image[term][others])
        torch.testing.assert_close(one_less.text[term], all_eyes.text[term])
    torch.testing.assert_close(one_less.image["left"], all_eyes.image["left"])
    assert not one_less.image_valid["right"][1]
    assert not torch.allclose(one_less.image["patient"][1], all_eyes.image["patient"][1])


def test_patient_alone__equals_the_patient_among_others(model: RetClip, batch: PatientPairBatch) -> None:
    together = model.features(batch)
    for row in range(4):
        alone = model.features(batch.pieces(1)[row])
        for term in TERMS:
            torch.testing.assert_close(alone.image[term][0], together.image[term][row], rtol=1e-4, atol=1e-6)


def test_no_left_eye_anywhere__the_left_head_learns_nothing(model: RetClip, batch: PatientPairBatch) -> None:
    for patient in range(8):
        batch = _without(batch, patient, LEFT)
    batch = batch.pieces(2)[1]  # a right eye with no left one, and an unknown one
    terms = model.loss_terms(replace(batch, text_valid_B=torch.tensor([True, True])))
    assert terms["loss_left"].item() == 0
    assert terms["loss_patient"].item() > 0
    model.total_loss(terms).backward()
    for heads in (model.image_heads, model.text_heads):
        assert all(p.grad is not None and not p.grad.any() for p in heads["left"].parameters())
        assert all(p.grad.any() for p in heads["patient"].parameters())


def test_missing_report__neither_query_nor_candidate(model: RetClip) -> None:
    """The words of a report that is not there are padding: whatever they are, loss and gradients stay."""
    batch = random_batch(5, lacking=False)
    batch.text_valid_B = torch.tensor([True, True, False, True, True])
    results = []
    for word in (7, 9):
        batch.token_BT[2, 1:6] = word
        model.zero_grad()
        loss = model.total_loss(model.loss_terms(batch))
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(*results)
    full = model.total_loss(model.loss_terms(replace(batch, text_valid_B=torch.ones(5, dtype=torch.bool))))
    assert not torch.isclose(full, results[0][0])


def test_unknown_eye__through_the_patient_head_only(model: RetClip) -> None:
    batch = random_batch(4)  # the last patient has an eye of unknown side
    assert batch.eye_N[-1] == UNKNOWN
    features = model.features(batch)
    assert features.image_valid["patient"][3]
    assert not features.image_valid["left"][3]
    assert not features.image_valid["right"][3]
    wanted = model.embed_images(batch.images[-1:], "")
    torch.testing.assert_close(features.image["patient"][3:], wanted, rtol=1e-4, atol=1e-6)


def test_embeddings__the_same_as_in_training(model: RetClip) -> None:
    batch = random_batch(3, lacking=False)
    features = model.features(batch)
    left = batch.images[batch.eye_N == LEFT]
    torch.testing.assert_close(model.embed_images(left, "left"), features.image["left"], rtol=1e-4, atol=1e-6)
    for term in TERMS:
        eye = "" if term == "patient" else term
        found = model.embed_texts(batch.token_BT, batch.mask_BT, eye)  # type: ignore[arg-type]
        torch.testing.assert_close(found, features.text[term])
    image_BD, text_BD = model.embed_exams(batch)
    assert image_BD.equal(features.image["patient"])
    assert text_BD.equal(features.text["patient"])


@pytest.mark.parametrize("lack", ["eye", "report"])
def test_released__refuses_what_the_published_code_cannot(lack: str) -> None:
    model = tiny_ret_clip(Fidelity.released)
    batch = random_batch(3, lacking=False)
    model.features(batch)
    if lack == "eye":
        batch = _without(batch, 2, LEFT)
    else:
        batch.text_valid_B[1] = False
    with pytest.raises(UserError, match="both eyes and a report"):
        model.features(batch)


def test_released__starts_from_half_precision() -> None:
    released, corrected = (tiny_ret_clip(fidelity) for fidelity in (Fidelity.released, Fidelity.corrected))
    for parameter in released.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.equal(parameter.half().float())
    assert released.log_scales["left"].item() == 4.5  # ln 90 = 4.49981
    assert corrected.log_scales["left"].item() == pytest.approx(math.log(90))
    assert any(not p.equal(p.half().float()) for p in corrected.parameters())


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_temperatures__clamped_after_each_step(fidelity: Fidelity) -> None:
    model = tiny_ret_clip(fidelity, temperature_max=50.0, temperature_init=40.0)
    cap = 4.6052 if fidelity is Fidelity.released else math.log(50)
    with torch.no_grad():
        for term, value in zip(TERMS, (9.0, -0.5, 2.0), strict=True):
            model.log_scales[term].fill_(value)
        model.after_step()
    found = [model.log_scales[term].item() for term in TERMS]
    assert found == pytest.approx([cap, 0.0, 2.0])
    assert model.gauges()["scale_right"] == pytest.approx(math.exp(2))


def test_term_weights__scale_their_terms(batch: PatientPairBatch) -> None:
    plain = tiny_ret_clip(temperature_init=14.3)
    weighed = tiny_ret_clip(temperature_init=14.3, patient_weight=2.0, left_weight=3.0, right_weight=0.5)
    terms = plain.loss_terms(batch)
    torch.testing.assert_close(weighed.loss_terms(batch), terms)
    assert plain.total_loss(terms).item() == pytest.approx(sum(t.item() for t in terms.values()))
    wanted = sum(w * t.item() for w, t in zip((2, 3, 0.5), terms.values(), strict=True))
    assert weighed.total_loss(terms).item() == pytest.approx(wanted, rel=1e-5)


NO_PATIENT, NO_EYES = {"patient_weight": 0.0}, {"left_weight": 0.0, "right_weight": 0.0}
LEFT_ALONE = {"patient_weight": 0.0, "right_weight": 0.0}
ABLATIONS = [NO_PATIENT, NO_EYES, LEFT_ALONE]


@pytest.mark.parametrize("weights", ABLATIONS)
def test_weight_0__the_term_is_not_computed(batch: PatientPairBatch, weights: dict[str, float]) -> None:
    plain, ablated = (tiny_ret_clip(temperature_init=14.3, **w).train() for w in ({}, weights))
    dropped = {key.removesuffix("_weight") for key in weights}

    def computed(*_: object) -> None:
        raise AssertionError("a head of a term of weight 0 was called")

    for term in dropped:
        for heads in (ablated.image_heads, ablated.text_heads):
            heads[term].register_forward_hook(computed)
    terms, all_terms = ablated.loss_terms(batch), plain.loss_terms(batch)
    assert terms.keys() == ablated.term_weights().keys() == {f"loss_{t}" for t in {*TERMS} - dropped}
    torch.testing.assert_close(terms, {name: all_terms[name] for name in terms})
    assert {*ablated.gauges()} == {f"scale_{term}" for term in {*TERMS} - dropped}
    ablated.total_loss(terms).backward()
    for name, parameter in ablated.named_parameters():
        of_dropped = name.split(".")[1] in dropped
        assert parameter.requires_grad is not of_dropped, name
        assert (parameter.grad is None) is of_dropped, name
    with torch.no_grad():
        ablated.after_step()
    ablated.load_state_dict(plain.state_dict())  # a file of weights fits every ablation


@pytest.mark.parametrize("weights", ABLATIONS)
def test_weight_0__evaluation_reads_by_what_was_trained(weights: dict[str, float]) -> None:
    model = tiny_ret_clip(temperature_init=14.3, **weights)
    batch = random_batch(3, lacking=False)
    features = model.features(batch)
    left, right = (batch.images[batch.eye_N == eye] for eye in (LEFT, RIGHT))
    embedded = {
        eye: model.embed_images(left if eye == "left" else right, eye) for eye in ("left", "right", "")
    }
    texts = {eye: model.embed_texts(batch.token_BT, batch.mask_BT, eye) for eye in ("left", "right", "")}
    assert len({row.shape for row in [*embedded.values(), *texts.values()]}) == 1
    for row_BD in [*embedded.values(), *texts.values(), *model.embed_exams(batch)]:
        torch.testing.assert_close(row_BD.norm(dim=1), torch.ones(3))
    if "left" in model.terms:
        cosine_B = (features.image["left"] * features.text["left"]).sum(dim=1)
        torch.testing.assert_close((embedded["left"] * texts["left"]).sum(dim=1), cosine_B)
    if weights is NO_PATIENT:
        image_BD, text_BD = model.embed_exams(batch)
        mean_B = sum((features.image[t] * features.text[t]).sum(dim=1) for t in ("left", "right")) / 2
        torch.testing.assert_close((image_BD * text_BD).sum(dim=1), mean_B)


@pytest.mark.parametrize(
    ("objective", "key", "told"),
    [
        ({"temperature_init": 0.0}, "temperature_init", "between 1 and temperature_max = 100"),
        ({"temperature_init": -3.0}, "temperature_init", "between 1"),
        ({"temperature_init": 101.0}, "temperature_init", "between 1"),
        ({"temperature_init": math.nan}, "temperature_init", "between 1"),
        ({"temperature_max": 0.5}, "temperature_max", "at least 1"),
        ({"temperature_max": math.inf}, "temperature_max", "at least 1"),
        ({"left_weight": -1.0}, "left_weight", "at least 0"),
        ({"right_weight": math.nan}, "right_weight", "at least 0"),
        ({**NO_PATIENT, **NO_EYES}, "patient_weight", "nothing would be learned"),
    ],
)
def test_impossible(objective: dict[str, float], key: str, told: str) -> None:
    excuses = RetClipConfig(**objective).impossible()
    assert [*excuses] == [key] and told in excuses[key]


def test_impossible__what_can_be() -> None:
    for objective in ({}, NO_PATIENT, NO_EYES, {"temperature_init": 1.0, "temperature_max": 1.0}):
        assert RetClipConfig(**objective).impossible() == {}


def test_weight_0__exams_without_a_side_teach_nothing() -> None:
    assert RetClipConfig().view_options() == RetClipConfig(**NO_EYES).view_options() == {}
    assert RetClipConfig(**NO_PATIENT).view_options() == {"eyes": (LEFT, RIGHT)}
    assert RetClipConfig(**LEFT_ALONE).view_options() == {"eyes": (LEFT,)}


def test_decay__corrected_spares_vectors_and_positions() -> None:
    model = tiny_ret_clip()
    decayed, spared = ({id(p) for p in group["params"]} for group in model.optimiser_groups())
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        assert (id(parameter) in decayed) is is_matrix, name
