"""Measures of written reports: by the libraries' own corpus numbers, by hand, and in the whole pipeline."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torchmetrics.functional.text import bleu_score

from fundusfm.errors import UserError
from fundusfm.evaluation.captions import (
    DRAWN,
    FREQUENT,
    BleuCounts,
    Written,
    blind_texts,
    check_metrics,
    measure_captions,
    words_of,
)
from fundusfm.evaluation.exams import Report
from fundusfm.evaluation.pipeline import make_exhibits, measure_reading, read
from fundusfm.evaluation.report import number, render
from fundusfm.evaluation.results import PRETRAINED, UNTRAINED, ZERO_SHOT
from fundusfm.evaluation.summary import summary_table
from tests.evaluation import fakes
from tests.evaluation.conftest import FACTS, METRICS
from tests.evaluation.fakes import FakeTower, fake_tokens, make_source

TRUTH = [
    "Right eye: a few microaneurysms in the superior quadrant.",
    "Left eye: drusen at the macula; no haemorrhage.",
    "Both eyes are normal.",
    "Right eye: drusen at the macula.",
]
WRITTEN = [
    "right eye : a few drusen in the superior quadrant .",
    "left eye : drusen at the macula .",
    "both eyes are normal",
    "the the the the",
]


def _measured(texts: list[str], truth: list[str] = TRUTH, num_resamples: int = 50) -> Any:
    reports = [Report(f"{row}", f"patient {row}", text) for row, text in enumerate(truth)]
    return measure_captions(Written(reports, {"x": texts}, {}), num_resamples=num_resamples, seed=0)[0]


def test_words_of__case_punctuation_and_chinese() -> None:
    assert words_of("45-year-old: Cup/disc 0.7.") == ["45", "year", "old", "cup", "disc", "0", "7"]
    assert words_of("右眼：黄斑区drusen，3处。") == ["右", "眼", "黄", "斑", "区", "drusen", "3", "处"]


def test_bleu__that_of_torchmetrics_and_of_the_coco_captions() -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    found = [value.value for value in _measured(WRITTEN).bleu]
    written, truth = ([" ".join(words_of(text)) for text in texts] for texts in (WRITTEN, TRUTH))
    theirs = [float(bleu_score(written, [[t] for t in truth], n_gram=n)) for n in range(1, 5)]
    assert found == pytest.approx(theirs, rel=1e-6)
    given, asked = ({row: [text] for row, text in enumerate(texts)} for texts in (truth, written))
    coco, _ = Bleu(4).compute_score(given, asked, verbose=0)
    assert found == pytest.approx(coco, rel=1e-6)
    assert 0 < found[3] < found[0] < 1


def test_bleu__of_a_resample_is_that_of_the_exams_drawn() -> None:
    written, truth = ([words_of(text) for text in texts] for texts in (WRITTEN, TRUTH))
    weight_RE = np.array([[2.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    drawn = [0, 0, 1, 3]
    wanted = bleu_score([" ".join(written[e]) for e in drawn], [[" ".join(truth[e])] for e in drawn])
    found = BleuCounts.of(written, truth).bleu(weight_RE)
    assert found[0, 3] == pytest.approx(float(wanted), rel=1e-6)
    assert found[1].tolist() == pytest.approx([0.25 * math.exp(1 - 6 / 4), 0, 0, 0])


def test_rouge_l__by_hand() -> None:
    """Longest common subsequences of 8 of 9 and 9, 6 of 6 and 8, 4 of 4 and 4, 1 of 4 and 6 words."""
    found = _measured(WRITTEN).rouge_l.value
    pairs = [(8 / 9, 8 / 9), (6 / 6, 6 / 8), (1.0, 1.0), (1 / 4, 1 / 6)]
    beta = 1.2**2
    assert found == pytest.approx(np.mean([(1 + beta) * p * r / (r + beta * p) for p, r in pairs]))


def test_cider__by_hand() -> None:
    """Three reports of two words: a phrase of one of three weighs ln 3, one of two ln 1.5."""
    truth = ["a b", "a c", "d e"]
    common, rare = math.log(1.5), math.log(3)
    unigrams = common**2 / (common**2 + rare**2)  # "a c" for "a b": they share a
    perfect = (1 + 1) / 4  # of lengths 1 to 4 only two exist
    wanted = [10 * perfect, 10 * unigrams / 4, 0.0]
    found = _measured(["a b", "a b", ""], truth)
    assert found.cider.value == pytest.approx(np.mean(wanted))


def test_measure__the_same_text_is_perfect_and_none_is_nothing() -> None:
    best = _measured(TRUTH)
    assert [v.value for v in (*best.bleu, best.rouge_l)] == pytest.approx([1.0] * 5)
    assert best.rouge_l.low == best.rouge_l.high == 1
    nothing = _measured([""] * 4)
    assert [v.value for v in (*nothing.bleu, nothing.rouge_l, nothing.cider)] == [0.0] * 6
    assert nothing.num_words == 0


def test_blind_texts() -> None:
    train = ["a", "b", "b", "c"]
    found = blind_texts(train, 200, seed=0)
    assert found[FREQUENT] == ["b"] * 200
    assert {*found[DRAWN]} == {"a", "b", "c"}
    assert 70 < found[DRAWN].count("b") < 130
    assert found == blind_texts(train, 200, seed=0) != blind_texts(train, 200, seed=1)
    assert blind_texts([], 3, seed=0) == {}


def test_check_metrics__says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_metrics()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"fundusfm\[captions\]"):
        check_metrics()


class Writer(FakeTower):
    """Sees findings but shares no space with texts; writes what it sees of the left eye."""

    aligns_text, writes_reports = False, True

    def write_reports(self, image_NCHW: torch.Tensor, begin: int, end: int) -> list[list[int]]:
        assert (begin, end) == (1, 2)
        bright = image_NCHW.mean(dim=(1, 2, 3)) > image_NCHW.mean()
        texts = ["Left eye: yellow deposits." if own and self._sees else "blank" for own in bright.tolist()]
        return [list(map(ord, text)) for text in texts]


class WriterTokens:
    """Code points, as the fake tower's."""

    ends = (1, 2)

    def __call__(self, texts: list[str]) -> Any:
        return fake_tokens(texts)

    def text_of(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


class _Plain(Writer):
    writes_reports = False


def _read(kind: type[FakeTower], source: Any) -> Any:
    towers: Any = {PRETRAINED: kind(sees=True), UNTRAINED: kind(sees=False)}
    return read(source, towers, WriterTokens(), lambda text: None)  # type: ignore[arg-type]


class OneImageBatch(fakes.FakeExamBatch):
    """The exam's first image only, as a view of single images gives it."""

    def __init__(self, images: torch.Tensor, keys: list[str]) -> None:
        super().__init__(images[::2], keys)


@pytest.fixture
def _one_image_an_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "FakeExamBatch", OneImageBatch)


@pytest.mark.usefixtures("_one_image_an_exam")
def test_pipeline__reports_are_written_and_measured() -> None:
    source = make_source()
    reading = _read(Writer, source)
    results, measurement = measure_reading(source, reading, FACTS)  # type: ignore[arg-type]
    own = {exam.key: exam.report for exam in source.exams["test"] if exam.report}
    assert {report.key: report.text for report in reading.written.reports} == own
    methods = {found.method: found for found in results.captions}
    assert list(methods) == [PRETRAINED, UNTRAINED, FREQUENT, DRAWN]
    assert methods[PRETRAINED].cider.low > methods[UNTRAINED].cider.high
    train = {exam.report for exam in source.exams["train"]}
    assert {*reading.written.texts[DRAWN]} <= train
    html = render(results, make_exhibits(results, measurement, reading, METRICS))
    assert "Writing reports" in html and "retrieval do not apply" in html
    record = json.loads(results.to_json())["captions"]
    for found in record:
        assert all(number(value["value"]) in html for value in (*found["bleu"], found["cider"]))
    assert html.count("image that was described") >= 8
    assert sum(f"Own report</b>: {text}" in html for text in set(own.values())) >= 4
    with (console := Console(width=90)).capture() as capture:
        console.print(summary_table(results))
    assert number(methods[PRETRAINED].cider.value) in capture.get()


def test_pipeline__an_objective_without_texts_is_probed() -> None:
    source = make_source()
    reading = _read(_Plain, source)
    results, measurement = measure_reading(source, reading, FACTS)  # type: ignore[arg-type]
    assert {m.method for m in results.methods} == {"linear probe", "k-NN", "label share"}
    assert results.find(PRETRAINED, ZERO_SHOT) is None and results.retrieval == results.captions == ()
    html = render(results, make_exhibits(results, measurement, reading, METRICS))
    assert "retrieval do not apply" in html
    assert "Writing reports" not in html and "Finding the report" not in html


@pytest.mark.usefixtures("_one_image_an_exam")
def test_pipeline__nobody_wrote_a_report() -> None:
    source = make_source()
    for exam in source.exams["test"]:
        exam.report = None
    reading = _read(Writer, source)
    results, _ = measure_reading(source, reading, FACTS)  # type: ignore[arg-type]
    assert results.captions == ()
    assert "what was learned was not measured" in "\n".join(results.notes)
