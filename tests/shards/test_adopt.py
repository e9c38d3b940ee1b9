from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from fundusfm.errors import UserError
from fundusfm.shards.adopt import adopt_shards, split_in_name
from fundusfm.shards.build import build_shards
from fundusfm.shards.check import check_shards
from fundusfm.shards.index import Offsets, ShardIndex
from fundusfm.shards.reading import exam_at
from tests.shards.conftest import draw_fundus


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    draw_fundus(seed).save(stream, "PNG")
    return stream.getvalue()


def foreign_tar(path: Path, seeds: range) -> Path:
    """A tar as image-text tools write it; keys begin anew in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for number, seed in enumerate(seeds):
            text = f"caption {seed}"
            tar.write(
                {"__key__": f"{number:05d}", "png": picture(seed), "txt": text, "json": {"caption": text}}
            )
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    foreign_tar(tmp_path / "set" / "train" / "000.tar", range(4))
    foreign_tar(tmp_path / "set" / "train" / "001.tar", range(4, 8))
    foreign_tar(tmp_path / "set" / "val" / "000.tar", range(8, 10))
    return tmp_path / "set"


def test_tars_are_indexed_in_place(tars: Path) -> None:
    before = {path: path.read_bytes() for path in tars.rglob("*.tar")}
    index = adopt_shards(tars, workers=2)
    assert {path: path.read_bytes() for path in tars.rglob("*.tar")} == before
    assert index.adopted
    assert [s.name for s in index.shards] == ["train/000.tar", "train/001.tar", "val/000.tar"]
    assert [(s.split, s.num_exams, s.num_images) for s in index.shards] == [
        ("train", 4, 4),
        ("train", 4, 4),
        ("val", 2, 2),
    ]
    assert index.totals["train"]["patients"] == 8
    offsets = Offsets.load(index.path(index.shards[1].offsets))
    raw = Path(index.path("train/001.tar")).read_bytes()
    stored = exam_at(raw, int(offsets.start_E[2]), int(offsets.end_E[2]), split="train")
    assert (stored.read("png"), stored.read("txt")) == (picture(6), b"caption 6")
    assert check_shards(tars, workers=1).ok


def test_index_elsewhere_leaves_the_folder_alone(tars: Path, tmp_path: Path) -> None:
    before = sorted(tars.rglob("*"))
    index = adopt_shards(tars, out=tmp_path / "index", split="test", workers=1)
    assert sorted(tars.rglob("*")) == before
    assert index.splits == ["test"]
    assert Path(index.path(index.shards[0].name)).resolve() == (tars / "train" / "000.tar").resolve()
    assert check_shards(tmp_path / "index", workers=1).ok


def test_adopting_again_follows_the_tars(tars: Path) -> None:
    first = adopt_shards(tars, workers=1)
    assert adopt_shards(tars, workers=1).digest == first.digest
    foreign_tar(tars / "val" / "001.tar", range(10, 13))
    assert len(adopt_shards(tars, workers=1).shards) == 4


def test_own_shards_are_not_adopted_over(table: Callable[..., Path], tmp_path: Path) -> None:
    build_shards(table(2), tmp_path / "out", size=32, workers=1)
    digest = ShardIndex.load(tmp_path / "out").digest
    with pytest.raises(UserError, match="have an index already"):
        adopt_shards(tmp_path / "out", workers=1)
    assert ShardIndex.load(tmp_path / "out").digest == digest


def test_own_shards_without_index_keep_their_exams(table: Callable[..., Path], tmp_path: Path) -> None:
    own = build_shards(table(8), tmp_path / "out", size=32, workers=1)
    (tmp_path / "out" / "index.json").unlink()
    adopted = adopt_shards(tmp_path / "out", workers=1)
    assert adopted.totals == own.totals
    assert adopted.labels == own.labels
    assert {s.sha256 for s in adopted.shards} == {s.sha256 for s in own.shards}


def test_bad_tars_are_all_named_and_nothing_is_indexed(tars: Path) -> None:
    torn = tars / "train" / "001.tar"
    torn.write_bytes(torn.read_bytes()[:5000])
    (tars / "val" / "000.tar").write_bytes(b"no tar at all" * 100)
    with webdataset.TarWriter(str(tars / "texts.tar")) as tar:
        tar.write({"__key__": "0", "txt": "no picture"})
    with pytest.raises(
        UserError, match=r"3 of 4 tars.*texts\.tar: no sample.*train/001\.tar:.*val/000\.tar:"
    ):
        adopt_shards(tars, workers=1)
    assert not (tars / "index.json").exists()


def test_folder_without_tars(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no tars to adopt"):
            adopt_shards(folder)


def test_folder_that_cannot_be_written(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Offsets, "save", refuse)
    with pytest.raises(UserError, match="Read-only file system") as caught:
        adopt_shards(tars, workers=1)
    assert "--out" in caught.value.fix


@pytest.mark.parametrize(
    ("path", "split"),
    [("a/train-0.tar", "train"), ("validation/0.tar", "val"), ("odir_test_1.tar", "test"),
     ("01.tar", "train"), ("train/val-0.tar", "val"), ("contested/0.tar", "train")],
)  # fmt: skip
def test_split_in_name(path: str, split: str) -> None:
    assert split_in_name(path) == split


def test_files_of_a_sample_that_do_not_lie_together_are_refused(tmp_path: Path) -> None:
    """Indexed as they lie, they would be images without texts beside texts without images."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in [("a.png", picture(0)), ("b.png", picture(1)), ("a.txt", b"x"), ("b.txt", b"y")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="sample a do not lie together"):
        adopt_shards(tmp_path, workers=1)


def test_names_that_are_no_tars(tars: Path, tmp_path: Path) -> None:
    (tars / "folder.tar").mkdir()
    assert len(adopt_shards(tars, workers=1).shards) == 3
    (tars / "gone.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"1 of 4 tars .*gone\.tar: it cannot be read: No such file"):
        adopt_shards(tars, workers=1)
    (tmp_path / "file").touch()
    (tars / "gone.tar").unlink()
    with pytest.raises(UserError, match="the index cannot be written: File exists"):
        adopt_shards(tars, out=tmp_path / "file", workers=1)


@pytest.mark.parametrize("length", [b"000", b"abc", b"999", b"-12"])
def test_damaged_pax_header_is_named(tmp_path: Path, length: bytes) -> None:
    """A length of 0 would be walked for ever."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("é" * 60 + ".png")
        member.size = len(picture(0))
        tar.addfile(member, io.BytesIO(picture(0)))
    adopt_shards(tmp_path, workers=1)
    raw = (tmp_path / "0.tar").read_bytes()
    place = raw.index(b" path=")
    (tmp_path / "0.tar").write_bytes(raw[: place - 3] + length + raw[place:])
    problems = [problem.what for problem in check_shards(tmp_path, workers=1).problems]
    assert any("the pax header at byte 0 is damaged" in problem for problem in problems)
