"""The cohort as a source: the same bytes everywhere, whole exams, honest card."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, JpegImagePlugin

from fundusfm.errors import UserError
from fundusfm.shards.exam import Exam
from fundusfm.shards.synth import SynthSource, synthesise
from fundusfm.shards.synth.findings import DR_GRADES, FINDINGS, VISIBLE

SOURCE = SynthSource(patients=40, seed=3, size=64)


def fingerprint(number: int) -> str:
    draft, _ = SOURCE.load(number)
    assert draft is not None
    digest = hashlib.sha256(draft.exam.to_json())
    for name in sorted(draft.contents):
        digest.update(name.encode() + draft.contents[name])
    return digest.hexdigest()


def test_load__same_bytes_in_any_process_and_order() -> None:
    here = [fingerprint(number) for number in range(8)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        there = pool.map(fingerprint, reversed(range(8)))
    assert here == there[::-1]
    assert len(set(here)) == 8


def test_load__a_larger_cohort_keeps_its_patients() -> None:
    larger = SynthSource(patients=400, seed=3, size=64)
    assert larger.load(7) == SOURCE.load(7)
    assert larger.splits()[:40] == SOURCE.splits()


@pytest.mark.parametrize("other", [{"seed": 4}, {"size": 65}])
def test_load__seed_and_size_change_the_picture(other: dict[str, int]) -> None:
    changed = SynthSource(**{"patients": 40, "seed": 3, "size": 64, **other})
    assert changed.load(0) != SOURCE.load(0)
    assert changed.digest != SOURCE.digest


def test_load__truth_does_not_depend_on_the_size() -> None:
    for number in range(5):
        small, large = SOURCE.load(number)[0], SynthSource(patients=40, seed=3, size=96).load(number)[0]
        assert small is not None
        assert large is not None
        assert small.exam.extra == large.exam.extra


def test_load__exam_matches_its_contents() -> None:
    kinds: Counter[str] = Counter()
    for number in range(40):
        draft, rejects = SOURCE.load(number)
        assert draft is not None
        assert not rejects
        exam = draft.exam
        assert Exam.from_json(exam.to_json()) == exam
        assert {i.name for i in exam.images} | {t.name for t in exam.texts} == set(draft.contents)
        kinds.update(i.modality for i in exam.images)
        kinds.update(t.lang for t in exam.texts)
        for image in exam.images:
            picture = Image.open(io.BytesIO(draft.contents[image.name]))
            assert picture.size == (image.width, image.height) == (64, 64)
            told = {r["finding"] for r in exam.extra["truth"] if r["eye"] == image.eye}
            assert set(image.labels or ()) & set(FINDINGS) == told & set(VISIBLE[image.modality])
            if image.modality != "OCT":
                assert exam.extra["dr_grade"][image.eye] in (image.labels or ())
    assert min(kinds[k] for k in ("CFP", "OCT", "FFA", "en", "zh")) > 0
    assert kinds["en"] == kinds["zh"] < 40


def test_load__jpeg_keeps_full_colour() -> None:
    draft, _ = SOURCE.load(0)
    assert draft is not None
    picture = Image.open(io.BytesIO(draft.contents[draft.exam.images[0].name]))
    assert picture.mode == "RGB"
    assert JpegImagePlugin.get_sampling(picture) == 0


def test_splits__seven_one_two_of_ten() -> None:
    splits = SynthSource(patients=200, seed=1, size=64).splits()
    assert Counter(splits) == {"train": 140, "val": 20, "test": 40}
    assert Counter(splits[:10]) == {"train": 7, "val": 1, "test": 2}


def test_source__pickles() -> None:
    again = pickle.loads(pickle.dumps(SOURCE))
    assert again.digest == SOURCE.digest
    assert again.load(2) == SOURCE.load(2)


def test_card__prompts_and_scale_cover_the_labels() -> None:
    card = SOURCE.card()
    assert set(card["prompts"]) == set(card["labels"])
    assert card["ordered"]["diabetic_retinopathy_grade"] == list(DR_GRADES)
    assert "CC0" in card["licence"]
    assert card["image_size"] == 64


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"size": 8}, {"seed": -1}, {"seed": 2**64}])
def test_source__refuses_what_cannot_be_drawn(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="to do"):
        SynthSource(**{"patients": 3, "seed": 0, "size": 64, **wrong})


def test_synthesise__same_shards_whatever_the_workers(tmp_path: Path) -> None:
    first = synthesise(tmp_path / "a", patients=20, seed=3, size=64, workers=1, exams_per_shard=8)
    second = synthesise(tmp_path / "b", patients=20, seed=3, size=64, workers=2, exams_per_shard=8)
    assert [s.sha256 for s in first.shards] == [s.sha256 for s in second.shards]
    assert first.digest == second.digest
    assert sum(s.num_exams for s in first.shards) == 20
