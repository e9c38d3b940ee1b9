"""`fundusfm shards adopt`: index WebDataset tars that another tool wrote, without changing them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fundusfm.errors import UserError, plain_write_errors
from fundusfm.shards.exam import IMAGE_EXTENSIONS, SPLITS, Exam
from fundusfm.shards.files import file_sha256, mapped
from fundusfm.shards.index import INDEX_NAME, Offsets, ShardEntry, ShardIndex
from fundusfm.shards.progress import progress_bar
from fundusfm.shards.reading import exam_at, exam_ranges
from fundusfm.shards.tarwalk import TornTarError, has_end_mark
from fundusfm.shards.totals import Totals, add_totals, count_exams
from fundusfm.shards.workers import Tick, default_workers, run_jobs

_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                "dev": "val", "test": "test", "testing": "test"}  # fmt: skip


@dataclass(frozen=True)
class _Adopted:
    entry: ShardEntry
    totals: Totals
    labels: tuple[str, ...]
    patients: tuple[str, ...]


def adopt_shards(
    root: str | Path, *, out: Path | None = None, split: str | None = None, workers: int | None = None
) -> ShardIndex:
    """Index the tars under the folder `root` (also in folders below it) and return the index.

    The index and the offsets files go into `root`, which the user names to have just that done; the tars
    stay as they are. Where `root` cannot or should not be written, `out` takes them instead and the index
    points back to the tars. `split`: of all tars; by default a word in the path (train, val, test) says it,
    and a tar without one is train. UserError lists every tar that cannot be read.
    """
    folder, target = Path(root), Path(out or root)
    tars = sorted(path for path in folder.rglob("*.tar") if not path.is_dir()) if folder.is_dir() else []
    if not tars:
        raise UserError(
            "there are no tars to adopt", where=str(root), fix="give a folder that holds .tar files"
        )
    if split not in (None, *SPLITS):
        raise UserError(
            f"there is no split {split!r}", where="--split", fix=f"choose one of: {', '.join(SPLITS)}"
        )
    _refuse_own(target)
    workers = default_workers() if workers is None else workers
    with plain_write_errors(
        "the index", target, "give another folder for it with --out; the tars stay there"
    ):
        target.mkdir(parents=True, exist_ok=True)
        work = _Adoption(str(folder), str(target), split)
        with progress_bar(f"adopting {folder.name}", len(tars)) as tick:
            results = list(run_jobs(work, [str(tar) for tar in tars], workers, tick))
        problems = sorted(result for result in results if isinstance(result, str))
        if problems:
            raise UserError(
                f"{len(problems)} of {len(tars)} tars cannot be adopted: " + "; ".join(problems),
                where=str(root),
                fix="mend or remove them; nothing was indexed",
            )
        adopted = sorted((r for r in results if isinstance(r, _Adopted)), key=lambda r: r.entry.name)
        return _publish(adopted, target, folder.absolute().name)


@dataclass(frozen=True)
class _Adoption:
    """`adoption(tar, tick)` writes the offsets of one tar, or returns the reason why it cannot."""

    root: str
    target: str
    split: str | None

    def __call__(self, tar: str, tick: Tick) -> _Adopted | str:
        path, target = Path(tar), Path(self.target)
        inside, name = path.relative_to(self.root), Path(os.path.relpath(path, target)).as_posix()
        split = self.split or split_in_name(inside.as_posix())
        try:
            exams, keys, ranges = _read_exams(path, split, name)
        except ValueError as error:
            return f"{inside}: {error}"
        except OSError as error:
            return f"{inside}: it cannot be read: {error.strerror}"
        offsets_path = target / f"{'.'.join(inside.with_suffix('').parts)}.offsets.npz"
        Offsets.of_exams(exams, keys, ranges).save(offsets_path)
        entry = ShardEntry(
            name=name,
            split=split,
            num_exams=len(exams),
            num_images=sum(len(exam.images) for exam in exams),
            num_bytes=path.stat().st_size,
            sha256=file_sha256(path),
            offsets=offsets_path.name,
            offsets_sha256=file_sha256(offsets_path),
        )
        tick(1)
        labels = {label for exam in exams for image in exam.images for label in image.labels or ()}
        labels |= {label for exam in exams for label in exam.labels or ()}
        patients = {exam.patient for exam in exams}
        return _Adopted(entry, count_exams(exams), tuple(sorted(labels)), tuple(sorted(patients)))


def split_in_name(path: str) -> str:
    """The split that a word of the path names, the last one if there are several; `train` without one."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), "train")


def _read_exams(path: Path, split: str, name: str) -> tuple[list[Exam], list[str], list[tuple[int, int]]]:
    """Exams, keys and byte ranges of a tar; ValueError if it is torn, unsorted or holds no image."""
    exams, keys, ranges = [], [], []
    seen: set[str] = set()
    with mapped(path) as buffer:
        for key, start, end in exam_ranges(buffer):
            exams.append(exam_at(buffer, start, end, split=split, shard=name).exam)
            if key in seen:  # it would be read as two exams, the images without their text
                raise ValueError(f"the files of sample {key} do not lie together: pack them sorted by name")
            seen.add(key)
            keys.append(key)
            ranges.append((start, end))
        if ranges and not has_end_mark(buffer, ranges[-1][1]):
            raise TornTarError("the tar has no end mark: it was cut short")
    if not any(exam.images for exam in exams):
        raise ValueError(f"no sample has an image ({', '.join(IMAGE_EXTENSIONS)})")
    return exams, keys, ranges


def _publish(adopted: list[_Adopted], target: Path, name: str) -> ShardIndex:
    totals: dict[str, Totals] = {}
    for split in dict.fromkeys(part.entry.split for part in adopted):
        parts = [part for part in adopted if part.entry.split == split]
        patients = {patient for part in parts for patient in part.patients}
        totals[split] = {**add_totals(part.totals for part in parts), "patients": len(patients)}
    index = ShardIndex(
        root=str(target),
        name=name,
        shards=tuple(part.entry for part in adopted),
        totals=totals,
        labels=tuple(sorted({label for part in adopted for label in part.labels})),
        adopted=True,
    )
    index.save()
    return ShardIndex.load(target)


def _refuse_own(target: Path) -> None:
    if (target / INDEX_NAME).exists() and not ShardIndex.load(target).adopted:
        raise UserError(
            "these shards have an index already, and it says more than adopting could",
            where=str(target / INDEX_NAME),
            fix="use the folder as it is; `fundusfm shards check` verifies it",
        )
