from __future__ import annotations

import hashlib
import hmac
import io
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from fundusfm.errors import UserError
from fundusfm.shards.build import build_shards
from fundusfm.shards.check import check_shards
from fundusfm.shards.cohort import split_of
from fundusfm.shards.exam import Exam
from fundusfm.shards.index import Offsets, ShardIndex
from tests.shards.conftest import write_csv

Table = Callable[..., Path]


def exams_of(index: ShardIndex) -> list[tuple[Exam, dict[str, Any]]]:
    """Every exam with its raw members, read by the webdataset library alone."""
    urls = [index.path(shard.name) for shard in index.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return [(Exam.from_json(sample["json"]), sample) for sample in samples]


def test_cohort_table_to_shards(table: Table, tmp_path: Path) -> None:
    path = table(30)
    index = build_shards(path, tmp_path / "out", size=32, workers=1, exams_per_shard=8)
    exams = exams_of(index)
    assert len(exams) == 30
    assert sum(totals["images"] for totals in index.totals.values()) == 60
    key = bytes.fromhex((tmp_path / "out.key").read_text())
    for number in range(30):
        pseudonym = hmac.new(key, f"patient {number}".encode(), hashlib.sha256).hexdigest()[:16]
        ((exam, sample),) = [pair for pair in exams if pair[0].patient == pseudonym]
        assert exam.split == split_of(f"patient {number}", (0.8, 0.1, 0.1))
        assert {image.eye for image in exam.images} == {"left", "right"}
        assert exam.extra == {"age": str(40 + number)}
        assert exam.images[0].labels == (("glaucoma",) if number % 3 == 0 else ("normal",))
        for image in exam.images:
            picture = Image.open(io.BytesIO(sample[image.name]))
            assert picture.size == (image.width, image.height) == (36, 32)
            original = Image.open(path.parent / "images" / f"{number}_{image.eye}.jpg").resize((36, 32), 3)
            assert np.abs(np.asarray(picture, int) - np.asarray(original, int)).mean() < 4
    assert check_shards(tmp_path / "out", workers=1).ok


def test_names_and_ids_do_not_travel(table: Table, tmp_path: Path) -> None:
    index = build_shards(table(4), tmp_path / "out", size=32, workers=1)
    for shard in index.shards:
        raw = Path(index.path(shard.name)).read_bytes()
        assert b"patient 1" not in raw
        assert b"_left.jpg" not in raw
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()
    assert stat.S_IMODE((tmp_path / "out.key").stat().st_mode) == 0o600
    assert not list((tmp_path / "out").glob("*.key"))


def test_bytes_do_not_depend_on_workers_and_a_key_can_be_reused(table: Table, tmp_path: Path) -> None:
    path = table(12)
    first = build_shards(path, tmp_path / "a", size=32, workers=1, exams_per_shard=4)
    key = tmp_path / "a.key"
    second = build_shards(path, tmp_path / "b", size=32, workers=2, exams_per_shard=4, key=key)
    assert [s.sha256 for s in first.shards] == [s.sha256 for s in second.shards]
    assert [s.offsets_sha256 for s in first.shards] == [s.offsets_sha256 for s in second.shards]
    assert first.digest == second.digest
    assert not (tmp_path / "b.key").exists()
    third = build_shards(path, tmp_path / "c", size=32, workers=1, exams_per_shard=4)
    assert {e.patient for e, _ in exams_of(third)}.isdisjoint({e.patient for e, _ in exams_of(first)})


def test_second_build_is_recognised_and_another_refused(table: Table, tmp_path: Path) -> None:
    path, out = table(4), tmp_path / "out"
    index = build_shards(path, out, size=32, workers=1)
    stamp = (out / "index.json").stat().st_mtime_ns
    assert build_shards(path, out, size=32, workers=1).digest == index.digest
    assert (out / "index.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="already holds other shards"):
        build_shards(path, out, size=48, workers=1)


def test_card_with_prompts_and_second_table(cohort: Callable[..., Any], tmp_path: Path) -> None:
    rows = cohort(6)
    named = [
        {"file": r["image"], "pid": r["patient_id"], "oculus": r["eye"], "dx": r["label"], "age": 1}
        for r in rows
    ]
    write_csv(tmp_path / "cohort" / "t.csv", named)
    notes = [
        {"patient_id": "patient 0", "report": "左眼：青光眼。", "label": "urgent"},
        {"patient_id": "patient 1", "report": "Both eyes: normal.", "label": ""},
        {"patient_id": "somebody else", "report": "none of ours", "label": ""},
    ]
    write_csv(tmp_path / "cohort" / "notes.csv", notes)
    prompts = (
        "glaucoma: {en: [a large cup]}\nhealthy: {en: [a calm fundus, no lesion]}\nurgent: {en: [urgent]}\n"
    )
    (tmp_path / "prompts.yaml").write_text(prompts)
    (tmp_path / "card.yaml").write_text(
        "name: clinic\ntable: cohort/t.csv\ndrop: [age]\nlicence: ours\n"
        "columns: {image: file, patient_id: pid, eye: oculus, label: dx}\n"
        "constants: {source: clinic, split: val}\nlabels: {normal: healthy}\n"
        "exams: {table: cohort/notes.csv}\nordered: {scale: [healthy, glaucoma]}\n"
        "text: {prompts: prompts.yaml, variants: 2}\n"
    )
    index = build_shards(tmp_path / "card.yaml", tmp_path / "out", size=32, workers=1)
    assert (index.name, index.licence, index.splits) == ("clinic", "ours", ["val"])
    assert index.labels == ("glaucoma", "healthy", "urgent")
    assert index.prompts["healthy"]["en"] == ["a calm fundus", "no lesion"]
    assert index.ordered == {"scale": ["healthy", "glaucoma"]}
    texts = {}
    for exam, sample in exams_of(index):
        assert exam.extra == {}
        texts[tuple(sample[t.name].decode() for t in exam.texts)] = (
            exam.labels,
            [t.origin for t in exam.texts],
        )
    glaucoma = "Left eye: a large cup. Right eye: a large cup."
    assert texts["左眼：青光眼。", glaucoma] == (("urgent",), ["report", "labels"])
    assert texts["Both eyes: normal.",] == (None, ["report"])
    assert texts[glaucoma,] == (None, ["labels"])
    assert max(len(key) for key in texts) == 2
    kinds = Offsets.load(index.path(index.shards[0].offsets)).kinds
    assert kinds == ("labels.en", "left.cfp", "report.en", "report.zh", "right.cfp")


def test_missing_prompt_is_refused_before_anything_is_written(
    cohort: Callable[..., Any], tmp_path: Path
) -> None:
    write_csv(tmp_path / "cohort" / "t.csv", cohort(1))
    (tmp_path / "p.yaml").write_text("normal: {en: [x]}\n")
    (tmp_path / "card.yaml").write_text("table: cohort/t.csv\ntext: {prompts: p.yaml}\n")
    with pytest.raises(UserError, match="no phrase for 'glaucoma' in 'en'"):
        build_shards(tmp_path / "card.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.key").exists()


@pytest.mark.parametrize("place", ["cohort", "cohort/images", "cohort/images/out", "."])
def test_input_folders_are_never_written(table: Table, tmp_path: Path, place: str) -> None:
    path = table(1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="part of the input"):
        build_shards(path, tmp_path / place, size=32, workers=1)
    assert sorted(tmp_path.rglob("*")) == before


def test_several_images_of_one_eye_and_two_visits(table: Table, tmp_path: Path) -> None:
    def edit(rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            visit = "2023" if number < 4 else "2024"
            row.update(
                patient_id="one", eye="L", exam_id=visit, modality="FFA" if number == 3 else "CFP", age=number
            )

    index = build_shards(table(3, edit), tmp_path / "out", size=32, workers=1)
    exams = sorted((exam for exam, _ in exams_of(index)), key=lambda exam: len(exam.images))
    assert [i.name for i in exams[1].images] == [f"left.cfp.{n}.jpg" for n in range(3)] + ["left.ffa.0.jpg"]
    assert exams[0].patient == exams[1].patient
    assert exams[0].exam_id != exams[1].exam_id
    assert exams[1].extra == {"age": ["0", "1", "2", "3"]}


def card_of(folder: Path, text: str) -> Path:
    path = folder / "card.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_dropped_columns_of_ours_do_not_travel(table: Table, tmp_path: Path) -> None:
    table(3, lambda rows: [row.update(report="N. N. was seen") for row in rows])
    card = card_of(tmp_path, "table: cohort/table.csv\ndrop: [report, age]\n")
    index = build_shards(card, tmp_path / "out", size=32, workers=1)
    for exam, _ in exams_of(index):
        assert not exam.texts and not exam.extra


def test_patients_come_from_the_mapped_column(table: Table, tmp_path: Path) -> None:
    table(3, lambda rows: [row.update(mrn=row["patient_id"], patient_id="study") for row in rows])
    card = card_of(tmp_path, "table: cohort/table.csv\ncolumns: {patient_id: mrn}\n")
    index = build_shards(card, tmp_path / "out", size=32, workers=1)
    assert len({exam.patient for exam, _ in exams_of(index)}) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("constants: {eye: left}", "a constant for columns that the table has: eye"),
        ("exams: {table: notes.csv}", "no row of the second table is about an exam"),
    ],
)
def test_cards_that_would_lose_something_are_refused(
    table: Table, tmp_path: Path, text: str, told: str
) -> None:
    table(3)
    write_csv(tmp_path / "notes.csv", [{"patient_id": "1", "report": "a thin rim"}])
    with pytest.raises(UserError, match=told):
        build_shards(card_of(tmp_path, f"table: cohort/table.csv\n{text}\n"), tmp_path / "out", workers=1)


def test_a_zero_byte_in_a_path_is_a_reject(table: Table, tmp_path: Path) -> None:
    path = table(3)
    path.write_bytes(path.read_bytes() + b"im\0ages/x.jpg,p,left,normal,clinic,1\n")
    with pytest.raises(
        UserError, match=r"1 x the image path is not a possible file name|1 x the file does not"
    ):
        build_shards(path, tmp_path / "out", workers=1)


def test_damaged_index__its_advice_works(table: Table, tmp_path: Path) -> None:
    path, out = table(3), tmp_path / "out"
    first = build_shards(path, out, size=32, workers=1)
    (out / "index.json").write_bytes((out / "index.json").read_bytes().replace(b"glaucoma", b"glaucomb"))
    with pytest.raises(UserError) as caught:
        build_shards(path, out, size=32, workers=1)
    assert caught.value.fix.startswith("delete that file, then build")
    (out / "index.json").unlink()
    assert build_shards(path, out, size=32, workers=1).digest == first.digest


def test_name_too_long(table: Table, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output folder cannot be written"):
        build_shards(table(1), tmp_path / ("x" * 300), workers=1)
