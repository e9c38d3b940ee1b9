from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw


def draw_fundus(seed: int, size: tuple[int, int] = (72, 64)) -> Image.Image:
    """A bright disc with noise on black: no two seeds give the same pixels."""
    noise = np.random.default_rng(seed).integers(90, 250, (*size[::-1], 3), dtype=np.uint8)
    disc = Image.new("L", size)
    radius = min(size) // 2 - 2
    centre_x, centre_y = size[0] // 2, size[1] // 2
    box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
    ImageDraw.Draw(disc).ellipse(box, fill=255)
    return Image.composite(Image.fromarray(noise), Image.new("RGB", size), disc)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A UTF-8 table of rows that share their keys."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def cohort(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`cohort(n)` draws both eyes of n patients under `tmp_path/cohort/images`; returns the rows."""

    def draw(patients: int, size: tuple[int, int] = (72, 64)) -> list[dict[str, Any]]:
        folder = tmp_path / "cohort" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(patients):
            for eye in ("left", "right"):
                draw_fundus(2 * number + (eye == "left"), size).save(folder / f"{number}_{eye}.jpg")
                rows.append(
                    {
                        "image": f"images/{number}_{eye}.jpg",
                        "patient_id": f"patient {number}",
                        "eye": eye,
                        "label": "glaucoma" if number % 3 == 0 else "normal",
                        "source": "clinic",
                        "age": str(40 + number),
                    }
                )
        return rows

    return draw


@pytest.fixture
def table(tmp_path: Path, cohort: Callable[..., list[dict[str, Any]]]) -> Callable[..., Path]:
    """`table(n)` draws a cohort of n patients and writes its table; `edit` changes the rows before."""

    def write(
        patients: int,
        edit: Callable[[list[dict[str, Any]]], Any] | None = None,
        size: tuple[int, int] = (72, 64),
    ) -> Path:
        rows = cohort(patients, size)
        if edit is not None:
            edit(rows)
        return write_csv(tmp_path / "cohort" / "table.csv", rows)

    return write
