"""Remote shards on the local disk: a bounded folder that any number of workers and processes share.

A file appears under its final name only when whole. Each remote file has a lock of its own, so that it is
fetched once however many processes ask for it. When room is needed, the files whose last use lies furthest
back go first. A file that some process holds open through `ShardCache.open` carries a shared lock and
stays: deleting it would free no byte, since on POSIX an open file or a memory map keeps its content,
whatever happens to the name. The kernel drops the locks of a process that dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from fundusfm.errors import UserError

_LOCK, _PARTIAL = ".lock", ".partial"
_COPY_BYTES = 8 * 2**20
_ATTEMPTS = 3
_PAUSE_S = 1.0
_CHECK = "run `fundusfm shards check` where the shards are stored"


class _TransferError(Exception):
    """The remote side failed, or gave another number of bytes than it should; worth another attempt."""


class ShardCache:
    """Local copies of remote files in `folder`, of at most `limit_bytes` together.

    What is held open counts but cannot be deleted; if it alone fills the folder, the limit is overstepped
    by the file asked for. Instances travel to worker processes.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._latest: BinaryIO | None = None

    def open(self, url: str, num_bytes: int | None = None) -> BinaryIO:
        """A file open for reading: `url` itself if it is a local path, else its copy, fetched if need be.

        The copy stays in the folder until the file and every memory map made from it are closed.
        `num_bytes` is the size that the index gives. UserError with the url if it is missing, has another
        size, is out of reach, or if there is no room.
        """
        if "://" not in url:
            return _open_local(url)
        copy = self._folder / _local_name(url)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (stream := _open_whole(copy, num_bytes)) is None:
                with _locked(copy.with_name(copy.name + _LOCK)):
                    if not _is_whole(copy, num_bytes):
                        self._fetch(url, copy, num_bytes)
        except OSError as error:
            raise _unusable_folder(self._folder, url, error) from error
        return stream

    def local_path(self, url: str, num_bytes: int | None = None) -> Path:
        """As `open`, but the path; a copy is sure to stay only until this cache is next asked for a path."""
        if "://" not in url:
            return Path(url)
        previous, self._latest = self._latest, self.open(url, num_bytes)
        if previous is not None:
            previous.close()
        return Path(self._latest.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}

    def _fetch(self, url: str, copy: Path, num_bytes: int | None) -> None:
        """Download under another name, check the size, rename; the caller holds the lock of `copy`."""
        partial = copy.with_name(copy.name + _PARTIAL)
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._download(url, partial, num_bytes)
                    break
                except _TransferError as error:
                    if attempt == _ATTEMPTS:
                        raise UserError(f"a remote shard cannot be fetched: {error}", where=url) from error
                    time.sleep(_PAUSE_S * attempt)
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)

    def _download(self, url: str, partial: Path, num_bytes: int | None) -> None:
        with _remote(url) as (remote, remote_bytes), partial.open("wb") as local:
            if num_bytes is not None and remote_bytes not in (None, num_bytes):
                raise _TransferError(f"it has {remote_bytes} bytes, the index says {num_bytes}")
            expected = num_bytes if num_bytes is not None else remote_bytes
            self._reserve(local, expected or 0, url)
            while block := _read(remote):
                local.write(block)
            if expected not in (None, local.tell()):
                raise _TransferError(f"{local.tell()} of {expected} bytes came")
            local.flush()
            os.fsync(local.fileno())

    def _reserve(self, local: BinaryIO, num_bytes: int, url: str) -> None:
        """Make room for a file. Its full length counts from now on: no two downloads share one gap."""
        if num_bytes > self._limit_bytes:
            what = f"a shard of {num_bytes} bytes does not fit in a cache of {self._limit_bytes}"
            raise UserError(what, where=url, fix="raise data.cache_gib")
        with _locked(self._folder / f"room{_LOCK}"):
            facts = _facts(self._folder)
            excess = sum(size for _, size, _ in facts) + num_bytes - self._limit_bytes
            for _, size, file in facts:
                if excess <= 0:
                    break
                excess -= size if _delete_unused(file) else 0
            local.truncate(num_bytes)


def _open_local(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UserError(f"the shard cannot be opened: {error.strerror}", where=path) from error


def _local_name(url: str) -> str:
    """A name that is the url's own, and tells a reader of the folder what it is."""
    tail = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-60:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock that a file stands for. Lock files are empty and stay: deleting one would race with
    its users."""
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_whole(copy: Path, num_bytes: int | None) -> bool:
    """False for a copy of another size: the remote shard has been rebuilt, or the machine went down while
    writing."""
    return copy.exists() and num_bytes in (None, copy.stat().st_size)


def _open_whole(copy: Path, num_bytes: int | None) -> BinaryIO | None:
    """The copy, open and marked as in use; None if it is not there, or was deleted while it was being
    opened."""
    with suppress(FileNotFoundError):
        stream = copy.open("rb")
        fcntl.flock(stream, fcntl.LOCK_SH)
        opened = os.fstat(stream.fileno())
        if opened.st_nlink and num_bytes in (None, opened.st_size):
            os.utime(copy)  # the time of last use, as few file systems keep it by themselves
            return stream
        stream.close()
    return None


def _facts(folder: Path) -> list[tuple[int, int, Path]]:
    """(time of last use, bytes, path) of each file but the locks, the longest unused first."""
    facts = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # renamed or deleted by another process meanwhile
            if file.suffix != _LOCK:
                stat = file.stat()
                facts.append((stat.st_mtime_ns, stat.st_size, file))
    return sorted(facts)


def _delete_unused(file: Path) -> bool:
    """Delete a copy that nobody holds open, or a partial file whose writer died; False if it is in use."""
    is_partial = file.suffix == _PARTIAL
    lock = file.with_name(file.name.removesuffix(_PARTIAL) + _LOCK) if is_partial else file
    try:
        with lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


@contextmanager
def _remote(url: str) -> Iterator[tuple[Any, int | None]]:
    """A remote file open for reading, and its size where the server tells it."""
    try:
        filesystem, path = fsspec.url_to_fs(url)
        num_bytes = filesystem.info(path).get("size")
        stream = filesystem.open(path, "rb")
    except FileNotFoundError as error:
        raise UserError("a remote shard is missing", where=url, fix=_CHECK) from error
    except (ImportError, ValueError) as error:
        raise UserError(f"a remote shard cannot be reached: {error}", where=url) from error
    except Exception as error:  # each service has its own family of exceptions
        raise _TransferError(f"{type(error).__name__}: {error}") from error
    with stream:
        yield stream, num_bytes


def _read(remote: Any) -> bytes:
    try:
        return bytes(remote.read(_COPY_BYTES))
    except Exception as error:  # each service has its own family of exceptions
        raise _TransferError(f"{type(error).__name__}: {error}") from error


def _unusable_folder(folder: Path, url: str, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, fix = "the disk of the shard cache is full", "free some space, or lower data.cache_gib"
    else:
        what, fix = f"the shard cache cannot be used: {error.strerror}", "set data.cache_dir to a local disk"
    return UserError(what, where=f"{folder}, for {url}", fix=fix)
