from __future__ import annotations

import io
import json

import pytest
from webdataset import TarWriter

from fundusfm.shards.exam import Exam, ImageRecord, TextRecord
from fundusfm.shards.reading import DamagedExamError, exam_at, exam_ranges
from fundusfm.shards.tarwalk import TornTarError

IMAGE = ImageRecord("left.cfp.0.jpg", "left", "CFP", 8, 8, "clinic", ("normal",))
EXAM = Exam("p", "e", "train", (IMAGE,), (TextRecord("report.en.txt", "en"),))


def tar_of(*samples: dict[str, bytes | str]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    return stream.getvalue()


def own(key: str, exam: Exam = EXAM, **members: bytes) -> dict[str, bytes | str]:
    given = members or {"left.cfp.0.jpg": b"picture " + key.encode(), "report.en.txt": b"Left eye: normal."}
    return {"__key__": key, "json": exam.to_json(), **given}


def test_exams_come_back_with_their_members() -> None:
    buffer = tar_of(own("000000"), own("000001"), own("000002"))
    ranges = list(exam_ranges(buffer))
    assert [key for key, _, _ in ranges] == ["000000", "000001", "000002"]
    for key, start, end in ranges:
        stored = exam_at(buffer, start, end, split="val")
        assert (stored.key, stored.exam, stored.foreign) == (key, EXAM, False)
        assert stored.read("left.cfp.0.jpg") == b"picture " + key.encode()
        assert stored.read("report.en.txt") == b"Left eye: normal."


def test_sample_of_another_tool() -> None:
    sample = {"__key__": "a/7", "jpg": b"x", "txt": b"y", "json": json.dumps({"url": "z"}).encode()}
    buffer = tar_of(sample)
    ((_, start, end),) = exam_ranges(buffer)
    stored = exam_at(buffer, start, end, split="val", shard="part-3.tar")
    assert stored.foreign
    assert (stored.key, stored.exam.patient, stored.exam.split) == ("a/7", "part-3.tar/a/7", "val")
    assert [image.name for image in stored.exam.images] == ["jpg"]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"__key__": "0", "json": b"{"}, "cannot be read"),
        (own("0", **{"left.cfp.0.jpg": b"x"}), "report.en.txt"),
        (own("0", **{"left.cfp.0.jpg": b"x", "report.en.txt": b"", "more.txt": b""}), "more.txt"),
        ({**own("0"), "json": EXAM.to_json().replace(b'"schema":1', b'"schema":9')}, "schema"),
        ({**own("0"), "json": EXAM.to_json().replace(b'"eye"', b'"eyes"')}, "damaged"),
    ],
)
def test_damage_is_named(sample: dict[str, bytes | str], reason: str) -> None:
    buffer = tar_of(sample)
    ((_, start, end),) = exam_ranges(buffer)
    with pytest.raises(DamagedExamError, match=reason):
        exam_at(buffer, start, end, split="train")


def test_range_of_two_exams_is_refused() -> None:
    buffer = tar_of(own("0"), own("1"))
    ((_, start, _), (_, _, end)) = exam_ranges(buffer)
    with pytest.raises(DamagedExamError, match="2 exams"):
        exam_at(buffer, start, end, split="train")


def test_torn_range_is_refused() -> None:
    buffer = tar_of(own("0"))
    ((_, start, end),) = exam_ranges(buffer)
    with pytest.raises(TornTarError):
        exam_at(buffer[: end - 600], start, end, split="train")
    with pytest.raises(TornTarError):
        exam_at(buffer, start + 512, end, split="train")
