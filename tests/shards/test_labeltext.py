from __future__ import annotations

import re
from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.shards.exam import ImageRecord
from fundusfm.shards.labeltext import load_prompts, texts_from_labels
from tests.conftest import Cohort

PROMPTS = {
    "normal": {"en": ["a healthy retina", "no lesion", "a calm fundus"], "zh": ["正常眼底", "未见病灶"]},
    "drusen": {"en": ["drusen"], "zh": ["玻璃膜疣"]},
    "glaucoma": {"en": ["a large cup", "a thin rim"], "zh": ["视杯扩大"]},
}
DICTIONARY = Path(__file__).parents[2] / "recipes" / "prompts" / "fundus.yaml"


def image(eye: str, *labels: str) -> ImageRecord:
    return ImageRecord(f"{eye}.cfp.0.jpg", eye, "CFP", 8, 8, "", labels)


def test_both_eyes_are_told() -> None:
    images = [image("right", "drusen", "glaucoma"), image("left", "drusen"), image("right", "drusen")]
    (text,) = texts_from_labels(images, None, PROMPTS, "en", 1, 0)
    assert text in (
        "Left eye: drusen. Right eye: drusen, a large cup.",
        "Left eye: drusen. Right eye: drusen, a thin rim.",
    )
    (text,) = texts_from_labels(images, None, PROMPTS, "zh", 1, 0)
    assert text == "左眼：玻璃膜疣。右眼：玻璃膜疣，视杯扩大。"


def test_variants_differ_while_phrases_last() -> None:
    for seed in range(20):
        texts = texts_from_labels([image("left", "normal")], None, PROMPTS, "en", 5, seed)
        assert sorted(texts) == sorted(f"Left eye: {phrase}." for phrase in PROMPTS["normal"]["en"])


def test_labels_of_the_exam_speak_where_no_image_has_its_own() -> None:
    bare = ImageRecord("left.cfp.0.jpg", "left", "CFP", 8, 8, "", None)
    assert texts_from_labels([bare], ["drusen"], PROMPTS, "en", 1, 0) == ["Either eye: drusen."]
    assert texts_from_labels([image("left", "drusen")], ["glaucoma"], PROMPTS, "en", 1, 0) == [
        "Left eye: drusen."
    ]
    assert texts_from_labels([bare, image("right")], None, PROMPTS, "en", 3, 0) == []


def test_missing_phrases_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("drusen: {en: [drusen]}\n")
    with pytest.raises(UserError, match=r"'druse' in 'en' \(did you mean 'drusen'.*'drusen' in 'zh'"):
        load_prompts(path, ["drusen", "druse"], ["en", "zh"])
    path.write_text("drusen: [a]\n")
    with pytest.raises(UserError, match="label -> language -> list of phrases"):
        load_prompts(path, [], [])


def test_shipped_dictionary(synth_cohort: Cohort) -> None:
    prompts = load_prompts(DICTIONARY, [], [])
    # Text for these is made from labels alone, over and over; rarer findings have fewer ways to be put.
    shipped = {*synth_cohort.index.labels, "cataract", "glaucoma", "diabetic_retinopathy"}
    assert shipped <= set(prompts)
    for label, by_language in prompts.items():
        assert set(by_language) == {"en", "zh"}, label
        for language, phrases in by_language.items():
            assert len(phrases) >= (4 if label in shipped else 3), label
            assert len(set(phrases)) == len(phrases), label
            sided = re.compile(r"\b(left|right|eyes?)\b|左|右")
            assert not [phrase for phrase in phrases if sided.search(phrase)], (label, language)
    en = [phrase for by_language in prompts.values() for phrase in by_language["en"]]
    assert len(set(en)) == len(en), "one phrase for two labels makes zero-shot ambiguous"


@pytest.mark.parametrize("phrases", ["a large cup", "{thin: rim}", "[{thin: rim}]"])
def test_phrases_that_are_no_list_are_refused(tmp_path: Path, phrases: str) -> None:
    """A text alone would be a list of letters, and every report one letter."""
    path = tmp_path / "prompts.yaml"
    path.write_text(f"glaucoma:\n  en: {phrases}\n")
    with pytest.raises(UserError, match="list of phrases"):
        load_prompts(path, ["glaucoma"], ["en"])
