"""Small file habits of this room: digests, memory maps, and names that only whole files carry."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fundusfm.shards.reading import exam_ranges
from fundusfm.shards.tarwalk import Buffer


def file_sha256(path: Path) -> str:
    """Digest of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def mapped(path: Path) -> Iterator[Buffer]:
    """A file as a buffer of which only the touched pages are read."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        yield b""
        return
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        yield buffer


def read_ranges(path: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """Keys and byte ranges of the exams of a tar, found by walking it."""
    with mapped(path) as buffer:
        found = list(exam_ranges(buffer))
    return [key for key, _, _ in found], [(start, end) for _, start, end in found]


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the final name if the block succeeds and vanishes if it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
