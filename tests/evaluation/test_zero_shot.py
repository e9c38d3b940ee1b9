"""Prompts by eye and language, ensembles, and the contrast with `normal`."""

from __future__ import annotations

import numpy as np
import pytest

from fundusfm.errors import UserError
from fundusfm.evaluation.zero_shot import contrast_with_normal, cosines, ensembles, prompt_sentences

PROMPTS = {
    "normal": {"en": ["a healthy eye"]},
    "drusen": {"en": ["drusen", "pale spots"], "zh": ["玻璃膜疣"]},
    "fluid": {"zh": ["积液"]},
}
LABELS = ("normal", "drusen", "fluid")


def _embed(texts: list[str], eye: str) -> np.ndarray:
    """A row a text, of unit length, the same for the same text."""
    rows = [np.random.default_rng([ord(c) for c in text + eye]).normal(size=6) for text in texts]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def test_prompt_sentences__eye_language_template() -> None:
    phrases = PROMPTS["drusen"]
    assert prompt_sentences(phrases, "left", ["en"], {}) == ["Left eye: drusen.", "Left eye: pale spots."]
    assert prompt_sentences(phrases, "right", [], {})[2] == "右眼：玻璃膜疣。"
    assert prompt_sentences(phrases, "left", ["zh"], {"zh": "{finding}@{eye}"}) == ["玻璃膜疣@左眼"]


def test_ensembles__mean_of_unit_rows_normalised() -> None:
    rows = ensembles(PROMPTS, "left", ["en"], {}, _embed)
    assert set(rows) == {"normal", "drusen"}
    mean = _embed(["Left eye: drusen.", "Left eye: pale spots."], "left").mean(axis=0)
    np.testing.assert_allclose(rows["drusen"], mean / np.linalg.norm(mean), rtol=1e-5)
    with pytest.raises(UserError, match="no prompt is in a language"):
        ensembles(PROMPTS, "left", ["fr"], {}, _embed)


def test_cosines__each_image_against_its_own_eye() -> None:
    of_eye = {eye: ensembles(PROMPTS, eye, ["en"], {}, _embed) for eye in ("left", "right", "")}
    eyes = ["right", "left", "", "right"]
    embedding_ND = np.stack([of_eye[eye]["drusen"] for eye in eyes])
    cosine_NL = cosines(embedding_ND, eyes, LABELS, of_eye)
    np.testing.assert_allclose(cosine_NL[:, 1], 1.0, rtol=1e-5)
    assert np.isnan(cosine_NL[:, 2]).all()
    assert (cosines(embedding_ND, eyes[::-1], LABELS, of_eye)[:, 1] < 0.99).any()


def test_contrast_with_normal__cancels_what_pulls_to_every_text() -> None:
    rng = np.random.default_rng(0)
    cosine_NL = rng.normal(size=(20, 3))
    every = np.ones(3, dtype=bool)
    score_NL = contrast_with_normal(cosine_NL, LABELS, every)
    np.testing.assert_allclose(score_NL[:, 1], cosine_NL[:, 1] - cosine_NL[:, 0])
    np.testing.assert_allclose(score_NL[:, 0], cosine_NL[:, 0] - cosine_NL[:, 1:].max(axis=1))
    shifted_NL = cosine_NL + rng.normal(size=(20, 1))
    np.testing.assert_allclose(contrast_with_normal(shifted_NL, LABELS, every), score_NL)


def test_contrast_with_normal__without_normal_the_cosine_stays() -> None:
    cosine_NL = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_array_equal(
        contrast_with_normal(cosine_NL, ("a", "b", "c"), np.ones(3, dtype=bool)), cosine_NL
    )
    only_two = contrast_with_normal(cosine_NL, LABELS, np.array([True, True, False]))
    np.testing.assert_array_equal(only_two[:, 2], cosine_NL[:, 2])
    np.testing.assert_allclose(only_two[:, 0], cosine_NL[:, 0] - cosine_NL[:, 1])
    cosine_NL[:, 0] = np.nan
    np.testing.assert_array_equal(contrast_with_normal(cosine_NL, LABELS, np.ones(3, dtype=bool)), cosine_NL)
