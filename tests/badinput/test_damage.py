"""Shards that were damaged, moved or never there, through every verb that reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fundusfm.shards.index import ShardIndex
from tests.badinput.conftest import ask, refused
from tests.conftest import Cohort


def first_tar(shards: Path) -> Path:
    return min(shards.glob("train-*.tar"))


def cut_in_half(shards: Path) -> None:
    tar = first_tar(shards)
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])


def flip_a_header(shards: Path) -> None:
    tar = first_tar(shards)
    raw = bytearray(tar.read_bytes())
    raw[300] ^= 0x40
    tar.write_bytes(raw)


def replace_the_tar(shards: Path) -> None:
    """Another cohort's tar under the same name and of the same size."""
    first, second = sorted(shards.glob("train-*.tar"))[:2]
    size = first.stat().st_size
    first.write_bytes((second.read_bytes() + bytes(size))[:size])


def empty_the_tar(shards: Path) -> None:
    first_tar(shards).write_bytes(b"")


def lose_the_tar(shards: Path) -> None:
    first_tar(shards).unlink()


def lose_the_index(shards: Path) -> None:
    (shards / "index.json").unlink()


def cut_the_index(shards: Path) -> None:
    (shards / "index.json").write_text((shards / "index.json").read_text(encoding="utf-8")[:400])


def index_is_a_folder(shards: Path) -> None:
    (shards / "index.json").unlink()
    (shards / "index.json").mkdir()


def lose_the_offsets(shards: Path) -> None:
    min(shards.glob("train-*.npz")).unlink()


def move(shards: Path) -> None:
    shutil.rmtree(shards)


Damage = Callable[[Path], None]
ALL: list[Damage] = [cut_in_half, flip_a_header, replace_the_tar, empty_the_tar, lose_the_tar, lose_the_index,
                     cut_the_index, index_is_a_folder, lose_the_offsets, move]  # fmt: skip


@pytest.mark.parametrize("damage", ALL)
def test_check__exit_code_2(shards: Path, damage: Damage) -> None:
    damage(shards)
    refused("shards", "check", shards, "--workers", "1")


@pytest.mark.parametrize("damage", [one for one in ALL if one is not replace_the_tar])
def test_stats_and_tokens__one_message_and_no_file(shards: Path, damage: Damage, tmp_path: Path) -> None:
    damage(shards)
    refused("shards", "stats", shards, "--sheet", tmp_path / "sheet.png")
    refused("tokens", "train", "--shards", shards, "--out", tmp_path / "tokens.json")
    assert not (tmp_path / "sheet.png").exists() and not (tmp_path / "tokens.json").exists()


@pytest.mark.parametrize("damage", ALL)
def test_pretrain__refused(shards: Path, recipe: Path, damage: Damage) -> None:
    """What stands in the index is refused at the start, what does not by the error budget."""
    damage(shards)
    refused("pretrain", recipe, f"data.sources=[{{shards: '{shards}'}}]", "data.workers=0")


@pytest.mark.parametrize("url", ["nowhere://x/y", "memory://gone/y", "file:///gone/y"])
def test_url_that_leads_nowhere(recipe: Path, tmp_path: Path, url: str) -> None:
    for arguments in (
        ("tokens", "train", "--shards", url, "--out", tmp_path / "tokens.json"),
        ("pretrain", recipe, f"data.sources=[{{shards: '{url}'}}]"),
    ):
        assert url in refused(*arguments)


def test_service_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.open", missing)
    told = refused("tokens", "train", "--shards", "s3://x/y", "--out", tmp_path / "tokens.json")
    assert "Install s3fs" in told


def test_adopt__tar_that_ends_between_two_members(shards: Path, tmp_path: Path) -> None:
    """Nothing but the missing end mark tells it from a whole one."""
    (shards / "index.json").unlink()
    tar = first_tar(shards)
    raw = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(raw + bytes(-len(raw) % 512))
    told = refused("shards", "adopt", shards, "--out", tmp_path / "adopted", "--workers", "1")
    assert tar.name in told and "cut short" in told
    assert not (tmp_path / "adopted" / "index.json").exists()


def test_adopt__split_that_there_is_not(shards: Path, tmp_path: Path) -> None:
    (shards / "index.json").unlink()
    told = refused("shards", "adopt", shards, "--out", tmp_path / "adopted", "--split", "trian")
    assert "train, val, test" in told


def test_path_with_spaces_and_chinese(shards: Path, tmp_path: Path) -> None:
    assert ask("shards", "check", shards, "--workers", "1").code == 0
    out = tmp_path / "词 表" / "词.json"
    assert ask("tokens", "train", "--shards", shards, "--out", out, "--vocab-size", "60").code == 0
    assert out.is_file()


def test_evaluate__damaged_set_and_checkpoint(synth_cohort: Cohort, recipe: Path, shards: Path) -> None:
    run = recipe.parent / "run"
    short = ("trainer.max_steps=4", "trainer.val_every_steps=null", "data.workers=0", "data.image_size=48")
    assert ask("pretrain", recipe, *short).code == 0
    flip_a_header(shards)
    told = refused("evaluate", run, "--shards", shards, "--workers", "1")
    assert "cannot be read" in told and str(shards) in told
    weights = next((run / "checkpoints").glob("step-*")) / "weights-00000.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    told = refused("evaluate", run, "--shards", synth_cohort.shards, "--workers", "1")
    assert "damaged" in told and weights.name in told
    told = refused("pretrain", recipe, *short, "--resume")
    assert "none of the checkpoints of this run is whole" in told
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 4, (
        "the numbers were thrown away"
    )
    assert "no checkpoint" in refused("evaluate", recipe.parent, "--shards", synth_cohort.shards)
    assert ShardIndex.load(synth_cohort.shards)
