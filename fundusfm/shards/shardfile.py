"""One shard: exams into a tar, its offsets file, its receipt. Runs in worker processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fundusfm.shards.draft import ExamDraft, ExamSource, Reject
from fundusfm.shards.exam import Exam
from fundusfm.shards.files import file_sha256, read_ranges, whole_or_nothing
from fundusfm.shards.index import Offsets, ShardEntry
from fundusfm.shards.plan import ShardPlan
from fundusfm.shards.receipt import Receipt
from fundusfm.shards.totals import count_exams
from fundusfm.shards.workers import Tick


@dataclass(frozen=True)
class ShardWriter:
    """`writer(plan, tick)` writes one shard of `source` into the folder `build`; ticks once an exam."""

    source: ExamSource
    build: str
    # It takes seconds, since it brings torch along: where workers write, the main process goes without.
    preload: ClassVar[tuple[str, ...]] = ("webdataset",)

    def __call__(self, plan: ShardPlan, tick: Tick) -> Receipt:
        """Write the tar and its offsets, flushed to disk, then the receipt that declares them finished."""
        from webdataset import TarWriter

        build = Path(self.build)
        path = build / f"{plan.name}.tar"
        exams: list[Exam] = []
        rejects: list[Reject] = []
        with whole_or_nothing(path) as partial, partial.open("wb") as stream:
            # Fixed time and owner: the same exams give the same bytes, hence the same digest.
            with TarWriter(stream, encoder=False, mtime=0, user="", group="") as tar:
                for key, number in enumerate(plan.numbers, plan.first_key):
                    draft, found = self.source.load(number)
                    rejects += found
                    if draft is not None:
                        tar.write(_sample(f"{key:06d}", draft))
                        exams.append(draft.exam)
                    tick(1)
            stream.flush()
            os.fsync(stream.fileno())
        receipt = Receipt(
            name=plan.name,
            entry=_describe(path, plan.split, exams),
            rejects=tuple(rejects),
            totals=count_exams(exams),
            patients=tuple(sorted({exam.patient for exam in exams})),
        )
        receipt.save(build)
        return receipt


def _sample(key: str, draft: ExamDraft) -> dict[str, str | bytes]:
    return {"__key__": key, **draft.contents, "json": draft.exam.to_json()}


def _describe(path: Path, split: str, exams: list[Exam]) -> ShardEntry:
    """Write the offsets of a finished tar and say what the index holds about both files."""
    keys, ranges = read_ranges(path)
    offsets_path = path.with_suffix(".offsets.npz")
    Offsets.of_exams(exams, keys, ranges).save(offsets_path)
    return ShardEntry(
        name=path.name,
        split=split,
        num_exams=len(exams),
        num_images=sum(len(exam.images) for exam in exams),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        offsets=offsets_path.name,
        offsets_sha256=file_sha256(offsets_path),
    )
