"""A disk that is full or read-only: one message, nothing lost, nothing half-written under a final name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.badinput.conftest import ask, refused
from tests.conftest import Cohort

Disk = Callable[[str], Path]
LOCAL = ("data.workers=0", "trainer.val_every_steps=null")


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["step"], line["train/loss"]) for line in map(json.loads, lines)]


def leftovers(folder: Path) -> list[str]:
    """Files that carry no final name and are no lock."""
    return [path.name for path in folder.rglob(".*") if path.name not in (".lock", ".build")]


def test_synth__continued_after_a_full_disk(small_disk: Disk) -> None:
    disk = small_disk("size=300k")
    verb = ("shards", "synth", "--out", disk / "s", "--patients", "40", "--size", "48",
            "--workers", "1", "--exams-per-shard", "5")  # fmt: skip
    assert "the disk is full" in refused(*verb)
    assert not (disk / "s" / "index.json").exists() and not leftovers(disk)
    kept = {path: path.stat().st_mtime_ns for path in (disk / "s" / ".build").glob("*.tar")}
    assert kept, "finished shards were thrown away"
    small_disk("size=8m")
    assert ask(*verb).code == 0
    assert all((disk / "s" / path.name).stat().st_mtime_ns == time for path, time in kept.items())
    assert ask("shards", "check", disk / "s", "--workers", "1").code == 0


def test_pretrain__resumed_after_a_full_disk(small_disk: Disk, recipe: Path) -> None:
    """There is room for one checkpoint, and the second one fills the disk."""
    assert ask("pretrain", recipe, *LOCAL).code == 0
    for size_kib in (1200, 1400):
        disk = small_disk(f"size={size_kib}k")
        elsewhere = ("pretrain", recipe, *LOCAL, f"runs_dir={disk}")
        assert "cannot be written" in refused(*elsewhere)
        assert not leftovers(disk) and (disk / "run" / "recipe.yaml").exists()
        small_disk("size=16m")
        assert ask(*elsewhere, "--resume").code == 0
        assert losses(disk / "run") == losses(recipe.parent / "run")
        shutil.rmtree(disk / "run")


def test_pretrain__no_room_for_one_checkpoint_refused_at_the_start(small_disk: Disk, recipe: Path) -> None:
    disk = small_disk("size=500k")
    told = refused("pretrain", recipe, *LOCAL, f"runs_dir={disk}")
    assert re.search(r"a checkpoint needs 0\.\d\d MiB, and 0\.4\d MiB are free", told), told
    assert "checkpoint.keep=3" in told
    assert not (disk / "run" / "metrics.jsonl").exists() and not (disk / "run" / "recipe.yaml").exists()


def test_tokens_stats_adopt__full(small_disk: Disk, synth_cohort: Cohort, shards: Path) -> None:
    disk = small_disk("size=4k")
    refused("tokens", "train", "--shards", synth_cohort.shards, "--out", disk / "tokens.json")
    refused("shards", "stats", synth_cohort.shards, "--sheet", disk / "sheet.png")
    (shards / "index.json").unlink()
    refused("shards", "adopt", shards, "--out", disk / "adopted", "--workers", "1")
    assert not [path for path in disk.rglob("*") if path.name in ("tokens.json", "sheet.png", "index.json")]
    assert not leftovers(disk)


def test_every_writer__read_only(small_disk: Disk, synth_cohort: Cohort, shards: Path, recipe: Path) -> None:
    assert ask("pretrain", recipe, "trainer.max_steps=4", *LOCAL).code == 0
    disk = small_disk("size=16m")
    shutil.copytree(shards, disk / "tars", ignore=shutil.ignore_patterns("*.json", "*.npz"))
    shutil.copytree(recipe.parent / "run", disk / "run", symlinks=True)
    small_disk("ro")
    train = ("pretrain", recipe, "trainer.max_steps=4", *LOCAL, f"runs_dir={disk}")
    for arguments in (
        ("shards", "synth", "--out", disk / "s", "--patients", "2", "--size", "48", "--workers", "1"),
        ("shards", "adopt", disk / "tars", "--workers", "1"),
        ("shards", "stats", shards, "--sheet", disk / "sheet.png"),
        ("tokens", "train", "--shards", shards, "--out", disk / "tokens.json"),
        (*train, "name=fresh"),
        (*train, "--resume"),
        ("evaluate", recipe.parent / "run", "--shards", shards, "--out", disk / "e", "--workers", "1"),
    ):
        refused(*arguments)
