"""Any source of exams to published shards, resumable at the grain of a shard.

While a build runs, everything lies in `OUT/.build`: each finished shard with a small receipt (written last),
and what is half-written under names that end in `.partial`. Publishing moves the finished shards into OUT and
writes `index.json` last, so a folder with an index is whole, whenever the power went.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fundusfm.errors import UserError
from fundusfm.shards.draft import ExamSource, Reject
from fundusfm.shards.index import INDEX_NAME, ShardIndex
from fundusfm.shards.plan import Part, ShardPlan, plan_shards
from fundusfm.shards.progress import progress_bar
from fundusfm.shards.receipt import BUILD_DIR, Receipt, claimed_folder, clear_partials, finished_receipts
from fundusfm.shards.rejects import check_budget, write_rejects
from fundusfm.shards.shardfile import ShardWriter
from fundusfm.shards.totals import add_totals
from fundusfm.shards.workers import run_jobs

EXAMS_PER_SHARD = 512
MAX_REJECTS = 0.01


def write_shards(
    source: ExamSource,
    out: Path,
    *,
    workers: int = 1,
    exams_per_shard: int = EXAMS_PER_SHARD,
    max_rejects: float = MAX_REJECTS,
) -> ShardIndex:
    """Write all exams of `source` into the folder `out` and publish its index.

    A folder that already holds the same build is returned as it is, an interrupted build of it is continued.
    `max_rejects` is a share of `source.num_items`; the bytes written do not depend on `workers`.
    UserError: another build lies there, too many rejects, disk full, folder not writable.
    """
    with plain_disk_errors(out):
        build_digest = f"{source.digest}-{exams_per_shard}"
        published = _already_published(out, build_digest)
        if published is not None:
            return published
        out.mkdir(parents=True, exist_ok=True)
        write_rejects(out, source.rejects)
        check_budget(source.rejects, source.num_items, max_rejects, out)
        with claimed_folder(out, build_digest):
            plans = plan_shards(source.splits(), exams_per_shard)
            receipts = _write_missing(source, plans, out, workers, max_rejects)
            rejects = _all_rejects(source, receipts)
            write_rejects(out, rejects)
            check_budget(rejects, source.num_items, max_rejects, out)
            return _publish(source, receipts, out, build_digest)


def write_part(
    source: ExamSource, out: Path, part: Part, *, workers: int, exams_per_shard: int, max_rejects: float
) -> int:
    """Write only the shards of one part and publish nothing; returns how many there are.

    Parts may be written at the same time, by any number of machines: `write_shards` then finds them finished.
    `max_rejects` bounds what this part meets.
    """
    with plain_disk_errors(out):
        build_digest = f"{source.digest}-{exams_per_shard}"
        plans = part.of(plan_shards(source.splits(), exams_per_shard))
        if _already_published(out, build_digest) is None:
            out.mkdir(parents=True, exist_ok=True)
            _stop_early(list(source.rejects), source, out, max_rejects)
            with claimed_folder(out, build_digest, part):
                _write_missing(source, plans, out, workers, max_rejects)
    return len(plans)


def _write_missing(
    source: ExamSource, plans: list[ShardPlan], out: Path, workers: int, max_rejects: float
) -> list[Receipt]:
    """Receipts of all shards, in the order of the plan; writes those that have none yet."""
    receipts = finished_receipts(out, plans)
    missing = [plan for plan in plans if plan.name not in receipts]
    total = sum(len(plan.numbers) for plan in plans)
    done = total - sum(len(plan.numbers) for plan in missing)
    work = ShardWriter(source, str(out / BUILD_DIR))
    with progress_bar(f"writing {source.name}", total, done=done) as advance:
        try:
            with closing(run_jobs(work, missing, workers, advance)) as results:
                for receipt in results:
                    receipts[receipt.name] = receipt
                    _stop_early(_all_rejects(source, receipts.values()), source, out, max_rejects)
        finally:
            clear_partials(out, plans)
    return [receipts[plan.name] for plan in plans]


def _stop_early(rejects: list[Reject], source: ExamSource, out: Path, max_rejects: float) -> None:
    """Days of work on a cohort that is refused in the end would help nobody."""
    if len(rejects) > max_rejects * source.num_items:
        write_rejects(out, rejects)
        check_budget(rejects, source.num_items, max_rejects, out)


def _all_rejects(source: ExamSource, receipts: Iterable[Receipt]) -> list[Reject]:
    found = [*source.rejects, *(reject for receipt in receipts for reject in receipt.rejects)]
    return sorted(found, key=lambda reject: (reject.row, reject.item, reject.reason))


def _publish(source: ExamSource, receipts: list[Receipt], out: Path, build_digest: str) -> ShardIndex:
    """Move the shards to their final place, then write the index, then forget the build."""
    filled = [receipt for receipt in receipts if receipt.entry.num_exams]
    if not filled:
        raise UserError("no exam is left to publish", where=str(out), fix="see rejects.csv for the reasons")
    build = out / BUILD_DIR
    for receipt in filled:
        for name in (receipt.entry.name, receipt.entry.offsets):
            if (build / name).exists():  # else an interrupted publish has moved it already
                (build / name).replace(out / name)
    card = source.card()
    index = ShardIndex(
        root=str(out),
        name=source.name,
        shards=tuple(receipt.entry for receipt in filled),
        totals=_totals_by_split(filled),
        labels=tuple(card.get("labels", ())),
        ordered=card.get("ordered", {}),
        prompts=card.get("prompts", {}),
        card={**card.get("card", {}), "build": build_digest},
        licence=card.get("licence", ""),
        image_size=card.get("image_size", 0),
    )
    index.save()
    shutil.rmtree(build)
    return ShardIndex.load(out)


def _totals_by_split(receipts: list[Receipt]) -> dict[str, object]:
    """Totals of each split; patients are counted here, since one may have exams in several shards."""
    totals: dict[str, object] = {}
    for split in dict.fromkeys(receipt.entry.split for receipt in receipts):
        parts = [receipt for receipt in receipts if receipt.entry.split == split]
        patients = {patient for receipt in parts for patient in receipt.patients}
        totals[split] = {**add_totals(receipt.totals for receipt in parts), "patients": len(patients)}
    return totals


def _already_published(out: Path, build_digest: str) -> ShardIndex | None:
    """The index in `out` if it is of this very build; UserError if it is of another one."""
    if not (out / INDEX_NAME).exists():
        return None
    index = ShardIndex.load(out)
    if index.card.get("build") != build_digest:
        raise UserError(
            "the output folder already holds other shards",
            where=str(out),
            fix="choose another --out, or delete that folder if it is no longer needed",
        )
    if (out / BUILD_DIR).exists():  # killed between the index and the tidying up
        shutil.rmtree(out / BUILD_DIR)
    return index


@contextmanager
def plain_disk_errors(out: Path) -> Iterator[None]:
    """A full disk and a folder that cannot be written are the user's to solve: one message, no traceback."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full"
            fix = "free some space and run the same command again: finished shards are kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            what, fix = (
                "the output folder cannot be written",
                "choose another --out, a shorter name, or change its permissions",
            )
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            what, fix = "the output is not a folder", "choose another --out"
        else:
            raise
        raise UserError(what, where=error.filename or str(out), fix=fix) from error
