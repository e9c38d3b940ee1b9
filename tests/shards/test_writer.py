from __future__ import annotations

import csv
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fundusfm.errors import UserError
from fundusfm.shards import shardfile
from fundusfm.shards.build import build_part, build_shards
from fundusfm.shards.check import check_shards
from fundusfm.shards.plan import Part
from fundusfm.shards.receipt import claimed_folder

Table = Callable[..., Path]
SCRIPT = """
import sys
from pathlib import Path
from fundusfm.shards.build import build_shards
if __name__ == "__main__":
    table, out = sys.argv[1:]
    build_shards(Path(table), Path(out), size=64, workers=2, exams_per_shard=3)
"""


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def rejects_of(out: Path) -> list[dict[str, str]]:
    with (out / "rejects.csv").open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def start(path: Path, out: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(path), str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_receipts(process: subprocess.Popen[bytes], out: Path, num: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob(".build/*.receipt.json"))) < num:
        assert process.poll() is None, "the build ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def group_ends(group: int, timeout_s: float = 20) -> bool:
    """Whether every process of a group is gone in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_build_is_continued_to_the_same_bytes(table: Table, tmp_path: Path, how: int) -> None:
    path, out = table(24, size=(600, 500)), tmp_path / "out"
    process = start(path, out, tmp_path)
    wait_for_receipts(process, out, 2)
    if how == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, how)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert group_ends(process.pid)
    assert not (out / "index.json").exists()
    assert not list(out.glob("*.tar"))
    kept = list(out.glob(".build/*.receipt.json"))
    assert 2 <= len(kept) < 9
    if how == signal.SIGINT:
        assert errors.count(b"Traceback") == 1, "only the main process may speak"
        assert not list(out.glob(".build/.*.partial"))
    tars = {path.name: path.stat().st_mtime_ns for path in kept_tars(kept)}
    build_shards(path, out, size=64, workers=1, exams_per_shard=3)
    assert tars == {path.name: (out / path.name).stat().st_mtime_ns for path in kept_tars(kept)}
    whole = tmp_path / "whole"
    build_shards(path, whole, size=64, workers=1, exams_per_shard=3, key=tmp_path / "out.key")
    assert digests(out) == digests(whole)
    assert check_shards(out, workers=1).ok


def kept_tars(receipts: list[Path]) -> list[Path]:
    return [receipt.with_name(receipt.name.replace(".receipt.json", ".tar")) for receipt in receipts]


def test_torn_finished_shard_is_written_again(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = table(9), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("fundusfm.shards.writer._publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_shards(path, out, size=32, workers=1, exams_per_shard=3)
    tar = min(out.glob(".build/*.tar"))
    tar.write_bytes(tar.read_bytes()[:3000])
    build_shards(path, out, size=32, workers=1, exams_per_shard=3)
    assert check_shards(out, workers=1).ok


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_moves", [0, 1, 3])
def test_interrupted_publishing_is_finished(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_moves: int
) -> None:
    path, out = table(9), tmp_path / "out"
    replace, moves = Path.replace, []

    def stop_after(source: Path, target: Path) -> Path:
        if source.parent.name == ".build" and target.parent == out:
            moves.append(target)
            if len(moves) > num_moves:
                raise KeyboardInterrupt
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_after)
        with pytest.raises(KeyboardInterrupt):
            build_shards(path, out, size=32, workers=1, exams_per_shard=3)
    assert not (out / "index.json").exists()
    build_shards(path, out, size=32, workers=1, exams_per_shard=3)
    assert check_shards(out, workers=1).ok
    assert not (out / ".build").exists()


def test_unfinished_build_of_another_input_is_refused(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = table(4), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("fundusfm.shards.writer._publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_shards(path, out, size=32, workers=1)
    with pytest.raises(UserError, match="unfinished build of another input"):
        build_shards(path, out, size=48, workers=1)
    Image.new("RGB", (50, 50)).save(path.parent / "images" / "0_left.jpg")
    with pytest.raises(UserError, match="unfinished build of another input"):
        build_shards(path, out, size=32, workers=1)


def spoil(rows: list[dict[str, Any]], folder: Path) -> None:
    """Five bad images and three bad rows among the first patients."""
    whole = (folder / "0_left.jpg").read_bytes()
    (folder / "0_left.jpg").write_bytes(b"")
    (folder / "0_right.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "1_left.jpg").write_bytes(b"GIF89a, but not really")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green")]
    frames[0].save(folder / "1_right.jpg", "GIF", save_all=True, append_images=frames[1:])
    (folder / "2_left.jpg").unlink()
    rows[5]["patient_id"] = ""
    rows[6]["eye"] = "both"
    rows.append(rows[10])


REASONS = [
    ("1", "images/0_left.jpg", "the file is empty (0 bytes)"),
    ("2", "images/0_right.jpg", "the image is truncated"),
    ("3", "images/1_left.jpg", "the file is not an image"),
    ("4", "images/1_right.jpg", "the file holds several frames (GIF)"),
    ("5", "images/2_left.jpg", "the file does not exist"),
    ("6", "images/2_right.jpg", "the patient id is empty"),
    ("7", "images/3_left.jpg", "the eye is not left, right, L, R, OS, OD or empty"),
    ("21", "images/5_left.jpg", "the image is listed twice"),
]


def test_rejects_are_listed_and_the_rest_published(table: Table, tmp_path: Path) -> None:
    path = table(10, lambda rows: spoil(rows, tmp_path / "cohort" / "images"))
    index = build_shards(path, tmp_path / "out", size=32, workers=1, max_rejects=0.5)
    found = [(r["row"], r["item"], r["reason"]) for r in rejects_of(tmp_path / "out")]
    assert found == REASONS
    assert sum(totals["images"] for totals in index.totals.values()) == 20 - 7
    assert sum(totals["exams"] for totals in index.totals.values()) == 7
    assert check_shards(tmp_path / "out", workers=1).ok


@pytest.mark.parametrize("max_rejects", [0.1, 0.3])  # known before, and known only after opening the images
def test_too_many_rejects_publish_nothing(table: Table, tmp_path: Path, max_rejects: float) -> None:
    path = table(10, lambda rows: spoil(rows, tmp_path / "cohort" / "images"))
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"of 21 rows cannot be used.*the file does not exist.*row 5"
    ) as caught:
        build_shards(path, out, size=32, workers=1, max_rejects=max_rejects)
    assert caught.value.where == str(out / "rejects.csv")
    assert rejects_of(out)
    assert not list(out.glob("*.tar")) + list(out.glob("index.json"))
    build_shards(path, out, size=32, workers=1, max_rejects=0.5)
    assert len(rejects_of(out)) == 8


def test_every_image_bad_is_an_error_at_any_budget(table: Table, tmp_path: Path) -> None:
    path = table(2)
    for image in (tmp_path / "cohort" / "images").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match="no exam is left"):
        build_shards(path, tmp_path / "out", size=32, workers=1, max_rejects=1)


def test_full_disk_keeps_finished_shards(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = table(9), tmp_path / "out"
    describe, finished = shardfile._describe, []

    def fail_later(*arguments: Any) -> Any:
        finished.append(arguments)
        if len(finished) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(out))
        return describe(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shardfile, "_describe", fail_later)
        with pytest.raises(UserError, match="the disk is full"):
            build_shards(path, out, size=32, workers=1, exams_per_shard=3)
    assert len(list(out.glob(".build/*.receipt.json"))) == 2
    assert not (out / "index.json").exists()
    build_shards(path, out, size=32, workers=1, exams_per_shard=3)
    assert check_shards(out, workers=1).ok


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_output_that_cannot_be_written(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "out"))

    path = table(1)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        build_shards(path, tmp_path / "out", size=32, workers=1)


def test_output_that_is_a_file(table: Table, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        build_shards(table(1), tmp_path / "out", size=32, workers=1)
    assert (tmp_path / "out").read_text() == "mine"


def test_second_build_into_the_same_folder_is_refused_while_the_first_runs(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, describe, messages = table(4), tmp_path / "out", shardfile._describe, []

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(UserError) as caught:
            build_shards(path, out, size=32, workers=1)
        messages.append(caught.value.what)
        return describe(*arguments)

    monkeypatch.setattr(shardfile, "_describe", meanwhile)
    build_shards(path, out, size=32, workers=1)
    assert set(messages) == {"another process is building into the output folder"}
    assert check_shards(out, workers=1).ok


def test_parts__built_at_once_and_published_to_the_same_bytes(table: Table, tmp_path: Path) -> None:
    path, out, whole = table(24), tmp_path / "out", tmp_path / "whole"
    options: dict[str, Any] = {"size": 32, "workers": 1, "exams_per_shard": 3}
    context = multiprocessing.get_context("fork")
    parts = [
        context.Process(target=build_part, args=(path, out, Part(number, 2)), kwargs=options)
        for number in (1, 2)
    ]
    for process in parts:
        process.start()
    for process in parts:
        process.join(120)
        assert process.exitcode == 0
    assert not (out / "index.json").exists()
    tars = {tar.name: tar.stat().st_mtime_ns for tar in out.glob(".build/*.tar")}
    index = build_shards(path, out, **options)
    assert {tar.name: tar.stat().st_mtime_ns for tar in out.glob("*.tar")} == tars, "nothing was made twice"
    build_shards(path, whole, key=tmp_path / "out.key", **options)
    assert digests(out) == digests(whole)
    assert check_shards(out, workers=1).ok
    assert build_part(path, out, Part(1, 2), **options) == -(-len(index.shards) // 2), (
        "published: nothing to do"
    )


def test_parts__a_missing_one_is_made_when_publishing(table: Table, tmp_path: Path) -> None:
    path, out = table(12), tmp_path / "out"
    build_part(path, out, Part(2, 3), size=32, workers=1, exams_per_shard=2)
    build_shards(path, out, size=32, workers=1, exams_per_shard=2)
    assert check_shards(out, workers=1).ok


def test_parts__the_same_one_twice_or_the_whole_meanwhile_is_refused(table: Table, tmp_path: Path) -> None:
    path, out = table(6), tmp_path / "out"
    build_part(path, out, Part(1, 2), size=32, workers=1, exams_per_shard=2)
    state = json.loads((out / ".build" / "state.json").read_text())["build"]
    with claimed_folder(out, state, Part(2, 2)):
        build_part(path, out, Part(1, 2), size=32, workers=1, exams_per_shard=2)
        with pytest.raises(UserError, match="another process"):
            build_part(path, out, Part(2, 2), size=32, workers=1, exams_per_shard=2)
        with pytest.raises(UserError, match="another process"):
            build_shards(path, out, size=32, workers=1, exams_per_shard=2)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", ""])
def test_part__what_is_none(text: str) -> None:
    with pytest.raises(UserError, match="no part"):
        Part.parse(text)
