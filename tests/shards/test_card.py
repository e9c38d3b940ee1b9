from __future__ import annotations

from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.shards.card import load_card
from fundusfm.shards.labeltext import load_prompts

ROOT = Path(__file__).parents[2]


def card_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "set.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_relative_to_the_card(tmp_path: Path) -> None:
    card = load_card(
        card_file(tmp_path, "table: sub/t.csv\ntext: {prompts: p.yaml, languages: [zh], variants: 2}\n")
    )
    assert (card.name, card.table) == ("set", str(tmp_path / "sub" / "t.csv"))
    assert (card.images, card.text.prompts) == (str(tmp_path / "sub"), str(tmp_path / "p.yaml"))
    assert (card.text.languages, card.text.variants, card.split.train) == (["zh"], 2, 0.8)


def test_labels_that_yaml_would_turn_into_something_else_stay_text(tmp_path: Path) -> None:
    card = load_card(card_file(tmp_path, "table: t.csv\nlabels: {no: normal, 0: dr_none, 1.0: x, on: y}\n"))
    assert card.labels == {"no": "normal", "0": "dr_none", "1.0": "x", "on": "y"}


def test_a_table_stands_for_a_card(tmp_path: Path) -> None:
    card = load_card(tmp_path / "cohort.csv")
    assert (card.name, card.table, card.images) == ("cohort", str(tmp_path / "cohort.csv"), str(tmp_path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tablee: t.csv\nsplit: {trainn: 1}\n", ["'tablee' (did you mean 'table'?)", "split.'trainn' (did"]),
        ("table: t.csv\ndrop: age\ntext: en\n", ["drop: must be a list", "text: must be a mapping"]),
        ("table: t.csv\ntext: {variants: many}\n", ["text.variants", "many"]),
        ("table: t.csv\ncolumns: [a]\n", ["columns: must be a mapping"]),
        ("name: x\n", ["names no table"]),
        ("table: t.csv\ncolumns: {img: f}\nconstants: {eyes: left}\n", ["'img'", "'eyes' (did you mean"]),
        ("table: t.csv\ncolumns: {eye: e}\nconstants: {eye: left}\n", ["both a column and a constant"]),
        ("table: t.csv\ncolumns: {eye: e}\ndrop: [e]\n", ["drop: 'e' is used"]),
        ("table: t.csv\ntext: {languages: [en, fr]}\n", ["text.languages: 'fr' is not one of en, zh"]),
        ("table: t.csv\ncrop: circle\n", ["'circle' is not one of none, fov"]),
        ("table: t.csv\nsplit: {train: 0.5, val: 0.1, test: 0.1}\n", ["do not sum to 1"]),
        ("table: t.csv\ntext: {variants: 0}\n", ["at least 1"]),
        ("- a\n", ["no mapping"]),
        ("table: [\n", ["no YAML"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_card(card_file(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)
    assert "set.yaml" in caught.value.where


def test_missing_card(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_card(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "shards").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_cards_load(path: Path) -> None:
    card = load_card(path)
    assert card.name == path.stem
    if card.text.prompts:
        load_prompts(Path(card.text.prompts), card.labels.values(), card.text.languages)
