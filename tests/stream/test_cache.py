"""The cache of remote shards: what it returns, what it deletes, what it says; several processes at once."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fundusfm.errors import UserError
from fundusfm.stream import cache as cache_module
from fundusfm.stream.cache import ShardCache

KIB = 1024


@pytest.fixture
def remote() -> Iterator[str]:
    """A remote folder in memory with shards a.tar to d.tar of 10 KiB each."""
    filesystem = fsspec.filesystem("memory")
    for name in "abcd":
        filesystem.pipe(f"/set/{name}.tar", name.encode() * 10 * KIB)
    yield "memory://set"
    filesystem.rm("/set", recursive=True)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.0)


def copies(folder: Path) -> set[str]:
    return {f.name.rpartition("-")[2] for f in folder.iterdir() if f.suffix != ".lock"}


def age(path: Path, seconds: int) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_local_path__local_file_is_itself(tmp_path: Path) -> None:
    assert ShardCache(tmp_path / "cache", 1).local_path(str(tmp_path / "a.tar")) == tmp_path / "a.tar"
    assert not (tmp_path / "cache").exists()


def test_local_path__fetches_once(tmp_path: Path, remote: str) -> None:
    cache = ShardCache(tmp_path, 100 * KIB)
    path = cache.local_path(f"{remote}/a.tar", num_bytes=10 * KIB)
    assert path.read_bytes() == b"a" * 10 * KIB
    fsspec.filesystem("memory").pipe("/set/a.tar", b"z" * 10 * KIB)
    assert cache.local_path(f"{remote}/a.tar", num_bytes=10 * KIB).read_bytes() == b"a" * 10 * KIB


def test_local_path__same_name_in_two_folders(tmp_path: Path, remote: str) -> None:
    fsspec.filesystem("memory").pipe("/set/other/a.tar", b"o")
    cache = ShardCache(tmp_path, 100 * KIB)
    assert cache.local_path(f"{remote}/a.tar") != cache.local_path(f"{remote}/other/a.tar")


def test_local_path__rebuilt_shard_is_fetched_again(tmp_path: Path, remote: str) -> None:
    cache = ShardCache(tmp_path, 100 * KIB)
    cache.local_path(f"{remote}/a.tar", num_bytes=10 * KIB)
    fsspec.filesystem("memory").pipe("/set/a.tar", b"new")
    assert cache.local_path(f"{remote}/a.tar", num_bytes=3).read_bytes() == b"new"


def test_eviction__longest_unused_first(tmp_path: Path, remote: str) -> None:
    cache = ShardCache(tmp_path, 30 * KIB)
    for seconds, name in ((30, "a"), (20, "b"), (10, "c")):
        with cache.open(f"{remote}/{name}.tar") as stream:
            age(Path(stream.name), seconds)
    cache.open(f"{remote}/a.tar").close()  # now the latest used
    cache.open(f"{remote}/d.tar").close()
    assert copies(tmp_path) == {"a.tar", "c.tar", "d.tar"}


def test_eviction__spares_what_is_mapped(tmp_path: Path, remote: str) -> None:
    cache = ShardCache(tmp_path, 20 * KIB)
    with cache.open(f"{remote}/a.tar") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        age(Path(stream.name), 100)
    cache.open(f"{remote}/b.tar").close()
    cache.open(f"{remote}/c.tar").close()
    assert copies(tmp_path) == {"a.tar", "c.tar"}
    mapped.close()
    cache.open(f"{remote}/d.tar").close()
    assert copies(tmp_path) == {"c.tar", "d.tar"}


def test_eviction__a_map_outlives_its_file(tmp_path: Path, remote: str) -> None:
    path = ShardCache(tmp_path, 20 * KIB).local_path(f"{remote}/a.tar")
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    path.unlink()
    assert mapped[:] == b"a" * 10 * KIB


def test_eviction__partial_file_of_a_dead_process(tmp_path: Path, remote: str) -> None:
    cache = ShardCache(tmp_path, 20 * KIB)
    path = cache.local_path(f"{remote}/a.tar")
    path.rename(path.with_name(path.name + ".partial"))
    cache.local_path(f"{remote}/b.tar")
    cache.local_path(f"{remote}/c.tar")
    assert copies(tmp_path) == {"b.tar", "c.tar"}


def test_open__missing_shard(tmp_path: Path, remote: str) -> None:
    with pytest.raises(UserError, match=r"missing(.|\n)*memory://set/none\.tar"):
        ShardCache(tmp_path, 100).open(f"{remote}/none.tar")


def test_open__missing_local_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tar"):
        ShardCache(tmp_path, 100).open(str(tmp_path / "none.tar"))


def test_open__unknown_protocol(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nosuch://set/a\.tar"):
        ShardCache(tmp_path, 100).open("nosuch://set/a.tar")


def test_open__wrong_size_leaves_nothing(tmp_path: Path, remote: str) -> None:
    with pytest.raises(UserError, match=r"10240 bytes, the index says 9(.|\n)*memory://set/a\.tar"):
        ShardCache(tmp_path, 100 * KIB).open(f"{remote}/a.tar", num_bytes=9)
    assert copies(tmp_path) == set()


def test_open__connection_that_ends_early(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_read", lambda stream: stream.read(KIB) if stream.tell() == 0 else b"")
    with pytest.raises(UserError, match=r"1024 of 10240 bytes"):
        ShardCache(tmp_path, 100 * KIB).open(f"{remote}/a.tar")
    assert copies(tmp_path) == set()


def test_open__shard_larger_than_the_cache(tmp_path: Path, remote: str) -> None:
    with pytest.raises(UserError, match=r"cache_gib"):
        ShardCache(tmp_path, KIB).open(f"{remote}/a.tar")


def test_open__disk_full(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"full(.|\n)*memory://set/a\.tar"):
        ShardCache(tmp_path, 100 * KIB).open(f"{remote}/a.tar")
    assert copies(tmp_path) == set()


def test_open__folder_that_cannot_be_made(tmp_path: Path, remote: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir"):
        ShardCache(tmp_path / "file" / "cache", 100 * KIB).open(f"{remote}/a.tar")


def test_open__a_failed_transfer_is_tried_again(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def flaky(stream: object) -> bytes:
        attempts.append(1)
        if len(attempts) < 3:
            raise cache_module._TransferError("connection reset")
        return real(stream)

    real = cache_module._read
    monkeypatch.setattr(cache_module, "_read", flaky)
    assert ShardCache(tmp_path, 100 * KIB).open(f"{remote}/a.tar").read() == b"a" * 10 * KIB


def _fetch_all(folder: Path, urls: list[str], results: multiprocessing.Queue[list[bytes]]) -> None:
    cache = pickle.loads(pickle.dumps(ShardCache(folder, 30 * KIB)))
    results.put([cache.open(url, 10 * KIB).read(1) for _ in range(5) for url in urls])


def test_open__processes_at_once_in_a_tight_folder(tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    for name in "abcd":
        (tmp_path / "remote" / f"{name}.tar").write_bytes(name.encode() * 10 * KIB)
    urls = [f"file://{tmp_path}/remote/{name}.tar" for name in "abcd"]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_fetch_all, args=(tmp_path / "cache", urls, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [[b"a", b"b", b"c", b"d"] * 5] * 3
    assert not any(name.endswith(".partial") for name in copies(tmp_path / "cache"))
