from __future__ import annotations

from pathlib import Path

import pytest

from fundusfm.shards.rows import read_rows, split_labels


def folder_with(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("cell", "eye"),
    [
        ("left", "left"),
        ("L", "left"),
        ("OS", "left"),
        ("Right", "right"),
        ("r", "right"),
        ("od", "right"),
        ("", ""),
    ],
)
def test_eyes(tmp_path: Path, cell: str, eye: str) -> None:
    rows, _ = read_rows([{"image": "a", "patient_id": "1", "eye": cell}], folder_with(tmp_path, "a"), {})
    assert rows[0].eye == eye


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "none.jpg"}, "does not exist"),
        ({"image": ""}, "path is empty"),
        ({"image": "sub"}, "does not exist"),
        ({"image": "/etc/hostname"}, "absolute"),
        ({"image": "C:\\eyes\\a.jpg"}, "absolute"),
        ({"image": "\\\\server\\share\\a.jpg"}, "absolute"),
        ({"image": "../a.jpg"}, "leaves the folder"),
        ({"image": "sub/../../a.jpg"}, "leaves the folder"),
        ({"image": "a" * 5000}, "not a possible|does not exist"),
        ({"image": "a\0b"}, "not a possible|does not exist"),
        ({"eye": "OU"}, "eye is not"),
        ({"patient_id": ""}, "patient id is empty"),
        ({"split": "holdout"}, "split is not"),
        ({"modality": "OCT.B scan"}, "modality has"),
        ({"report": "x", "lang": "en/uk"}, "language code"),
    ],
)
def test_unusable_rows_are_rejected_with_the_reason(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    import re

    folder = folder_with(tmp_path, "a.jpg", "sub/b.jpg")
    good = {"image": "a.jpg", "patient_id": "1"}
    rows, rejects = read_rows([{"image": "sub/b.jpg", "patient_id": "2"}, {**good, **change}], folder, {})
    assert [row.image for row in rows] == ["sub/b.jpg"]
    assert [reject.row for reject in rejects] == [2]
    assert re.search(reason, rejects[0].reason)


def test_windows_and_chinese_paths(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "眼底/张 三.jpg")
    rows, rejects = read_rows([{"image": ".\\眼底\\张 三.jpg", "patient_id": "1"}], folder, {})
    assert not rejects
    assert rows[0].image == "眼底/张 三.jpg"


def test_names_that_the_file_system_decomposed_are_found(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "u\u0308ber.jpg")
    assert not read_rows([{"image": "\u00fcber.jpg", "patient_id": "1"}], folder, {})[1]


def test_second_mention_of_an_image_is_rejected(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "a.jpg")
    cells = [{"image": image, "patient_id": "1"} for image in ("a.jpg", "./a.jpg", ".\\a.jpg")]
    rows, rejects = read_rows(cells, folder, {})
    assert [row.number for row in rows] == [1]
    assert [(r.row, r.reason) for r in rejects] == [
        (2, "the image is listed twice"),
        (3, "the image is listed twice"),
    ]


def test_patient_in_two_splits_is_rejected_whole(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, *"abcd")
    splits = {"a": ("1", "train"), "b": ("1", "val"), "c": ("2", "Validation"), "d": ("2", "")}
    cells = [{"image": i, "patient_id": p, "split": s} for i, (p, s) in splits.items()]
    rows, rejects = read_rows(cells, folder, {})
    assert [(row.image, row.split) for row in rows] == [("c", "val"), ("d", "val")]
    assert [(r.row, r.reason) for r in rejects] == [(n, "the patient is in two splits") for n in (1, 2)]


def test_further_columns_are_kept(tmp_path: Path) -> None:
    cells = [{"image": "a", "patient_id": "1", "age": "61", "note": ""}]
    rows, _ = read_rows(cells, folder_with(tmp_path, "a"), {})
    assert rows[0].extra == {"age": "61"}


def test_labels() -> None:
    names = {"N": "normal", "none": ""}
    assert split_labels(" N | drusen|N", names) == ("normal", "drusen")
    assert split_labels("", names) is None
    assert split_labels("none", names) == ()
