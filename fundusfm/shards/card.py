"""The dataset card: a YAML file that says how a set's own table becomes shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fundusfm.errors import UserError
from fundusfm.recipe.phrases import TEMPLATES
from fundusfm.shards.image import CROPS
from fundusfm.shards.table import COHORT_COLUMNS, EXAM_COLUMNS, nearest

CARD_SUFFIXES = (".yaml", ".yml")


@dataclass
class TextCard:
    """Texts made from labels: prompt dictionary (relative to the card), languages, texts a language."""

    prompts: str = ""
    languages: list[str] = field(default_factory=lambda: ["en"])
    variants: int = 1


@dataclass
class SplitCard:
    """Shares of patients where the table has no split."""

    train: float = 0.8
    val: float = 0.1
    test: float = 0.1


@dataclass
class ExamsCard:
    """A second table, texts or labels per exam: patient_id; optional exam_id, report, lang, label."""

    table: str = ""
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Card:
    """Everything a card may say; paths are relative to the card.

    `columns`: our name -> the table's. `constants`: a column of ours that the table lacks -> its one value.
    `images`: the folder that image paths are relative to, the table's own by default. `drop`: columns not to
    carry. `labels`: the table's label -> ours (empty: no finding). `ordered`: scale -> labels, lowest first.
    """

    name: str = ""
    table: str = ""
    images: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    exams: ExamsCard = field(default_factory=ExamsCard)
    labels: dict[str, str] = field(default_factory=dict)
    ordered: dict[str, list[str]] = field(default_factory=dict)
    text: TextCard = field(default_factory=TextCard)
    crop: str = "none"
    split: SplitCard = field(default_factory=SplitCard)
    licence: str = ""
    citation: str = ""


def load_card(what: Path) -> Card:
    """The card in a YAML file, or the card that a bare table stands for; its paths made absolute.

    UserError lists every problem of the card at once.
    """
    what = what.absolute()
    if what.suffix.lower() not in CARD_SUFFIXES:
        return Card(name=what.stem, table=str(what), images=str(what.parent))
    card = _parse(what)
    problems = _problems(card)
    if problems:
        raise UserError("; ".join(problems), where=str(what), fix="mend the dataset card")
    card.name = card.name or what.stem
    card.table = _beside(what, card.table)
    card.images = _beside(what, card.images) if card.images else str(Path(card.table).parent)
    card.exams.table = _beside(what, card.exams.table) if card.exams.table else ""
    card.text.prompts = _beside(what, card.text.prompts) if card.text.prompts else ""
    return card


def _beside(card: Path, path: str) -> str:
    return str((card.parent / path).resolve())


def _parse(path: Path) -> Card:
    """Every scalar is read as text and typed by the schema, so a label `no` or `0` stays what it is."""
    try:
        content = yaml.load(path.read_text("utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"the dataset card cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the dataset card is no YAML: {error}", where=str(path)) from error
    if not isinstance(content, Mapping):
        raise UserError("the dataset card is no mapping of keys to values", where=str(path))
    problems = _key_problems(content, Card)
    if problems:
        raise UserError("; ".join(problems), where=str(path), fix="mend the dataset card")
    try:
        return cast("Card", OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Card), dict(content))))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"{key}: {str(error).splitlines()[0]}", where=str(path)) from error


def _key_problems(content: Mapping[str, Any], schema: type, prefix: str = "") -> list[str]:
    """Keys that there are not, and keys whose value is no mapping or list where one is due."""
    known = [f.name for f in fields(schema)]
    types = get_type_hints(schema)
    problems = []
    for key, value in content.items():
        if key not in known:
            problems.append(f"there is no key {prefix}{key!r}{nearest(str(key), known)}")
        elif is_dataclass(types[key]) and isinstance(value, Mapping):
            problems += _key_problems(value, cast("type", types[key]), f"{prefix}{key}.")
        elif get_origin(types[key]) is list and not isinstance(value, list):
            problems.append(f"{prefix}{key}: must be a list")
        elif (is_dataclass(types[key]) or get_origin(types[key]) is dict) and not isinstance(value, Mapping):
            problems.append(f"{prefix}{key}: must be a mapping of keys to values")
        elif types[key] == dict[str, str]:
            lists = [name for name, text in value.items() if not isinstance(text, str)]
            problems += [f"{prefix}{key}.{name}: must be one text" for name in lists]
    return problems


def _problems(card: Card) -> list[str]:
    """What the types cannot say."""
    problems = [] if card.table else ["table: names no table"]
    for key, names, known in (
        ("columns", card.columns, COHORT_COLUMNS),
        ("constants", card.constants, COHORT_COLUMNS),
        ("exams.columns", card.exams.columns, EXAM_COLUMNS),
    ):
        problems += [f"{key}: there is no column {n!r}{nearest(n, known)}" for n in names if n not in known]
    problems += [f"{n!r} is both a column and a constant" for n in card.columns if n in card.constants]
    problems += [f"drop: {n!r} is used under `columns`" for n in card.drop if n in card.columns.values()]
    problems += [
        f"text.languages: {language!r} is not one of {', '.join(TEMPLATES)}"
        for language in card.text.languages
        if language not in TEMPLATES
    ]
    if card.crop not in CROPS:
        problems.append(f"crop: {card.crop!r} is not one of {', '.join(CROPS)}")
    shares = (card.split.train, card.split.val, card.split.test)
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        problems.append(f"split: the shares {shares} do not sum to 1")
    if card.text.variants < 1:
        problems.append("text.variants: must be at least 1")
    return problems
