from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fundusfm.errors import UserError
from fundusfm.shards.table import COHORT_COLUMNS, match_columns, read_table

CONTENT = "image,patient_id,report\n眼/左.jpg,p1,左眼：青光眼。\nb.jpg,007,\n"
CELLS = [
    {"image": "眼/左.jpg", "patient_id": "p1", "report": "左眼：青光眼。"},
    {"image": "b.jpg", "patient_id": "007", "report": ""},
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_give_the_same_cells(tmp_path: Path, encoding: str, newline: str) -> None:
    path = tmp_path / "表.csv"
    path.write_bytes(CONTENT.replace("\n", newline).encode(encoding))
    assert read_table(path) == (["image", "patient_id", "report"], CELLS)


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(CONTENT.replace(",", delimiter), encoding="utf-8")
    assert read_table(path)[1] == CELLS


def test_parquet_cells_become_text(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pd.DataFrame({"image": ["a", "b"], "age": [61.0, None], "grade": [2, 3], "iop": [14.5, 16.0]}).to_parquet(
        path
    )
    assert read_table(path)[1] == [
        {"image": "a", "age": "61", "grade": "2", "iop": "14.5"},
        {"image": "b", "age": "", "grade": "3", "iop": "16"},
    ]


def test_text_that_looks_like_a_missing_number_stays(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('image,patient_id\n"a, b.jpg",NA\n')
    assert read_table(path)[1] == [{"image": "a, b.jpg", "patient_id": "NA"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty"),
        (b"\n\n", "the table is empty"),
        (b"image,patient_id\n", "no rows"),
        (b"image,patient_id\na,b\nc,d,e,f\n", "Expected 2 fields"),
        (b"image,patient_id\n\xff\xff\xff,a\n", "neither UTF-8 nor GB18030"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_broken_parquet_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="Parquet"):
        read_table(path)
    with pytest.raises(UserError, match="No such file"):
        read_table(tmp_path / "none.csv")


def test_missing_column_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"'image' \(did you mean 'Image'\?\); 'patient_id' \(did you mean 'patientid'"
    ):
        match_columns(["Image", "patientid"], {}, COHORT_COLUMNS, {"image", "patient_id"}, Path("t.csv"))


def match(columns: list[str], mapping: dict[str, str]) -> dict[str, str]:
    return match_columns(columns, mapping, COHORT_COLUMNS, {"image", "patient_id"}, Path("t.csv"))


def test_columns_are_matched() -> None:
    found = match(["f", "patient_id", "age"], {"image": "f"})
    assert found == {"image": "f", "patient_id": "patient_id", "age": "age"}


@pytest.mark.parametrize("columns", [["mrn", "image", "patient_id"], ["patient_id", "image", "mrn"]])
def test_a_mapped_column_wins_over_one_that_has_our_name_already(columns: list[str]) -> None:
    assert match(columns, {"patient_id": "mrn"}) == {"image": "image", "patient_id": "mrn"}


def test_one_column_may_serve_twice() -> None:
    wanted = {"image": "file", "patient_id": "file", "label": "diagnosis", "report": "diagnosis"}
    assert match(["file", "diagnosis"], wanted) == wanted


def test_lists_in_parquet_become_several_labels(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pd.DataFrame({"image": ["a", "b"], "label": [["x", "y"], []]}).to_parquet(path)
    assert [record["label"] for record in read_table(path)[1]] == ["x|y", ""]


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pd.DataFrame([["a", "1", "2"]], columns=["image", "patient_id", " patient_id"]).to_parquet(path)
    with pytest.raises(UserError, match="several columns have one name: patient_id"):
        read_table(path)
