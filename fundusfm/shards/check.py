"""`fundusfm shards check`: everything that can be wrong with a folder of shards, all of it in one report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fundusfm.errors import UserError
from fundusfm.shards.checkshard import Findings, Problem, ShardCheck
from fundusfm.shards.index import INDEX_NAME, ShardIndex
from fundusfm.shards.progress import progress_bar
from fundusfm.shards.totals import add_totals
from fundusfm.shards.workers import default_workers, run_jobs


@dataclass(frozen=True)
class CheckReport:
    """What was looked at and every problem found; `str` of a problem is one line for the user."""

    root: str
    problems: tuple[Problem, ...]
    num_shards: int = 0
    num_exams: int = 0
    num_images: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems


def check_shards(root: str | Path, *, workers: int | None = None) -> CheckReport:
    """Read every byte of the shards in the folder `root` and compare with what the index says.

    Digests, sizes and counts; offsets against a walk of the tar; json against members; every image decoded;
    the same image (by its pixels) or the same patient in two splits; totals. Reads only.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(root), fix="give a local folder of shards")
    try:
        index = ShardIndex.load(folder)
    except UserError as error:
        return CheckReport(str(root), (Problem(INDEX_NAME, error.what),))
    num_exams = sum(shard.num_exams for shard in index.shards)
    workers = default_workers() if workers is None else workers
    with progress_bar(f"checking {index.name}", num_exams) as tick:
        work = ShardCheck(str(folder))
        findings = list(run_jobs(work, index.shards, workers, tick))
    order = {shard.name: number for number, shard in enumerate(index.shards)}
    findings.sort(key=lambda found: order[found.name])
    problems = [problem for found in findings for problem in found.problems]
    problems += _across_splits("patient", ((f.split, f.patients.items()) for f in findings))
    problems += _across_splits("image", ((f.split, f.images.items()) for f in findings))
    problems += _wrong_totals(index, findings)
    problems += [] if index.adopted else _strangers(index, folder)
    return CheckReport(
        root=str(root),
        problems=tuple(problems),
        num_shards=len(findings),
        num_exams=sum(found.totals["exams"] for found in findings),
        num_images=sum(found.totals["images"] for found in findings),
    )


def _across_splits(what: str, parts: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> list[Problem]:
    """One problem for each identity that is met in more than one split, naming one place in each."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for split, identities in parts:
        for identity, place in identities:
            places[identity].setdefault(split, place)
    shared = {identity: by_split for identity, by_split in places.items() if len(by_split) > 1}
    return [
        Problem(" and ".join(by_split.values()), f"the same {what} is in the splits {' and '.join(by_split)}")
        for _, by_split in sorted(shared.items())
    ]


def _wrong_totals(index: ShardIndex, findings: Sequence[Findings]) -> list[Problem]:
    """Totals of the index that differ from what the readable exams add up to."""
    problems = []
    for split, stated in index.totals.items():
        parts = [found for found in findings if found.split == split]
        found = {**add_totals(part.totals for part in parts)}
        found["patients"] = len({patient for part in parts for patient in part.patients})
        odd = [name for name in sorted(found) if name in stated and stated[name] != found[name]]
        problems += [Problem(INDEX_NAME, f"{split}: {n} should be {found[n]}, not {stated[n]}") for n in odd]
    return problems


def _strangers(index: ShardIndex, folder: Path) -> list[Problem]:
    known = {shard.name for shard in index.shards}
    others = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    return [Problem(name, "the index does not know this shard") for name in others]
