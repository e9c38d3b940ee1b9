"""Retrieval against a dense, sorted formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundusfm.evaluation import retrieval
from fundusfm.evaluation.retrieval import chance_recall, measure_retrieval, ranks


def _unit(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    row_ED = rng.normal(size=(num_rows, 8)).astype(np.float32)
    return row_ED / np.linalg.norm(row_ED, axis=1, keepdims=True)


def _dense_ranks(query_ED: np.ndarray, gallery_ED: np.ndarray, groups: list[int]) -> list[int]:
    """Sort the whole gallery and look for the first right answer."""
    found = []
    for query, own in zip(query_ED, groups, strict=True):
        order = np.argsort(-(gallery_ED @ query), kind="stable")
        found.append(1 + [groups[e] == own for e in order].index(True))
    return found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_exams=st.integers(1, 40), num_groups=st.integers(1, 40))
def test_ranks__equal_the_dense_formula(seed: int, num_exams: int, num_groups: int) -> None:
    rng = np.random.default_rng(seed)
    image_ED, text_ED = _unit(rng, num_exams), _unit(rng, num_exams)
    groups = rng.integers(0, num_groups, num_exams).tolist()
    assert ranks(image_ED, text_ED, groups).tolist() == _dense_ranks(image_ED, text_ED, groups)


def test_ranks__same_for_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image_ED, text_ED, groups = _unit(rng, 50), _unit(rng, 50), list(range(50))
    whole = ranks(image_ED, text_ED, groups)
    monkeypatch.setattr(retrieval, "_CHUNK_CELLS", 50 * 7)
    np.testing.assert_array_equal(ranks(image_ED, text_ED, groups), whole)


def test_ranks__a_collapsed_tower_finds_nothing() -> None:
    same_ED = np.ones((30, 4), dtype=np.float32) / 2
    assert ranks(same_ED, same_ED, list(range(30))).tolist() == [30] * 30


def test_measure_retrieval__equal_reports_are_right_for_each_other() -> None:
    rng = np.random.default_rng(0)
    text_ED = _unit(rng, 40)
    text_ED[1] = text_ED[0]
    reports = ["same", "same", *(f"report {n}" for n in range(38))]
    patients = [f"p{n // 2}" for n in range(40)]
    first, second = measure_retrieval(text_ED, text_ED, reports, patients, num_resamples=50, seed=0)
    assert (first.direction, second.direction) == ("image to report", "report to image")
    assert first.recall[1].value == second.recall[1].value == 1.0
    assert (first.num_exams, first.num_reports, first.median_rank) == (40, 39, 1.0)
    noisy_ED = _unit(rng, 40)
    noisy, _ = measure_retrieval(noisy_ED, text_ED, reports, patients, num_resamples=200, seed=0)
    hits = np.asarray(_dense_ranks(noisy_ED, text_ED, [0, 0, *range(1, 39)])) <= 5
    assert noisy.recall[5].value == pytest.approx(hits.mean())
    assert noisy.recall[5].low <= noisy.recall[5].value <= noisy.recall[5].high
    assert noisy.recall[1].value <= noisy.recall[5].value <= noisy.recall[10].value


def test_chance_recall__equals_random_orders() -> None:
    group_E = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    rng = np.random.default_rng(0)
    hits = [(group_E[rng.permutation(12)[:5]] == own).any() for _ in range(4000) for own in group_E]
    assert chance_recall(group_E, 5) == pytest.approx(np.mean(hits), abs=0.01)
    assert chance_recall(np.arange(20), 5) == pytest.approx(0.25)
    assert chance_recall(group_E, 50) == 1.0
