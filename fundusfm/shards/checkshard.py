"""The check of one shard. Runs in worker processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fundusfm.errors import UserError
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.shards.files import file_sha256, mapped
from fundusfm.shards.image import ImageError, decode_image
from fundusfm.shards.index import Offsets, ShardEntry
from fundusfm.shards.reading import StoredExam, exam_at, exam_ranges
from fundusfm.shards.tarwalk import Buffer, TornTarError
from fundusfm.shards.totals import Totals, count_exams
from fundusfm.shards.workers import Tick


@dataclass(frozen=True)
class Problem:
    """`where`: shard, and exam and member if it is one of them; `what`: one sentence without a full stop."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass
class Findings:
    """What the check of one shard brings home. `patients` and `images` (digests of pixels) map to a place."""

    name: str
    split: str
    problems: list[Problem] = field(default_factory=list)
    totals: Totals = field(default_factory=lambda: count_exams(()))
    patients: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, *where: str) -> None:
        """Note a problem in this shard."""
        self.problems.append(Problem(" ".join((self.name, *where)), what))


@dataclass(frozen=True)
class ShardCheck:
    """`check(entry, tick)` looks at one shard in the folder `root`; ticks once an exam."""

    root: str

    def __call__(self, entry: ShardEntry, tick: Tick) -> Findings:
        """All that is wrong with the files, then with the exams as far as the tar can be walked."""
        found = Findings(entry.name, entry.split)
        path = Path(self.root) / entry.name
        if not path.is_file():
            found.add("the shard is missing")
            return found
        _check_file(path, entry, found)
        offsets = _check_offsets(Path(self.root) / entry.offsets, entry, found)
        with mapped(path) as buffer:
            _check_content(buffer, entry, offsets, found, tick)
        return found


def _check_file(path: Path, entry: ShardEntry, found: Findings) -> None:
    size = path.stat().st_size
    if size != entry.num_bytes:
        word = "cut short" if size < entry.num_bytes else "longer than it should be"
        found.add(f"the shard is {word}: {size} bytes, not {entry.num_bytes}")
    elif file_sha256(path) != entry.sha256:
        found.add("the content of the shard has changed since it was written (sha256 differs)")


def _check_offsets(path: Path, entry: ShardEntry, found: Findings) -> Offsets | None:
    if not path.is_file():
        found.add(f"the offsets file {entry.offsets} is missing")
        return None
    if file_sha256(path) != entry.offsets_sha256:
        found.add(f"the offsets file {entry.offsets} has changed since it was written (sha256 differs)")
    try:
        return Offsets.load(str(path))
    except UserError as error:
        found.add(error.what, entry.offsets)
        return None


def _check_content(
    buffer: Buffer, entry: ShardEntry, offsets: Offsets | None, found: Findings, tick: Tick
) -> None:
    exams: list[Exam] = []
    ranges: list[tuple[str, int, int]] = []
    try:
        for key, start, end in exam_ranges(buffer):
            ranges.append((key, start, end))
            stored = _stored(buffer, start, end, entry, key, found)
            if stored is not None:
                exams.append(stored.exam)
                _check_exam(stored, entry, found)
            tick(1)
    except TornTarError as error:
        found.add(f"the tar is torn: {error}")
    found.totals = count_exams(exams)
    counts = (("exams", len(ranges), entry.num_exams), ("images", found.totals["images"], entry.num_images))
    for name, number, stated in counts:
        if number != stated:
            found.add(f"the shard holds {number} readable {name}, not {stated}")
    if offsets is not None:
        _compare_offsets(offsets, ranges, exams, found)


def _stored(
    buffer: Buffer, start: int, end: int, entry: ShardEntry, key: str, found: Findings
) -> StoredExam | None:
    try:
        return exam_at(buffer, start, end, split=entry.split, shard=entry.name)
    except ValueError as error:
        found.add(str(error), key)
        return None


def _check_exam(stored: StoredExam, entry: ShardEntry, found: Findings) -> None:
    exam = stored.exam
    if exam.split != entry.split:
        found.add(f"the exam is of the split {exam.split!r}, its shard of {entry.split!r}", stored.key)
    found.patients.setdefault(exam.patient, f"{entry.name} {stored.key}")
    for text in exam.texts:
        _check_text(stored, text.name, found)
    for image in exam.images:
        _check_image(stored, image, found)


def _check_text(stored: StoredExam, name: str, found: Findings) -> None:
    try:
        stored.read(name).decode()
    except UnicodeDecodeError:
        found.add("the text is not UTF-8", stored.key, name)


def _check_image(stored: StoredExam, image: ImageRecord, found: Findings) -> None:
    try:
        picture = decode_image(stored.read(image.name))
    except ImageError as error:
        found.add(str(error), stored.key, image.name)
        return
    if image.width and picture.size != (image.width, image.height):
        stated = f"{image.width} x {image.height}"
        found.add(f"the image is {picture.width} x {picture.height}, not {stated}", stored.key, image.name)
    identity = f"{picture.mode}{picture.size}".encode() + np.asarray(picture).tobytes()
    digest = hashlib.blake2b(identity, digest_size=16).hexdigest()
    found.images.setdefault(digest, f"{found.name} {stored.key} {image.name}")


def _compare_offsets(
    offsets: Offsets, ranges: list[tuple[str, int, int]], exams: list[Exam], found: Findings
) -> None:
    """The offsets file against what the walk has met."""
    stated = list(
        zip(offsets.keys_E.tolist(), offsets.start_E.tolist(), offsets.end_E.tolist(), strict=False)
    )
    if stated != ranges:
        found.add("the offsets differ from where the exams lie in the tar")
    elif len(exams) == len(ranges):
        true = Offsets.of_exams(exams, [key for key, _, _ in ranges], [(s, e) for _, s, e in ranges])
        if true.kinds != offsets.kinds or not np.array_equal(true.counts_EK, offsets.counts_EK):
            found.add("the offsets file miscounts what the exams hold")
