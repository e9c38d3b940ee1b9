from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fundusfm.errors import UserError
from fundusfm.shards.build import build_shards
from fundusfm.shards.stats import show_stats

Table = Callable[..., Path]


def shown(folder: Path, **options: Path) -> dict[str, list[str]]:
    """Title of each row -> its numbers."""
    with (console := Console(width=200)).capture() as capture:
        show_stats(folder, console=console, **options)
    rows = [line.split("│")[1:-1] for line in capture.get().splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_table_and_sheet(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(9, lambda rows: [r.update(split="val" if n < 6 else "train") for n, r in enumerate(rows)])
    build_shards(path, tmp_path / "out", size=32, workers=1)
    before = sorted((tmp_path / "out").iterdir())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = shown(tmp_path / "out")
    assert rows["patients"] == rows["exams"] == ["6", "3", "9"]
    assert rows["images"] == ["12", "6", "18"]
    assert rows["eyes: left"] == ["6", "3", "9"]
    assert rows["labels: glaucoma"] == ["4", "2", "6"]
    assert rows["labels: normal"] == ["8", "4", "12"]
    assert rows["modalities: CFP"] == rows["sources: clinic"] == ["12", "6", "18"]
    assert sorted((tmp_path / "out").iterdir()) == before
    pixels = np.asarray(Image.open(tmp_path / "here" / "table-contact.png"))
    is_tile = (pixels == 0).all(axis=2)  # the black surround of a photograph
    assert is_tile[:250].any()
    assert is_tile[-200:].any()
    assert not is_tile[:200, -180:].any(), "six of eight places of the first row are filled"


def test_brackets_in_names_are_shown_as_they_are(table: Table, tmp_path: Path) -> None:
    path = table(2, lambda rows: [row.update(label="glaucoma [suspect]|x[/b]") for row in rows])
    card = tmp_path / "card.yaml"
    card.write_text(f"table: {path}\nname: clinics [a/b]\n")
    build_shards(card, tmp_path / "out", size=32, workers=1)
    assert {"labels: glaucoma [suspect]", "labels: x[/b]"} <= shown(
        tmp_path / "out", sheet=tmp_path / "s.png"
    ).keys()


def test_sheet_where_asked(table: Table, tmp_path: Path) -> None:
    build_shards(table(2), tmp_path / "out", size=32, workers=1)
    shown(tmp_path / "out", sheet=tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").format == "PNG"
    with pytest.raises(UserError, match="is a PNG"):
        shown(tmp_path / "out", sheet=tmp_path / "sheet.jpg")
    with pytest.raises(UserError, match="no such folder"):
        shown(tmp_path / "none")
