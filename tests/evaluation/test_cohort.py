"""Which images are asked what."""

from __future__ import annotations

import numpy as np
import pytest

from fundusfm.errors import UserError
from fundusfm.evaluation.cohort import (
    ImageFacts,
    Plan,
    SplitFeatures,
    findings,
    grades_of,
    plan_splits,
    question_of,
    targets,
)
from tests.evaluation.fakes import GRADES, LABELS, make_index


def _facts(labels: list[tuple[str, ...] | None]) -> ImageFacts:
    names = [f"p{n}" for n in range(len(labels))]
    return ImageFacts(["left"] * len(labels), labels, names, ["a"] * len(labels), names)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val", "test"), Plan("train", "val", "test")),
        (("train", "test"), Plan("train", None, "test")),
        (("train", "val"), Plan("train", None, "val")),
    ],
)
def test_plan_splits__never_chooses_on_what_it_reports(splits: tuple[str, ...], expected: Plan) -> None:
    assert plan_splits(make_index(splits)) == expected


def test_plan_splits__refusals() -> None:
    with pytest.raises(UserError, match="no labels"):
        plan_splits(make_index(labels=()))
    with pytest.raises(UserError, match="only: train"):
        plan_splits(make_index(("train",)))
    with pytest.raises(UserError, match="only: val, test"):
        plan_splits(make_index(("val", "test")))


def test_annotated__drops_images_without_labels_but_keeps_empty_ones() -> None:
    facts = _facts([("drusen",), None, ()])
    features = SplitFeatures(facts, {"t": np.arange(6, dtype=np.float32).reshape(3, 2)})
    kept = features.annotated("test", "here")
    assert kept.facts.patients == ["p0", "p2"]
    assert kept.features["t"].tolist() == [[0, 1], [4, 5]]
    assert targets(kept.facts, ("drusen", "fluid")).tolist() == [[True, False], [False, False]]
    with pytest.raises(UserError, match="no image of the split 'test' is annotated"):
        SplitFeatures(_facts([None]), {}).annotated("test", "here")


def test_question_of__grades_and_what_the_size_cannot_show_leave_the_mean() -> None:
    facts = _facts([("drusen", "dr_none"), ("normal", "dr_mild")])
    question = question_of(make_index(), facts, image_size=24)
    counted = [label for label, counts in zip(LABELS, question.in_macro_L, strict=True) if counts]
    assert counted == ["normal", "drusen", "haemorrhages", "large_cup", "fluid"]
    large = question_of(make_index(image_size=512), facts, image_size=512)
    assert large.in_macro_L[LABELS.index("tiny_dots")]
    # Images stored small show no more when they are read large.
    assert not question_of(make_index(image_size=24), facts, 512).in_macro_L[LABELS.index("tiny_dots")]
    with pytest.raises(UserError, match="has both"):
        question_of(make_index(), _facts([("drusen",), ("drusen",)]), 24)


def test_findings__a_set_of_grades_alone_is_measured_by_them() -> None:
    assert findings(("dr_none", "dr_mild"), {"scale": ["dr_none", "dr_mild"]}).all()
    assert findings(("drusen", "dr_mild"), {"scale": ["dr_mild"]}).tolist() == [True, False]


def test_grades_of__only_images_with_exactly_one_grade() -> None:
    facts = _facts([("dr_mild",), ("drusen",), None, ("dr_none", "dr_mild"), ("drusen", "dr_severe")])
    rows, grade_N = grades_of(facts, GRADES)
    assert (rows.tolist(), grade_N.tolist()) == ([0, 4], [1, 2])
