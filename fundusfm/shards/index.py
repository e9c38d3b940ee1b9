"""What lies beside the tars: `index.json` for the set, an offsets file a shard: any exam is one seek away."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fundusfm.errors import UserError
from fundusfm.shards.exam import SCHEMA_VERSION, Exam, exam_kinds

INDEX_NAME = "index.json"
REACH = "check that the path or URL is right and that you may read it"
MEND = "delete that file, then build the shards again, or adopt them if another tool wrote them"
REBUILD = "build the shards again, or run `fundusfm shards adopt` on tars that another tool wrote"


@dataclass(frozen=True)
class ShardEntry:
    """One tar of the set. `offsets` names its offsets file; both digests are sha256 in hex."""

    name: str
    split: str
    num_exams: int
    num_images: int
    num_bytes: int
    sha256: str
    offsets: str
    offsets_sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """`index.json`: the shards, the totals, and what the dataset card said about labels.

    `labels` lists every label of the set; `ordered` names scales, lowest grade first; `prompts` maps
    label -> language -> phrases, for zero-shot reading. `adopted` marks tars that another tool wrote.
    `digest` identifies the content and is stored with every run and checkpoint.
    """

    root: str
    name: str
    shards: tuple[ShardEntry, ...]
    totals: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    ordered: dict[str, list[str]] = field(default_factory=dict)
    prompts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    image_size: int = 0
    adopted: bool = False
    digest: str = ""

    @property
    def splits(self) -> list[str]:
        """The splits that hold exams, in the order train, val, test."""
        return sorted({s.split for s in self.shards}, key=("train", "val", "test").index)

    def of_split(self, split: str) -> tuple[ShardEntry, ...]:
        """The shards of one split; UserError naming the splits there are, if it has none."""
        found = tuple(s for s in self.shards if s.split == split)
        if not found:
            have = ", ".join(self.splits)
            raise UserError(f"there is no split {split!r}", where=self.root, fix=f"choose one of: {have}")
        return found

    def path(self, name: str) -> str:
        """Path or URL of a file of this set."""
        return f"{self.root.rstrip('/')}/{name}"

    def save(self) -> None:
        """Write `index.json` beside the tars, under its final name only when whole."""
        record = {"schema": SCHEMA_VERSION, **asdict(self)}
        del record["root"], record["digest"]
        record["digest"] = _digest(record)
        write_atomically(
            Path(self.root) / INDEX_NAME, json.dumps(record, ensure_ascii=False, indent=1).encode()
        )

    @classmethod
    def load(cls, root: str | Path) -> ShardIndex:
        """Read and verify `root/index.json` (folder or fsspec URL); UserError if it is missing or damaged."""
        where = f"{str(root).rstrip('/')}/{INDEX_NAME}"
        try:
            record = json.loads(_read(where))
            digest = record.pop("digest")
            schema = record.pop("schema")
            shards = tuple(ShardEntry(**s) for s in record.pop("shards"))
            whole = _digest({"schema": schema, **record, "shards": [asdict(s) for s in shards]}) == digest
            index = cls(
                root=str(root), shards=shards, digest=digest, **{**record, "labels": tuple(record["labels"])}
            )
        except FileNotFoundError as error:
            raise UserError("there is no shard index", where=where, fix=REBUILD) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"the shard index cannot be read: {reason}", where=where, fix=REACH) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the shard index cannot be read: {error}", where=where, fix=MEND) from error
        if schema != SCHEMA_VERSION:
            raise UserError(
                f"the shard index has schema version {schema}, not {SCHEMA_VERSION}", where=where, fix=MEND
            )
        if not whole:
            raise UserError("the shard index has been changed since it was written", where=where, fix=MEND)
        return index


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _read(where: str) -> bytes:
    if "://" not in where:
        return Path(where).read_bytes()
    import fsspec

    try:
        with fsspec.open(where, "rb") as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # each service has its own family of exceptions
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Offsets:
    """Where each exam of a shard lies and what it holds.

    `start_E` and `end_E`: byte range of exam e's members in the tar. `kinds` and `counts_EK`: how many
    members of each kind (`left.cfp`, `report.en`, ...) exam e has. `keys_E`: the members' key in the tar.
    """

    start_E: np.ndarray[Any, np.dtype[np.int64]]
    end_E: np.ndarray[Any, np.dtype[np.int64]]
    kinds: tuple[str, ...]
    counts_EK: np.ndarray[Any, np.dtype[np.uint16]]
    keys_E: np.ndarray[Any, np.dtype[np.str_]]

    def __len__(self) -> int:
        return len(self.start_E)

    @classmethod
    def of_exams(cls, exams: Iterable[Exam], keys: list[str], ranges: list[tuple[int, int]]) -> Offsets:
        """Offsets of exams at the byte `ranges` [(start, end), ...] of their tar."""
        per_exam = [exam_kinds(exam) for exam in exams]
        kinds = tuple(sorted({kind for words in per_exam for kind in words}))
        counts = [[words.count(kind) for kind in kinds] for words in per_exam]
        start_end = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        return cls(
            start_E=start_end[:, 0].copy(),
            end_E=start_end[:, 1].copy(),
            kinds=kinds,
            counts_EK=np.asarray(counts, dtype=np.uint16).reshape(len(keys), len(kinds)),
            keys_E=np.asarray(keys, dtype=np.str_),
        )

    def save(self, path: Path) -> None:
        """Write an npz that is equal byte for byte whenever the offsets are."""
        import io

        stream = io.BytesIO()
        np.savez(stream, start=self.start_E, end=self.end_E, kinds=np.asarray(self.kinds, dtype=np.str_),
                 counts=self.counts_EK, keys=self.keys_E)  # fmt: skip
        write_atomically(path, stream.getvalue())

    @classmethod
    def load(cls, where: str) -> Offsets:
        """Read an offsets file (path or URL); UserError if it is missing or damaged."""
        import io
        import zipfile

        try:
            with np.load(io.BytesIO(_read(where)), allow_pickle=False) as file:
                kinds = tuple(str(k) for k in file["kinds"])
                return cls(file["start"], file["end"], kinds, file["counts"], file["keys"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"the offsets file cannot be read: {error}", where=where, fix=REBUILD) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write, flush to disk, rename: a file under its final name is always whole."""
    path = path.absolute()  # `.` has no name
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
