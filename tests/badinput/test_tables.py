"""Tables, cards and photographs as they come."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.badinput.conftest import ask, refused

HEAD = "image,patient_id,eye,label,report\n"


def photograph(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    pixels_HWC = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC).resize(size)


def png_of_16_bits(path: Path) -> None:
    """An RGB PNG of 16 bits a channel, which Pillow can read but not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels_HWC = np.random.default_rng(1).integers(0, 65535, (40, 44, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels_HWC)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 44, 40, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs of every kind, among them a folder and a file with Chinese names."""
    place = tmp_path / "输入 input"
    (place / "图像 目录").mkdir(parents=True)
    photograph(0, (300, 250)).save(place / "plain.jpg")
    photograph(1).save(place / "图像 目录" / "眼底 照片１.jpg")
    photograph(2).convert("CMYK").save(place / "cmyk.jpg")
    photograph(3).save(place / "moving.gif", save_all=True, append_images=[photograph(4)])
    png_of_16_bits(place / "deep.png")
    (place / "empty.jpg").write_bytes(b"")
    whole = (place / "plain.jpg").read_bytes()
    (place / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (place / "text.jpg").write_bytes(b"hello")
    return place


def build(folder: Path, table: str, *more: str) -> tuple[str | Path, ...]:
    return ("shards", "build", folder / table, "--out", folder.parent / "out", "--size", "32",
            "--workers", "1", *more)  # fmt: skip


def test_every_kind_of_file(folder: Path) -> None:
    """What can be used is published, what cannot is listed with its row and its reason."""
    Image.new("RGB", (10_000, 10_000), (90, 40, 10)).save(folder / "huge.jpg")
    good = ["plain.jpg", "图像 目录\\眼底 照片１.jpg", "cmyk.jpg", "deep.png", "huge.jpg"]
    bad = {
        "empty.jpg": "the file is empty (0 bytes)",
        "half.jpg": "the image is truncated",
        "text.jpg": "the file is not an image",
        "moving.gif": "the file holds several frames (GIF)",
        "gone.jpg": "the file does not exist",
        "C:\\pictures\\x.jpg": "the image path is absolute; paths are relative to the table",
    }
    table = io.StringIO()
    writer = csv.writer(table)
    for number, name in enumerate([*good, *bad]):
        writer.writerow([name, f"患者{number}", "左", "dry AMD, late|c/d: 0.6", 'a "small" disc, 左眼'])
    (folder / "table.csv").write_bytes((HEAD + table.getvalue()).encode("utf-8-sig"))
    before = sorted(folder.rglob("*"))
    assert "of 11 rows cannot be used" in refused(*build(folder, "table.csv"))
    assert not (folder.parent / "out" / "index.json").exists()
    answer = ask(*build(folder, "table.csv", "--max-rejects", "0.6"))
    assert answer.code == 0 and "5 exams" in answer.text, answer.text
    with (folder.parent / "out" / "rejects.csv").open(encoding="utf-8-sig", newline="") as stream:
        listed = {row["item"]: row["reason"] for row in csv.DictReader(stream)}
    assert listed == bad
    assert ask("shards", "check", folder.parent / "out", "--workers", "1").code == 0
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the table is empty"),
        (b"\xef\xbb\xbf", "the table is empty"),
        (HEAD.encode(), "the table has no rows"),
        (b"Image,patient\nplain.jpg,1\n", "did you mean 'Image'?"),
        (b"image,patient_id,patient_id\nplain.jpg,1,2\n", "several columns have one name: patient_id"),
        (b"image,patient_id\nplain.jpg,1,2,3\n", "the table cannot be read"),
        (b'image,patient_id\n"plain.jpg,1\n', "the table cannot be read"),
        (b"PK\x03\x04\x00\xff\xd8", "neither UTF-8 nor GB18030"),
        (b"image,patient_id,split\nplain.jpg,1,train\ncmyk.jpg,1,val\n", "2 x the patient is in two splits"),
    ],
)
def test_tables(folder: Path, content: bytes, told: str) -> None:
    (folder / "table.csv").write_bytes(content)
    assert told in refused(*build(folder, "table.csv"))


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("table: [t.csv\n", "no YAML"),
        ("table: t.csv\ntext: {varants: 2}\n", "'varants' (did you mean 'variants'?)"),
        ("table: t.csv\nlabels: {a: [x, y]}\n", "labels.a: must be one text"),
        ("table: t.csv\ntext: {prompts: none.yaml}\n", "the prompt dictionary cannot be read"),
        ("table: none.csv\n", "the table cannot be read: No such file"),
    ],
)
def test_cards(folder: Path, card: str, told: str) -> None:
    (folder / "t.csv").write_text(HEAD + "plain.jpg,1,left,a,b\n", encoding="utf-8")
    (folder / "card.yaml").write_text(card, encoding="utf-8")
    assert told in refused(*build(folder, "card.yaml"))


def test_output_that_is_a_file__leaves_no_key_behind(folder: Path) -> None:
    (folder / "t.csv").write_text(HEAD + "plain.jpg,1,left,a,b\n", encoding="utf-8")
    before = sorted(folder.iterdir())
    assert "not a folder" in refused("shards", "build", folder / "t.csv", "--out", folder / "t.csv")
    assert sorted(folder.iterdir()) == before
