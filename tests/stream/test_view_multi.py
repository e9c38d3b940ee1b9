"""Several images of an exam: which are drawn, what a batch holds, what is refused; presets by modality."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fundusfm.recipe.schema import AugmentConfig, AugmentOverride, DataConfig
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.hashing import generator, hash_text, hash_words, permutation, uniforms
from fundusfm.stream.loader import TrainStream, World, make_loader
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.refusals import Holding
from fundusfm.stream.tokens import load_tokens
from fundusfm.stream.view_image import ImageOnlyView
from fundusfm.stream.view_multi import ExamBatch, EyeRule, MultiModalView, PairRule
from fundusfm.stream.view_prompt import ImagePromptView
from fundusfm.stream.views import PatientPairView
from tests.conftest import Cohort

MODALITIES = ["CFP", "OCT", "FFA"]
STILL = AugmentConfig((1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0)


def _config(cohort: Cohort, **changes: Any) -> DataConfig:
    given: dict[str, Any] = {"modalities": MODALITIES, "image_size": 32, "context_length": 48}
    return DataConfig(tokenizer=str(cohort.tokenizer), **{**given, **changes})


def _view(cohort: Cohort, options: dict[str, Any] | None = None, **changes: Any) -> MultiModalView:
    config = _config(cohort, **changes)
    return MultiModalView(config, load_tokens(config.tokenizer, config.context_length), **(options or {}))


def _reader(cohort: Cohort, view: Any) -> ShardReader:
    return ShardReader(
        ShardIndex.load(cohort.shards), "train", view, ShardCache(cohort.shards.parent / "cache", 0)
    )


def _stream(cohort: Cohort, view: MultiModalView, world: World = World()) -> TrainStream[Any, Any]:  # noqa: B008
    return TrainStream([(_reader(cohort, view), 1.0)], view, seed=5, batch_size=12, window=2, world=world)


def _tensors(batch: ExamBatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_batches__the_same_on_workers_and_ranks(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    whole = _stream(synth_cohort, view)
    loader = iter(make_loader(whole, workers=2, start=3))
    shares = [_stream(synth_cohort, view, World(rank, 3)) for rank in range(3)]
    for number in (3, 4):
        batch, parts = whole[number], [share[number] for share in shares]
        for name, value in _tensors(next(loader)).items():
            assert value.equal(_tensors(batch)[name]), name
        for name in ("images", "modality_N", "eye_N", "mask_seed_N", "patient_B", "text_B", "text_valid_B"):
            assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(batch, name)), name


def test_batch__images_of_their_exams(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort, max_images_per_exam=3)
    batch = _stream(synth_cohort, view)[0]
    places = list(zip(batch.exam_N.tolist(), batch.slot_N.tolist(), strict=True))
    assert len(set(places)) == len(batch.images)
    assert set(batch.slot_N.tolist()) <= {0, 1, 2}
    assert batch.num_slots == 3
    assert set(batch.modality_N.tolist()) == {0, 1, 2}
    assert batch.text_valid_B.equal(batch.text_B >= 0)
    assert 0 < batch.text_valid_B.sum() < 12
    assert batch.patient_B.min() >= 0


def _exam(*kinds: str) -> Exam:
    """An exam with images by words such as `left.CFP`."""
    images = [
        ImageRecord(
            f"{kind}.{n}", kind.partition(".")[0].replace("unknown", ""), kind.partition(".")[2], 9, 9
        )
        for n, kind in enumerate(kinds)
    ]
    return Exam("patient", "exam", "train", images=tuple(images))


FULL = ["left.CFP", "left.CFP", "right.CFP", "left.OCT", "right.OCT", "right.FFA"]


def test_drawn__every_modality_before_any_twice_and_pairs_of_one_eye(synth_cohort: Cohort) -> None:
    view, seen = _view(synth_cohort, max_images_per_exam=3), Counter()
    for seed in range(60):
        chosen = view._choose_images(_exam(*FULL), generator(seed))
        seen.update(image.name for image in chosen)
        eyes = Counter(image.eye for image in chosen if image.modality in ("CFP", "OCT"))
        assert max(eyes.values()) >= 2, "one eye has both"
        assert [MODALITIES.index(image.modality) for image in chosen] == sorted(
            MODALITIES.index(image.modality) for image in chosen
        )
    assert len(seen) == 6, "every image is drawn some day"
    whole = view._choose_images(_exam("unknown.OCT", "left.CFP"), None)
    assert [image.modality for image in whole] == ["CFP", "OCT"]


def test_published__two_of_all_files(synth_cohort: Cohort) -> None:
    """Five fundus photographs and one scan: ten of the fifteen pairs are of photographs alone."""
    view = _view(synth_cohort, {"published": True})
    exam = _exam(*["left.CFP"] * 5, "left.OCT")
    drawn = [view._choose_images(exam, generator(seed)) for seed in range(600)]
    assert {len(images) for images in drawn} == {2}
    alike = np.mean([all(image.modality == "CFP" for image in images) for images in drawn])
    assert abs(alike - 10 / 15) < 4 * (10 / 15 * 5 / 15 / 600) ** 0.5


def test_evaluation__always_the_same(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    reader = _reader(synth_cohort, view)
    stored = reader.read(reader.slots()[0])
    once, again = (view.load(stored, None) for _ in range(2))
    assert [one.image.mask_seed for one in once.images] == [one.image.mask_seed for one in again.images]
    assert len({one.image.mask_seed for one in once.images}) == len(once.images)
    drawn = [view.load(stored, generator(seed)).images[0].image.mask_seed for seed in range(5)]
    assert len(set(drawn)) == 5


@pytest.mark.parametrize(
    ("pairs", "eyes", "patterns", "is_refused"),
    [
        (PairRule.cross_modality, EyeRule.same, [["left.cfp"], ["left.oct"]], True),
        (PairRule.cross_modality, EyeRule.same, [["left.cfp", "right.oct"]], True),
        (PairRule.cross_modality, EyeRule.any, [["left.cfp", "right.oct"]], False),
        (PairRule.cross_modality, EyeRule.same, [["unknown.cfp", "unknown.oct"]], True),
        (PairRule.cross_modality, EyeRule.any, [["unknown.cfp", "unknown.oct"]], False),
        (PairRule.cross_modality, EyeRule.same, [["left.cfp", "left.faf"]], True),
        (PairRule.cross_modality, EyeRule.same, [["right.cfp"], ["left.cfp", "left.oct"]], False),
        (PairRule.any, EyeRule.any, [["left.cfp", "right.cfp"]], False),
        (PairRule.any, EyeRule.any, [["left.cfp"], ["right.cfp"]], True),
        (None, EyeRule.same, [["left.cfp"]], False),
    ],
)
def test_refusal__no_two_images_that_belong_together(
    synth_cohort: Cohort, pairs: PairRule | None, eyes: EyeRule, patterns: list[list[str]], is_refused: bool
) -> None:
    view = _view(synth_cohort, {"pairs": pairs, "eyes": eyes, "texts": False})
    kinds = Counter(kind for pattern in patterns for kind in pattern)
    held = [Holding("shards", len(patterns), kinds, {}, frozenset(map(frozenset, patterns)))]
    refusal = view.refusal(held)
    assert (refusal is not None) is is_refused
    if refusal is not None:
        assert f"{kinds.total() if len(kinds) == 1 else 1} of CFP" in str(refusal) or "2 of CFP" in str(
            refusal
        )
        assert "+".join(sorted(patterns[0])) in str(refusal)


def test_refusal__two_images_of_one_kind_are_a_pair_of_any(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort, {"pairs": PairRule.any, "eyes": EyeRule.any})
    patterns = frozenset([frozenset(["left.cfp", "report.en"])])
    held = [Holding("shards", 3, {"left.cfp": 4, "report.en": 3}, {}, patterns)]
    assert view.refusal(held) is None
    silent = Holding("shards", 3, {"left.cfp": 4}, {}, frozenset([frozenset(["left.cfp"])]))
    assert "no exam of the train split has a text" in str(view.refusal([silent]))


def test_refusal__a_cohort_without_scans(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort, modalities=["CFP"])
    told = str(view.refusal([_reader(synth_cohort, view).holding]))
    assert "no exam of the train split has two images of two modalities of the same eye among CFP" in told
    counts = Counter(kind.partition(".")[2] for kind in _reader(synth_cohort, view).kinds.elements())
    assert f"{counts['cfp']} of CFP" in told
    assert f"{counts['oct']} of OCT" in told


@pytest.mark.parametrize("name", ["patient_pair", "image_only", "image_prompt", "multi_modal"])
def test_augmentation__by_modality(synth_cohort: Cohort, name: str) -> None:
    """Nothing moves but the brightness of OCT: the option reaches each view."""
    # In lower case, as any spelling of a modality is the same one.
    preset = {"oct": AugmentOverride(brightness=0.5)}
    config = _config(synth_cohort, augment=STILL, augment_by_modality=preset)
    tokens = load_tokens(config.tokenizer, 48)
    views: dict[str, Any] = {
        "patient_pair": PatientPairView(config, tokens),
        "image_only": ImageOnlyView(config),
        "image_prompt": ImagePromptView(config, tokens, {}),
        "multi_modal": MultiModalView(config, tokens),
    }
    view, seen = views[name], set()
    reader = _reader(synth_cohort, view)
    for number, slot in enumerate(reader.slots()[:12]):
        stored = reader.read(slot)
        if name == "patient_pair":  # which does not tell modalities: only scans are read
            view._modalities = {"oct"} if any(i.modality == "OCT" for i in stored.exam.images) else {"cfp"}
            is_scan, augments = view._modalities == {"oct"}, []
            augments = [(is_scan, image[2]) for image in view.load(stored, generator(number)).images]
        else:
            item = view.load(stored, generator(number))
            images = [one.image for one in item.images] if name == "multi_modal" else [item]
            augments = [(image.modality == 1, image.augment) for image in images]
        for is_scan, augment in augments:
            seen.add(is_scan)
            is_still = np.array_equal(augment.color_34, np.eye(3, 4, dtype=np.float32))
            assert is_still is not is_scan
    assert seen == {True, False}


def test_uniforms__one_order_with_the_permutation_of_numpy() -> None:
    words = [hash_words(7, n) for n in range(4)]
    seeds_N = torch.tensor([word - 2**64 if word >> 63 else word for word in words])
    value_NC = uniforms(seeds_N, 300)
    for n, value_C in enumerate(value_NC):
        assert value_C.argsort(stable=True).tolist() == permutation(300, 7, n).tolist()
    assert value_NC.min() >= 0
    assert value_NC.max() < 1
    assert abs(float(value_NC.mean()) - 0.5) < 4 / (12 * 1200) ** 0.5
    assert abs(float(value_NC.var()) - 1 / 12) < 0.01
    assert hash_text("a") != hash_text("b")
    assert 0 <= hash_text("") < 2**63
