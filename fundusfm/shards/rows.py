"""Text cells to typed rows of a cohort; what cannot be used becomes a reject with its reason."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fundusfm.shards.draft import Reject
from fundusfm.shards.table import COHORT_COLUMNS, Cells

DEFAULT_MODALITY = "CFP"
_EYES = {"": ""} | dict.fromkeys(("left", "l", "os", "左", "左眼"), "left")
_EYES |= dict.fromkeys(("right", "r", "od", "右", "右眼"), "right")
_SPLITS = {"": "", "train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
_WORD = re.compile(r"[\w-]+")  # what may stand between the dots of a member name
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class Row:
    """One image of the cohort. `number` counts from 1 under the header; `image` is relative to the folder."""

    number: int
    image: str
    patient_id: str
    exam_id: str
    eye: str
    modality: str
    labels: tuple[str, ...] | None
    report: str
    lang: str
    split: str
    source: str
    extra: dict[str, str]


class RowError(ValueError):
    """A row that cannot be used; the text is the reason, in a form that can be counted."""


def read_rows(
    cells: Sequence[Cells], folder: Path, label_names: Mapping[str, str]
) -> tuple[list[Row], list[Reject]]:
    """Rows whose image file exists under `folder`, and the rejects.

    `label_names`: labels of the table -> labels of the set, others stay.
    """
    seen: dict[str, Row] = {}
    rejects = []
    for number, record in enumerate(cells, 1):
        row = _typed_or_reject(number, record, folder, label_names)
        if isinstance(row, Reject):
            rejects.append(row)
        elif row.image in seen:
            rejects.append(Reject(number, row.image, "the image is listed twice"))
        else:
            seen[row.image] = row
    return _one_split_a_patient(list(seen.values()), rejects)


def split_labels(cell: str, names: Mapping[str, str]) -> tuple[str, ...] | None:
    """`a|b` -> ("a", "b"); None for an empty cell: nobody annotated. A name mapped to nothing is left out."""
    found = [label.strip() for label in cell.split("|") if label.strip()]
    mapped = [names.get(label, label) for label in found]
    return tuple(dict.fromkeys(label for label in mapped if label)) if found else None


def language_of(text: str, lang: str) -> str:
    """The given language, else `zh` for a text with Chinese characters and `en` for others."""
    if not lang:
        return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
    if not _WORD.fullmatch(lang):
        raise RowError("the language code has characters other than letters, digits, - and _")
    return lang.lower()


def _typed_or_reject(
    number: int, record: Cells, folder: Path, label_names: Mapping[str, str]
) -> Row | Reject:
    try:
        return _typed(number, record, folder, label_names)
    except RowError as error:
        return Reject(number, record.get("image", ""), str(error))


def _typed(number: int, record: Cells, folder: Path, label_names: Mapping[str, str]) -> Row:
    known = {name: record.get(name, "") for name in COHORT_COLUMNS}
    if not known["patient_id"]:
        raise RowError("the patient id is empty")
    eye, split = _EYES.get(known["eye"].lower()), _SPLITS.get(known["split"].lower())
    if eye is None:
        raise RowError("the eye is not left, right, L, R, OS, OD or empty")
    if split is None:
        raise RowError("the split is not train, val, test or empty")
    modality = known["modality"] or DEFAULT_MODALITY
    if not _WORD.fullmatch(modality):
        raise RowError("the modality has characters other than letters, digits, - and _")
    return Row(
        number=number,
        image=_existing(_relative(known["image"]), folder),
        patient_id=known["patient_id"],
        exam_id=known["exam_id"],
        eye=eye,
        modality=modality,
        labels=split_labels(known["label"], label_names),
        report=known["report"],
        lang=language_of(known["report"], known["lang"]),
        split=split,
        source=known["source"],
        extra={k: v for k, v in record.items() if k not in known and v},
    )


def _relative(path: str) -> str:
    """A path with forward slashes that stays inside its folder; Windows paths are understood."""
    path = path.replace("\\", "/")
    if not path:
        raise RowError("the image path is empty")
    if path.startswith("/") or _DRIVE.match(path):
        raise RowError("the image path is absolute; paths are relative to the table")
    path = posixpath.normpath(path)
    if path == ".." or path.startswith("../"):
        raise RowError("the image path leaves the folder of the table")
    return path


def _existing(path: str, folder: Path) -> str:
    """The path, or the same name in the Unicode form that the file system has it in (macOS decomposes)."""
    forms = (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
    try:
        found = next((form for form in forms if (folder / form).is_file()), None)
    except (OSError, ValueError) as error:  # a name too long, a zero byte
        raise RowError("the image path is not a possible file name") from error
    if found is None:
        raise RowError("the file does not exist")
    return found


def _one_split_a_patient(rows: list[Row], rejects: list[Reject]) -> tuple[list[Row], list[Reject]]:
    """Rows without a split take the one that their patient has elsewhere; a patient with two is rejected."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.patient_id] |= {row.split} - {""}
    kept = []
    for row in rows:
        of_patient = splits[row.patient_id]
        if len(of_patient) > 1:
            rejects.append(Reject(row.number, row.image, "the patient is in two splits"))
        else:
            kept.append(replace(row, split=next(iter(of_patient), "")))
    return kept, sorted(rejects, key=lambda reject: reject.row)
