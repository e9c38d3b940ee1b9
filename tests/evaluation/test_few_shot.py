"""Few-shot reading: FLAIR's published numbers, what is learned from, and what it brings on a known cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.evaluation import evaluate as evaluate_module
from fundusfm.evaluation.adapters import ClipAdapter, Prototypes, Rows, learn_keys, tip_logits
from fundusfm.evaluation.few_shot import (
    Embedded,
    Phrases,
    adapter_scores,
    draw_support,
    fit_probe,
    probe_scores,
)
from fundusfm.evaluation.report import render
from fundusfm.evaluation.results import (
    CLIP_ADAPTER,
    FEW_SHOT,
    HISTOGRAM,
    PRETRAINED,
    TIP_ADAPTER,
    TIP_ADAPTER_F,
    UNTRAINED,
)
from fundusfm.recipe.schema import Fidelity, Recipe
from tests.evaluation.conftest import Evaluated, run_evaluation
from tests.evaluation.fakes import FINDINGS, make_source
from tests.goldens import load

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("kind", ["", "_binary"])
def test_golden__linear_probe(kind: str) -> None:
    arrays, _ = load("flair/linear_probe_seed0")
    label_S = arrays["train_y"] % 2 if kind else arrays["train_y"]
    probe = fit_probe(arrays["train_x"], label_S)
    np.testing.assert_allclose(probe.coef_, arrays[f"weight{kind}"], **TOLERANCE)
    np.testing.assert_allclose(probe.intercept_, arrays[f"bias{kind}"], **TOLERANCE)
    np.testing.assert_allclose(probe.predict_proba(arrays["test_x"]), arrays[f"probs{kind}"], **TOLERANCE)


def _golden(name: str) -> tuple[dict[str, Tensor], Rows, Rows, Prototypes]:
    """Arrays, support and test rows, prototypes; one kind of eye."""
    arrays, description = load(f"flair/{name}")
    golden = {key: torch.from_numpy(array) for key, array in arrays.items()}
    support, asked = (
        Rows(golden[key], torch.zeros(len(golden[key]), dtype=torch.int64)) for key in ("train_x", "test_x")
    )
    scale_E = torch.tensor([description["logit_scale_param"]]).exp()
    return golden, support, asked, Prototypes(golden["text"][None], scale_E)


def test_golden__clip_adapter() -> None:
    golden, support, asked, prototypes = _golden("clip_adapter_seed0")
    adapter = ClipAdapter(16)
    adapter.load_state_dict({f"{n}.weight": golden[f"w_{n}_init"] for n in ("down", "up")})
    logits = {"before": adapter.logits(asked, prototypes)}
    adapter.learn(support, golden["train_y"], prototypes, golden["order"].tolist())
    logits["after"] = adapter.logits(asked, prototypes)
    for when, found in logits.items():
        torch.testing.assert_close(found.detach(), golden[f"logits_{when}"], rtol=1e-5, atol=1e-4)
    for name in ("down", "up"):
        found = getattr(adapter, name).weight.detach()
        torch.testing.assert_close(found, golden[f"w_{name}"], rtol=1e-5, atol=1e-6)


def test_golden__tip_adapter_and_its_trained_keys() -> None:
    golden, support, asked, prototypes = _golden("tip_adapter_seed0")
    class_SK = F.one_hot(golden["train_y"]).float()
    free = tip_logits(asked, support.row_ND, class_SK, prototypes)
    torch.testing.assert_close(free, golden["logits_free"], rtol=1e-5, atol=1e-4)
    order = golden["order"].tolist()
    keys_SD = learn_keys(support, class_SK, prototypes, order, released=True)
    torch.testing.assert_close(keys_SD, golden["keys_trained"], rtol=1e-5, atol=1e-6)
    trained = tip_logits(asked, keys_SD, class_SK, prototypes)
    torch.testing.assert_close(trained, golden["logits_trained"], rtol=1e-5, atol=1e-4)
    assert support.row_ND.equal(golden["train_x"]), "the questions are those of the caller"


def test_learn_keys__corrected_minimises_what_is_read_in_the_end() -> None:
    golden, support, _, prototypes = _golden("tip_adapter_seed0")
    class_SK, order = F.one_hot(golden["train_y"]).float(), golden["order"].tolist()
    losses = {}
    for released in (True, False):
        keys_SD = learn_keys(support, class_SK, prototypes, order, released=released)
        losses[released] = F.cross_entropy(
            tip_logits(support, keys_SD, class_SK, prototypes), golden["train_y"]
        )
    before = F.cross_entropy(tip_logits(support, support.row_ND, class_SK, prototypes), golden["train_y"])
    assert losses[False] < losses[True]
    assert losses[False] < before


def test_draw_support__images_that_show_one_asked_label_alone() -> None:
    rng = np.random.default_rng(0)
    target_NL = rng.random((400, 5)) < 0.3
    asked_L = np.array([True, True, False, True, False])
    support = draw_support(target_NL, asked_L, 6, seed=1)
    assert support.labels.tolist() == [0, 1, 3]
    assert np.bincount(support.label_S).tolist() == [6, 6, 0, 6]
    shown = target_NL[support.row_S] & asked_L
    assert (shown.sum(axis=1) == 1).all()
    assert (shown.argmax(axis=1) == support.label_S).all()
    again, other = (draw_support(target_NL, asked_L, 6, seed=seed) for seed in (1, 2))
    assert again.row_S.tolist() == support.row_S.tolist() != other.row_S.tolist()
    target_NL[:, 1] = False
    assert draw_support(target_NL, asked_L, 6, seed=1).labels.tolist() == [0, 3]


def test_probe_scores__labels_without_support_have_none() -> None:
    rng = np.random.default_rng(0)
    target_NL = np.eye(4, dtype=bool)[rng.integers(0, 3, 60)]
    feature_NF = target_NL[:, :3] + rng.normal(0, 0.1, (60, 3)).astype(np.float32)
    support = draw_support(target_NL, np.ones(4, dtype=bool), 5, seed=0)
    score_NL = probe_scores(feature_NF, support, feature_NF, 4)
    assert np.isnan(score_NL[:, 3]).all()
    np.testing.assert_allclose(score_NL[:, :3].sum(axis=1), 1)
    assert (score_NL[:, :3].argmax(axis=1) == target_NL.argmax(axis=1)).mean() > 0.95


def test_adapter_scores__each_image_by_the_phrases_of_its_own_eye() -> None:
    """The phrases of one eye are the other's, exchanged, and so are the images: read by eye, all is well."""
    width = np.eye(4, dtype=np.float32)
    rows = {"left": {"a": width[0], "b": width[1]}, "right": {"a": width[1], "b": width[0], "c": width[2]}}
    phrases = Phrases(rows, {"left": 10.0, "right": 10.0})
    eyes, label_N = ["left", "right"] * 20, np.arange(40) // 2 % 2
    row_ND = np.asarray([rows[eye]["ab"[label]] for eye, label in zip(eyes, label_N, strict=True)])
    images = Embedded(row_ND, eyes)
    target_NL = np.eye(3, dtype=bool)[label_N]
    support = draw_support(target_NL, np.ones(3, dtype=bool), 8, seed=0)
    options: dict[str, Any] = {"seed": 0, "released": False}
    scores = adapter_scores(images, support, images, phrases, ("a", "b", "c"), **options)
    assert list(scores) == [CLIP_ADAPTER, TIP_ADAPTER, TIP_ADAPTER_F]
    for name, score_NL in scores.items():
        assert np.isnan(score_NL[:, 2]).all(), "c has no phrase about a left eye"
        assert (score_NL[:, :2].argmax(axis=1) == label_N).all(), name
    assert adapter_scores(images, support, images, phrases, ("a", "x", "y"), **options) == {}


@pytest.fixture(scope="module")
def with_shots() -> Evaluated:
    source = make_source()
    source.recipe.evaluation.shots = 6
    return run_evaluation(source)


def test_evaluate__few_shot_methods_beside_the_others(with_shots: Evaluated, evaluated: Evaluated) -> None:
    macro = {(m.tower, m.method): m.scores.macro_auroc.value for m in with_shots.results.methods}
    added = macro.keys() - {(m.tower, m.method) for m in evaluated.results.methods}
    adapters = (CLIP_ADAPTER, TIP_ADAPTER, TIP_ADAPTER_F)
    towers = (PRETRAINED, UNTRAINED)
    assert added == {(t, m) for t in towers for m in (FEW_SHOT, *adapters)} | {(HISTOGRAM, FEW_SHOT)}
    for method in (FEW_SHOT, *adapters):
        assert macro[PRETRAINED, method] > 0.85, method
        assert macro[PRETRAINED, method] > macro[UNTRAINED, method]
    assert {m.setting for m in with_shots.results.methods if m.method in adapters} == {
        "24 images of 4 labels"
    }
    assert with_shots.results.find(PRETRAINED, FEW_SHOT).scores.macro_labels == ("normal", *FINDINGS)  # type: ignore[union-attr]
    html = render(with_shots.results, with_shots.exhibits)
    assert all(f"<td>{method}<small>24 images of 4 labels" in html for method in (FEW_SHOT, *adapters))
    assert "trains its keys" in html
    gains = {(d.method, d.against) for d in with_shots.results.differences}
    assert {(m, UNTRAINED) for m in (FEW_SHOT, *adapters)} <= gains


def test_evaluate__released_learns_other_keys(with_shots: Evaluated) -> None:
    source = make_source()
    source.recipe.evaluation.shots = 6
    source.recipe.objective.fidelity = Fidelity.released
    released = run_evaluation(source).results
    for method, same in ((TIP_ADAPTER, True), (TIP_ADAPTER_F, False)):
        pair = [r.find(PRETRAINED, method).score_NL for r in (released, with_shots.results)]  # type: ignore[union-attr]
        assert np.array_equal(*pair, equal_nan=True) is same


def test_evaluate__without_phrases_the_probe_alone_and_without_images_a_note() -> None:
    source = make_source(prompts={})
    source.recipe.evaluation.shots = 6
    results = run_evaluation(source).results
    assert results.find(PRETRAINED, FEW_SHOT) is not None
    assert results.find(PRETRAINED, CLIP_ADAPTER) is None
    for exam in source.exams["train"]:
        exam.labels = {eye: FINDINGS if own else own for eye, own in exam.labels.items()}
    source.exams["train"][0].labels = {"left": ("normal",), "right": ("normal",)}
    results = run_evaluation(source).results
    assert results.find(PRETRAINED, FEW_SHOT) is None
    assert "no few-shot reading" in "\n".join(results.notes)


@pytest.mark.parametrize(("asked", "used"), [(None, 3), (8, 8), (0, 0)])
def test_evaluate__shots_of_the_command_before_those_of_the_recipe(
    asked: int | None, used: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = Recipe(name="run")
    recipe.evaluation.shots = 3
    for name in ("verify", "check_out", "load_tokens", "_towers"):
        monkeypatch.setattr(evaluate_module, name, Mock())
    monkeypatch.setattr(evaluate_module, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(evaluate_module.ShardIndex, "load", lambda root: make_source().index)
    monkeypatch.setattr(evaluate_module, "load_objective", lambda folder: (Mock(), recipe))
    monkeypatch.setattr(evaluate_module, "read", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        evaluate_module.evaluate(tmp_path / "run" / "checkpoints" / "step-1", "shards", shots=asked)
    assert recipe.evaluation.shots == used
