from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fundusfm.errors import UserError
from fundusfm.shards.build import build_shards
from fundusfm.shards.check import check_shards
from fundusfm.shards.draft import ExamDraft, Reject
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.shards.files import file_sha256
from fundusfm.shards.image import encode_jpeg
from fundusfm.shards.index import Offsets, ShardIndex
from fundusfm.shards.writer import write_shards
from tests.shards.conftest import draw_fundus

Table = Callable[..., Path]


@pytest.fixture
def built(table: Table, tmp_path: Path) -> Path:
    """Twelve patients in shards of four: three of train and one of val."""

    def edit(rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            row.update(split="val" if number >= 18 else "train", report="Both eyes: normal.")

    out = tmp_path / "out"
    build_shards(table(12, edit), out, size=32, workers=1, exams_per_shard=3)
    return out


def problems(folder: Path, workers: int = 1) -> list[str]:
    return [str(problem) for problem in check_shards(folder, workers=workers).problems]


def test_good_shards(built: Path) -> None:
    report = check_shards(built, workers=2)
    assert report.ok
    assert (report.num_shards, report.num_exams, report.num_images) == (4, 12, 24)


def test_tar_cut_in_half(built: Path) -> None:
    tar = built / "train-000001.tar"
    raw = tar.read_bytes()
    tar.write_bytes(raw[: len(raw) // 2 - 100])
    found = problems(built)
    assert any("train-000001.tar: the shard is cut short" in line for line in found)
    assert any("train-000001.tar: the tar is torn" in line for line in found)
    assert any("train-000001.tar: the shard holds 1 readable exams, not 3" in line for line in found)
    assert not [line for line in found if "val-" in line]


def test_empty_tar(built: Path) -> None:
    (built / "val-000000.tar").write_bytes(b"")
    found = problems(built)
    assert any("cut short: 0 bytes" in line for line in found)


@pytest.mark.parametrize("where", ["image", "json", "header", "padding"])
def test_one_flipped_byte(built: Path, where: str) -> None:
    tar = built / "train-000000.tar"
    raw = bytearray(tar.read_bytes())
    place = {
        "image": raw.index(b"\xff\xd8") + 200,
        "json": raw.index(b'"patient"') + 12,
        "header": raw.index(b"ustar") - 250,
        "padding": len(raw) - 1,
    }[where]
    raw[place] ^= 0x10
    tar.write_bytes(raw)
    found = problems(built)
    assert any("train-000000.tar: the content of the shard has changed" in line for line in found)
    if where == "header":
        assert any("wrong checksum" in line for line in found)


def test_missing_files_are_all_named(built: Path) -> None:
    (built / "train-000000.tar").unlink()
    (built / "train-000001.offsets.npz").unlink()
    (built / "train-000002.offsets.npz").write_bytes(b"PK no")
    found = problems(built, workers=2)
    assert "train-000000.tar: the shard is missing" in found
    assert any("train-000001.offsets.npz is missing" in line for line in found)
    assert any("train-000002.offsets.npz has changed" in line for line in found)
    assert any("the offsets file cannot be read" in line for line in found)


def test_missing_and_changed_index(built: Path) -> None:
    index = built / "index.json"
    record = json.loads(index.read_text())
    record["licence"] = "all yours"
    index.write_text(json.dumps(record))
    assert problems(built) == ["index.json: the shard index has been changed since it was written"]
    index.unlink()
    assert problems(built) == ["index.json: there is no shard index"]
    with pytest.raises(UserError, match="no such folder"):
        check_shards(built / "none")


def test_shard_that_the_index_does_not_know(built: Path) -> None:
    (built / "train-000009.tar").write_bytes((built / "train-000000.tar").read_bytes())
    assert problems(built) == ["train-000009.tar: the index does not know this shard"]


def resign(folder: Path, **changes: Any) -> None:
    """Save the index with changed fields and the true digests of the files, as a careless tool would."""
    index = ShardIndex.load(folder)
    shards = [
        replace(s, sha256=file_sha256(folder / s.name), offsets_sha256=file_sha256(folder / s.offsets))
        for s in index.shards
    ]
    replace(index, shards=tuple(shards), **changes).save()


def test_wrong_offsets_and_totals(built: Path) -> None:
    path = built / "val-000000.offsets.npz"
    offsets = Offsets.load(str(path))
    replace(offsets, start_E=offsets.start_E + 512).save(path)
    first = Offsets.load(str(built / "train-000000.offsets.npz"))
    replace(first, counts_EK=first.counts_EK + 1).save(built / "train-000000.offsets.npz")
    totals = ShardIndex.load(built).totals
    totals["train"]["images"] += 1
    totals["train"]["patients"] -= 1
    resign(built, totals=totals)
    assert problems(built) == [
        "train-000000.tar: the offsets file miscounts what the exams hold",
        "val-000000.tar: the offsets differ from where the exams lie in the tar",
        "index.json: train: images should be 18, not 19",
        "index.json: train: patients should be 9, not 8",
    ]


def test_exams_of_another_split_than_their_shard(built: Path) -> None:
    index = ShardIndex.load(built)
    shards = [replace(s, split="test") if s.split == "val" else s for s in index.shards]
    replace(index, shards=tuple(shards), totals={}).save()
    found = problems(built)
    assert len(found) == 3
    assert all("the exam is of the split 'val', its shard of 'test'" in line for line in found)


class Overlap:
    """Exam 1 shares its patient with exam 0, exam 2 its picture; exam 3 has a torn image."""

    name, digest, num_items = "overlap", "d", 4
    rejects: tuple[Reject, ...] = ()

    def splits(self) -> list[str]:
        return ["train", "val", "test", "train"]

    def load(self, number: int) -> tuple[ExamDraft, list[Reject]]:
        jpeg = encode_jpeg(draw_fundus([0, 1, 0, 3][number]))
        jpeg = jpeg[:900] if number == 3 else jpeg
        image = ImageRecord("left.cfp.0.jpg", "left", "CFP", 72, 64 if number else 63)
        exam = Exam(f"p{number if number > 1 else 0}", f"e{number}", self.splits()[number], (image,))
        return ExamDraft(exam, {image.name: jpeg}), []

    def card(self) -> dict[str, Any]:
        return {}


def test_same_image_and_patient_in_two_splits(tmp_path: Path) -> None:
    write_shards(Overlap(), tmp_path / "out")
    found = problems(tmp_path / "out")
    places = [line.partition(": ")[2] for line in found]
    assert sorted(places) == [
        "the image is 72 x 64, not 72 x 63",
        "the image is truncated",
        "the same image is in the splits train and test",
        "the same patient is in the splits train and val",
    ]
    (image,) = [line for line in found if "same image" in line]
    assert image.startswith("train-000000.tar 00000")
    assert "test-000000.tar 000000 left.cfp.0.jpg" in image
