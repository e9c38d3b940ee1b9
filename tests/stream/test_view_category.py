"""Images with one label in words and all as a set; experts' captions; what is refused and what is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fundusfm.errors import UserError
from fundusfm.objectives.flair import FlairConfig
from fundusfm.recipe.schema import DataConfig, Recipe, SourceConfig
from fundusfm.shards.exam import ImageRecord
from fundusfm.shards.index import ShardIndex
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.hashing import generator
from fundusfm.stream.phrasebook import Phrasebook, gather_prompts
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.refusals import Holding
from fundusfm.stream.tokens import Tokens, load_tokens
from fundusfm.stream.view import ViewInputs, labels_of
from fundusfm.stream.view_category import CategoryBatch, CategoryImage, ImageCategoryView
from tests.conftest import Cohort

TEMPLATES = {"en": "It shows {finding}."}


def _config(cohort: Cohort, **changes: object) -> DataConfig:
    sources = [SourceConfig(str(cohort.shards))]
    config = DataConfig(
        sources=sources, tokenizer=str(cohort.tokenizer), image_size=32, context_length=48, languages=["en"]
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def _tokens(cohort: Cohort) -> Tokens:
    return load_tokens(str(cohort.tokenizer), 48)


def _view(cohort: Cohort, *, experts: bool = False, **changes: object) -> ImageCategoryView:
    config, index = _config(cohort, **changes), cohort.index
    book = Phrasebook(index.prompts, config.languages, config.templates, english_names=True)
    return ImageCategoryView(config, _tokens(cohort), book, index.labels, experts=experts)


def _exams(cohort: Cohort, view: ImageCategoryView, number: int = 8) -> list[StoredExam]:
    reader = ShardReader(cohort.index, "train", view, ShardCache(cohort.shards.parent / "cache", 0))
    return [reader.read(slot) for slot in reader.slots()[:number]]


def _items(view: ImageCategoryView, exam: StoredExam, number: int) -> list[CategoryImage]:
    return [view.load(exam, generator(1, draw)) for draw in range(number)]


def test_sentence__names_a_label_of_the_image_by_any_of_its_phrases(synth_cohort: Cohort) -> None:
    view, prompts = _view(synth_cohort, templates=TEMPLATES), synth_cohort.index.prompts
    labels, told = synth_cohort.index.labels, Counter[str]()
    for exam in _exams(synth_cohort, view, 4):
        shown = {n for i in exam.exam.images for n in map(labels.index, labels_of(exam.exam, i) or ())}
        for item in _items(view, exam, 25):
            name = labels[item.category]
            assert item.category in item.labels
            assert set(item.labels) <= shown
            words = str(item.text).removeprefix("It shows ").removesuffix(".")
            assert words in [name.replace("_", " "), *prompts[name]["en"]]
            told[words] += 1
    assert len(told) > 8


def test_evaluation__the_first_of_everything(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    exam = _exams(synth_cohort, view, 1)[0]
    first, again = view.load(exam, None), view.load(exam, None)
    assert (first.text, first.category) == (again.text, again.category)
    assert first.augment is None
    assert first.labels[0] == first.category
    assert str(first.text).startswith("A fundus photograph of ")


def test_collate__sets_and_numbers(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    items = [view.load(exam, generator(2, n)) for n, exam in enumerate(_exams(synth_cohort, view))]
    items[3] = replace(items[3], text=None, labels=(), category=-1)
    batch = view.collate(items, [str(n) for n in range(8)], [])
    assert batch.labels_BC.shape == (8, len(synth_cohort.index.labels))
    assert [tuple(row.nonzero().flatten().tolist()) for row in batch.labels_BC] == [
        tuple(sorted(item.labels)) for item in items
    ]
    assert batch.text_valid_B.tolist() == [n != 3 for n in range(8)]
    assert batch.category_B.tolist() == [item.category for item in items]
    assert not batch.expert_B.any()
    pieces = batch.pieces(3)
    assert [len(piece.keys) for piece in pieces] == [3, 3, 2]
    assert pieces[1].labels_BC.equal(batch.labels_BC[3:6])


def test_expert__speaks_by_its_report(synth_cohort: Cohort) -> None:
    sources = [SourceConfig("public"), SourceConfig(str(synth_cohort.shards), expert=True)]
    view = _view(synth_cohort, experts=True, sources=sources)
    exams = _exams(synth_cohort, view, 30)
    with_report = [exam for exam in exams if exam.exam.texts]
    without = [exam for exam in exams if not exam.exam.texts]
    assert with_report
    assert without
    chosen = [with_report[0], with_report[1], with_report[0], without[0], without[0]]
    batch: CategoryBatch = view.collate([view.load(exam, None) for exam in chosen], list("abcde"), [])
    assert batch.expert_B.all()
    report = next(t for t in with_report[0].exam.texts if t.lang == "en")
    assert view.load(with_report[0], None).text == with_report[0].read(report.name).decode()
    first, second, again, made, made_again = batch.caption_B.tolist()
    assert first == again != second
    assert made == made_again == batch.category_B[3].item() >= 0
    assert min(first, second) > len(synth_cohort.index.labels)
    assert batch.category_B[:3].tolist() == [-1] * 3
    stranger = replace(with_report[0], root="public")
    assert view.load(stranger, None).category >= 0


def test_labelled_images__come_first(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    exam = next(
        e for e in _exams(synth_cohort, view, 30) if sum(i.modality == "CFP" for i in e.exam.images) > 1
    )
    images = [i for i in exam.exam.images if i.modality == "CFP"]
    bare = [replace(i, labels=None if i is images[0] else i.labels) for i in images]
    half = replace(exam, exam=replace(exam.exam, images=tuple(bare)))
    assert all(item.text is not None for item in _items(view, half, 10))
    nothing = replace(exam, exam=replace(exam.exam, images=tuple(replace(i, labels=None) for i in images)))
    item = view.load(nothing, np.random.default_rng(0))
    assert (item.text, item.category, item.labels) == (None, -1, ())


def _held(root: str, labels: dict[str, int], number: int = 5) -> Holding:
    return Holding(root, number, {"left.cfp": 7, "report.en": 3}, labels)


def test_refusal__says_what_is_there(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    assert view.refusal([_held("a", {"drusen": 2})]) is None
    error = view.refusal([_held("a", {})])
    assert error
    assert "no image has a label" in str(error)
    assert "7 of CFP" in str(error)
    assert "no exam" in str(view.refusal([_held("a", {"drusen": 2}, number=0)]))


def test_refusal__of_expert_sets(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort, experts=True)
    assert "marked as the expert set" in str(view.refusal([_held("a", {"drusen": 2})]))
    marked = _view(synth_cohort, experts=True, sources=[SourceConfig("a"), SourceConfig("b", expert=True)])
    assert marked.refusal([_held("a", {"drusen": 2}), _held("b", {})]) is None
    assert "no image has a label" in str(marked.refusal([_held("a", {}), _held("b", {"drusen": 1})]))
    assert "every source" in str(marked.refusal([_held("b", {"drusen": 1})]))


def test_remarks__unknown_labels_once_with_counts(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    held = [_held("a", {"drusen": 2, "odd_thing": 3}), _held("b", {"odd_thing": 1, "rare": 1})]
    assert view.remarks(held) == {
        "no phrases": "2 labels are told by their own name: odd_thing (4), rare (1)"
    }
    assert view.remarks([_held("a", {"drusen": 2})]) == {}
    many = view.remarks([_held("a", {f"x{n}": 1 for n in range(20)})])["no phrases"]
    assert many.endswith("and 8 more")


def test_stream__tells_of_labels_that_the_card_does_not_explain(synth_cohort: Cohort, tmp_path: Path) -> None:
    root = tmp_path / "bare"
    root.mkdir()
    for file in synth_cohort.shards.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    replace(ShardIndex.load(root), prompts={}).save()
    config = _config(synth_cohort, sources=[SourceConfig(str(root))])
    recipe = Recipe(name="x", objective=FlairConfig(name="flair"), data=config)
    stream = Stream(recipe, "image_text", _tokens(synth_cohort))
    assert "told by their own name" in stream.remarks["no phrases"]
    item = stream.view.load(stream.readers[0].read(stream.readers[0].slots()[0]), None)
    assert item.text is not None
    stream.config.prompts = [str(_dictionary(tmp_path, stream.indices[0].labels))]
    assert Stream(recipe, "image_text", _tokens(synth_cohort)).remarks == {}


def _dictionary(folder: Path, labels: tuple[str, ...]) -> Path:
    file = folder / "book.yaml"
    file.write_text("".join(f"{label}: {{en: [sign of {label}]}}\n" for label in labels))
    return file


def test_gather_prompts__cards_and_dictionaries_together(synth_cohort: Cohort, tmp_path: Path) -> None:
    book = tmp_path / "book.yaml"
    book.write_text("drusen: {en: [drusen, my words], fr: [drusen]}\nother: {en: [other]}\n")
    config = _config(synth_cohort, prompts=[str(book)])
    prompts = gather_prompts(config, [synth_cohort.index])
    card = synth_cohort.index.prompts["drusen"]["en"]
    assert prompts["drusen"]["en"] == [*card, "my words"]
    assert prompts["drusen"]["fr"] == ["drusen"]
    assert prompts["other"] == {"en": ["other"]}
    assert "other" not in gather_prompts(config, [synth_cohort.index], synth_cohort.index.labels)
    config.prompts = [str(tmp_path / "none.yaml")]
    with pytest.raises(UserError, match="cannot be read"):
        gather_prompts(config, [])


def test_phrasebook__languages_and_own_names() -> None:
    prompts = {"drusen": {"en": ["pale spots"], "zh": ["玻璃膜疣"]}, "fluid": {"zh": ["积液"]}}
    exam_image = _image()
    both = Phrasebook(prompts, [], english_names=True)
    assert {both.tell("drusen", exam_image, (0.9, d)) for d in (0.0, 0.5, 0.9)} == {"眼底照片显示玻璃膜疣"}
    english = Phrasebook(prompts, ["en"], {"en": "{eye}: {finding}"})
    assert english.tell("drusen", exam_image, (0, 0)) == "Left: drusen"
    assert english.tell("drusen", exam_image, (0, 0.9)) == "Left: pale spots"
    assert english.unknown(["drusen", "fluid", "odd"]) == ["fluid", "odd"]
    assert english.tell("fluid", exam_image, (0, 0.9)) == "Left: fluid"


def _image() -> ImageRecord:
    return ImageRecord("left.cfp.0.jpg", "left", "CFP", 9, 9)


def test_of__as_the_recipe_says(synth_cohort: Cohort) -> None:
    recipe = Recipe(name="x", objective=FlairConfig(name="flair"), data=_config(synth_cohort))
    view = ImageCategoryView.of(ViewInputs(recipe, _tokens(synth_cohort), (synth_cohort.index,)))
    item = view.load(_exams(synth_cohort, view, 1)[0], None)
    assert not item.is_expert
    assert item.category >= 0
