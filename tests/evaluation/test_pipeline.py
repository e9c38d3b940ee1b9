"""The whole pipeline on a fake cohort whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fundusfm.errors import UserError
from fundusfm.evaluation.baselines import color_histogram
from fundusfm.evaluation.pipeline import read
from fundusfm.evaluation.results import HISTOGRAM, NEIGHBOURS, PRETRAINED, PROBE, SOURCE, UNTRAINED, ZERO_SHOT
from tests.evaluation.conftest import Evaluated, run_evaluation
from tests.evaluation.fakes import FINDINGS, GRADES, LABELS, FakeTower, fake_tokens, make_source, make_towers


def test_read__every_image_once_in_order(evaluated: Evaluated) -> None:
    exams, test = evaluated.source.exams["test"], evaluated.reading.splits["test"]
    assert test.facts.keys == [e.key for e in exams for _ in e.pixels]
    assert test.facts.eyes == ["left", "right"] * len(exams)
    image_NCHW = torch.from_numpy(np.stack([p for e in exams for p in e.pixels.values()]))
    np.testing.assert_allclose(test.features[HISTOGRAM], color_histogram(image_NCHW.float() / 255))
    normal_NCHW = evaluated.source.normaliser().normalise(image_NCHW)
    tower = make_towers()[PRETRAINED]
    np.testing.assert_allclose(test.features[PRETRAINED], tower.probe_features(normal_NCHW), rtol=1e-5)
    assert not evaluated.reading.splits["train"].embeddings


def test_read__each_eye_through_its_own_head() -> None:
    class ByEye(FakeTower):
        def embed_images(self, image_NCHW: torch.Tensor, eye: str) -> torch.Tensor:
            return torch.full((len(image_NCHW), 1), {"left": 1.0, "right": 2.0, "": 3.0}[eye])

        def embed_texts(self, token_BT: torch.Tensor, mask_BT: torch.Tensor, eye: str) -> torch.Tensor:
            said = "".join(map(chr, token_BT[0].tolist()))
            assert not eye or said.lower().startswith(eye)
            return torch.ones(len(token_BT), 1)

    source = make_source()
    reading = read(source, {PRETRAINED: ByEye(True)}, fake_tokens, lambda text: None)  # type: ignore[arg-type]
    assert reading.splits["test"].embeddings[PRETRAINED][:4, 0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert set(reading.ensembles[PRETRAINED]) == {"left", "right"}


def test_measure__methods_rank_as_they_must(evaluated: Evaluated) -> None:
    results = evaluated.results
    macro = {(m.tower, m.method): m.scores.macro_auroc.value for m in results.methods}
    assert macro[PRETRAINED, ZERO_SHOT] > 0.9
    assert macro[PRETRAINED, ZERO_SHOT] > macro[UNTRAINED, ZERO_SHOT] + 0.2
    assert macro[PRETRAINED, PROBE] > 0.9 > macro[HISTOGRAM, PROBE]
    assert macro[PRETRAINED, NEIGHBOURS] > 0.9 > macro[HISTOGRAM, NEIGHBOURS]
    assert (HISTOGRAM, ZERO_SHOT) not in macro
    gain = {(d.method, d.against): d.macro_auroc for d in results.differences}[ZERO_SHOT, UNTRAINED]
    assert gain.low > 0
    assert gain.value == pytest.approx(macro[PRETRAINED, ZERO_SHOT] - macro[UNTRAINED, ZERO_SHOT])


def test_measure__labels_of_the_reported_split_alone(evaluated: Evaluated) -> None:
    method = evaluated.results.find(PRETRAINED, ZERO_SHOT)
    assert method is not None
    exams = evaluated.source.exams["test"]
    own = [labels for e in exams for labels in e.labels.values() if labels is not None]
    drusen_N = [("drusen" in labels) for labels in own]
    found = method.scores.labels[LABELS.index("drusen")]
    assert (found.num_positive, found.num_negative) == (sum(drusen_N), len(own) - sum(drusen_N))
    expected = roc_auc_score(drusen_N, method.score_NL[:, LABELS.index("drusen")])
    assert found.auroc.value == pytest.approx(expected)
    assert method.scores.macro_labels == ("normal", *FINDINGS)
    assert method.scores.num_patients == len({e.patient for e in exams if e.labels["left"] is not None})


def test_measure__sources_scales_retrieval_and_notes(evaluated: Evaluated) -> None:
    results = evaluated.results
    source = results.find(SOURCE, "label share")
    assert source is not None
    assert 0.35 < source.scores.macro_auroc.value < 0.65
    assert [s.source for s in results.methods[0].sources] == ["a", "b"]
    assert sum(results.source_counts["drusen"].values()) == results.methods[0].scores.labels[1].num_positive
    kappa = {(s.tower, s.method): s.kappa.value for s in results.scales}
    assert kappa[PRETRAINED, PROBE] > 0.4
    assert (PRETRAINED, ZERO_SHOT) not in kappa  # grades have no prompts here
    assert np.sum(results.scales[0].confusion) == results.scales[0].num_images
    accuracy = results.scales[0].rates["accuracy"]
    assert accuracy.value == np.trace(results.scales[0].confusion) / results.scales[0].num_images
    assert accuracy.low < accuracy.value < accuracy.high
    recall = {(r.tower, r.retrieval.direction): r.retrieval.recall[10].value for r in results.retrieval}
    assert recall[PRETRAINED, "image to report"] > recall[UNTRAINED, "image to report"] + 0.2
    assert results.retrieval[0].retrieval.num_exams == sum(
        e.report is not None for e in evaluated.source.exams["test"]
    )
    notes = "\n".join(results.notes)
    assert "tiny_dots" in notes
    assert "fluid" in notes
    assert "kappa" in notes
    assert [s.role for s in results.splits] == ["fit the probes", "choose C", "report"]


def test_measure__repeats_exactly(evaluated: Evaluated) -> None:
    assert run_evaluation(make_source()).results.to_json() == evaluated.results.to_json()


def test_measure__without_a_test_split_val_chooses_nothing() -> None:
    """Whatever val says, the regularisation stays: it is chosen on patients of train."""
    settings = []
    for seed in (0, 1):
        source = make_source(("train", "val"))
        if seed:
            for exam in source.exams["val"]:
                exam.labels = {
                    eye: (FINDINGS[0], GRADES[0]) if eye == "left" else ("normal",) for eye in exam.labels
                }
        results = run_evaluation(source).results
        settings.append([m.setting for m in results.methods])
        assert results.splits[0].role == "fit the probes, a quarter of patients to choose C"
        assert "no test split" in results.notes[0]
    assert settings[0] == settings[1]


def test_measure__zero_shot_grades_where_grades_have_prompts() -> None:
    phrases = {"dr_none": "nothing abnormal", "dr_mild": "yellow deposits", "dr_severe": "a wide cup"}
    prompts = {name: {"en": [phrase]} for name, phrase in phrases.items()}
    results = run_evaluation(make_source(prompts=prompts)).results
    assert {s.method for s in results.scales if s.tower == PRETRAINED} == {PROBE, ZERO_SHOT}
    assert not results.find(PRETRAINED, ZERO_SHOT).scores.macro_auroc.defined  # type: ignore[union-attr]


def test_measure__without_prompts_reports_or_selection_labels() -> None:
    source = make_source(prompts={})
    for exam in source.exams["val"]:
        exam.labels = dict.fromkeys(exam.labels)
    for exam in source.exams["test"]:
        exam.report = None
    evaluated = run_evaluation(source)
    notes = "\n".join(evaluated.results.notes)
    assert evaluated.results.find(PRETRAINED, ZERO_SHOT) is None
    assert evaluated.results.retrieval == ()
    assert "no prompts" in notes
    assert "written report" in notes
    assert evaluated.results.splits[1].role == "nothing (no labels)"
    assert evaluated.exhibits.sample_method == "the pretrained tower (linear probe)"


def test_read__too_many_unreadable_exams() -> None:
    source = make_source()
    images = source.images

    def with_faults(split: str):  # type: ignore[no-untyped-def]
        for batch in images(split):
            batch.faults = ["torn"]  # type: ignore[list-item]
            yield batch

    source.images = with_faults  # type: ignore[method-assign]
    with pytest.raises(UserError, match="6 of 66 exams of the split 'train' cannot be read"):
        read(source, make_towers(), fake_tokens, lambda text: None)  # type: ignore[arg-type]
    source.recipe.data.error_budget = 0.2
    assert "18 exams" in "\n".join(run_evaluation(source).results.notes)


def test_exhibits__show_the_first_images_and_the_retrieved_reports(evaluated: Evaluated) -> None:
    exhibits = evaluated.exhibits
    assert {label for s in exhibits.samples for label in s.labels} >= {"normal", *FINDINGS, *GRADES}
    shares = [share for sample in exhibits.samples for _, share in sample.top]
    assert all(0 <= share < 1 for share in shares)
    hits = [label in s.labels for s in exhibits.samples for label, share in s.top if share > 0.8]
    assert np.mean(hits) > 0.7
    assert len(exhibits.examples) == 4
    for example in exhibits.examples:
        assert len(example.pictures) == 2
        assert (example.rank == 1) == example.found[0].right or example.rank > 1
        assert all(found.right == (found.text == example.report) for found in example.found)


def test_measure__a_grade_that_no_image_has() -> None:
    """The label list names only what occurs; a scale may go on where the cohort ends."""
    source = make_source(
        ordered={"retinopathy_grade": [*GRADES, "dr_proliferative"]},
        prompts={name: {"en": [name]} for name in ("normal", *GRADES, "dr_proliferative")},
    )
    scales = run_evaluation(source).results.scales
    assert {len(scale.confusion) for scale in scales} == {len(GRADES) + 1}
    assert (PRETRAINED, ZERO_SHOT) in {(scale.tower, scale.method) for scale in scales}
    source = make_source(ordered={"retinopathy_grade": [*GRADES, "dr_proliferative"]})
    assert not any(scale.method == ZERO_SHOT for scale in run_evaluation(source).results.scales)
