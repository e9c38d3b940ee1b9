"""The state of an unfinished build: which build it is, and a receipt for every finished shard."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fundusfm.errors import UserError
from fundusfm.shards.draft import Reject
from fundusfm.shards.index import ShardEntry, write_atomically
from fundusfm.shards.plan import Part, ShardPlan

BUILD_DIR = ".build"
_STATE_NAME, _LOCK_NAME = "state.json", "lock"


@dataclass(frozen=True)
class Receipt:
    """A finished shard: what the index will say of it, what was rejected, what it holds."""

    name: str
    entry: ShardEntry
    rejects: tuple[Reject, ...]
    totals: dict[str, Any]
    patients: tuple[str, ...]

    def save(self, build: Path) -> None:
        """Write the receipt; the shard's files must be on the disk before."""
        write_atomically(build / f"{self.name}.receipt.json", json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> Receipt:
        """Read a receipt; receipts are written atomically, so one that is there is whole."""
        record = json.loads(path.read_bytes())
        rejects = tuple(Reject(**reject) for reject in record["rejects"])
        entry = ShardEntry(**record["entry"])
        return cls(record["name"], entry, rejects, record["totals"], tuple(record["patients"]))


@contextmanager
def claimed_folder(out: Path, build_digest: str, part: Part | None = None) -> Iterator[None]:
    """Begin or take up the build in `out`, alone, clearing what a killed one left half-written.

    Builders of different parts share the folder. UserError if another process builds the same there now, or a
    build of another input or with other options began.
    """
    build = out / BUILD_DIR
    build.mkdir(exist_ok=True)
    with ExitStack() as locks:
        _lock(locks, build / _LOCK_NAME, out, shared=part is not None)
        if part:
            _lock(locks, build / f"{_LOCK_NAME}.{part.number}-{part.count}", out)
        _begin_or_continue(build, build_digest)
        if not part:
            clear_partials(out)
        yield


def _lock(locks: ExitStack, path: Path, out: Path, *, shared: bool = False) -> None:
    stream = locks.enter_context(path.open("w"))  # the lock ends with its process, however that ends
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            "another process is building into the output folder",
            where=str(out),
            fix="wait until it has ended",
        ) from error


def _begin_or_continue(build: Path, build_digest: str) -> None:
    state = build / _STATE_NAME
    if not state.exists():
        write_atomically(state, json.dumps({"build": build_digest}).encode())
    elif json.loads(state.read_bytes())["build"] != build_digest:
        raise UserError(
            "an unfinished build of another input, or with other options, lies in the output folder",
            where=str(build),
            fix="give the same input and options to continue it, delete that folder, or choose another --out",
        )


def clear_partials(out: Path, plans: Sequence[ShardPlan] | None = None) -> None:
    """Remove what ended workers left half-written, of all shards or of those planned.

    Only when no worker runs on them.
    """
    patterns = [".*.partial"] if plans is None else [f".{plan.name}.*.partial" for plan in plans]
    for pattern in patterns:
        for partial in (out / BUILD_DIR).glob(pattern):
            partial.unlink()


def finished_receipts(out: Path, plans: Sequence[ShardPlan]) -> dict[str, Receipt]:
    """Receipts of the shards that an earlier run finished and whose files are still there in full."""
    receipts = {}
    for plan in plans:
        path = out / BUILD_DIR / f"{plan.name}.receipt.json"
        if path.exists():
            receipt = Receipt.load(path)
            if _is_whole(out, receipt.entry):
                receipts[plan.name] = receipt
    return receipts


def _is_whole(out: Path, entry: ShardEntry) -> bool:
    tar, offsets = (_locate(out, name) for name in (entry.name, entry.offsets))
    return tar is not None and offsets is not None and tar.stat().st_size == entry.num_bytes


def _locate(out: Path, name: str) -> Path | None:
    """A shard lies in the build folder, or in its final place if publishing was interrupted."""
    return next((path for path in (out / BUILD_DIR / name, out / name) if path.exists()), None)
