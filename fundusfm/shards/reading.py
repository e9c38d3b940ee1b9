"""One exam out of a tar, without touching the bytes of images nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fundusfm.shards.exam import Exam, foreign_exam
from fundusfm.shards.tarwalk import Buffer, Member, split_key, walk

JSON_MEMBER = "json"


class DamagedExamError(ValueError):
    """The members in the range are not one whole exam."""


@dataclass(frozen=True)
class StoredExam:
    """An exam as it lies in a tar: `read("left.cfp.0.jpg")` gives the bytes of a member.

    `foreign` marks a sample that another tool wrote: its patient is only its key. `root`: the shard set that
    a reader took it from.
    """

    key: str
    exam: Exam
    members: dict[str, Member]
    foreign: bool
    buffer: Buffer
    root: str = ""

    def read(self, name: str) -> bytes:
        """Content of the member with this suffix; DamagedExamError if the exam has none."""
        member = self.members.get(name)
        if member is None:
            raise DamagedExamError(f"the exam {self.key} has no member {name!r}")
        return bytes(self.buffer[member.start : member.start + member.size])


def exam_at(buffer: Buffer, start: int, end: int, *, split: str, shard: str = "") -> StoredExam:
    """The exam whose members lie in bytes `[start, end)` of a tar.

    `split` and `shard` describe samples of other tools only: their keys often begin anew in every tar, so the
    shard's name is put before the key to tell their patients apart.
    Raises ValueError (TornTarError, DamagedExamError) where the bytes are not one whole exam.
    """
    keys, members = set(), {}
    for member in walk(buffer, start, end):
        key, suffix = split_key(member.name)
        keys.add(key)
        members[suffix] = member
    if len(keys) != 1:
        raise DamagedExamError(f"the bytes {start} to {end} hold members of {len(keys)} exams, not of one")
    key = keys.pop()
    own = _own_record(buffer, members.get(JSON_MEMBER), key)
    if own is None:
        exam = foreign_exam(key, list(members), split)
        exam = replace(exam, patient=f"{shard}/{key}") if shard else exam
        return StoredExam(key, exam, members, foreign=True, buffer=buffer)
    return StoredExam(key, _whole(own, key, members), members, foreign=False, buffer=buffer)


def exam_ranges(buffer: Buffer) -> Iterator[tuple[str, int, int]]:
    """(key, start, end) of every run of members that share a key, in the order of the tar."""
    current, start, end = None, 0, 0
    for member in walk(buffer):
        key, _ = split_key(member.name)
        if current is not None and key != current:
            yield current, start, end
            start = end
        current, end = key, member.end
    if current is not None:
        yield current, start, end


def _own_record(buffer: Buffer, member: Member | None, key: str) -> bytes | None:
    """The json member if this project wrote it, else None (no json, or the json of another tool)."""
    if member is None:
        return None
    raw = bytes(buffer[member.start : member.start + member.size])
    try:
        record: Any = json.loads(raw)
    except ValueError as error:
        raise DamagedExamError(f"the json of exam {key} cannot be read: {error}") from error
    is_own = isinstance(record, dict) and {"schema", "patient", "exam_id", "images"} <= record.keys()
    return raw if is_own else None


def _whole(raw: bytes, key: str, members: dict[str, Member]) -> Exam:
    """The exam of our own json, if every image and text that it names is there."""
    try:
        exam = Exam.from_json(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedExamError(f"the json of exam {key} is damaged: {error}") from error
    named = {image.name for image in exam.images} | {text.name for text in exam.texts}
    if named != members.keys() - {JSON_MEMBER}:
        odd = ", ".join(sorted(named ^ (members.keys() - {JSON_MEMBER})))
        raise DamagedExamError(f"the members of exam {key} differ from its json: {odd}")
    return exam
