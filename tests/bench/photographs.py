"""What the loaders are measured on: pairs of camera-size photographs, and the same at smaller sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fundusfm.shards.draft import ExamDraft, Reject
from fundusfm.shards.exam import Exam, ImageRecord, TextRecord, image_member, text_member
from fundusfm.shards.index import ShardIndex
from fundusfm.shards.synth.source import SynthSource
from fundusfm.shards.writer import write_shards

WIDTH, HEIGHT = 2048, 1536
EYES = ("left", "right")
Pair = tuple[bytes, bytes]
_NOISE = 1.5  # of a sensor, in grey levels; brings the file to the 400 kB of real ones


def encode(image: Image.Image, quality: int, subsampling: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, subsampling=subsampling)
    return stream.getvalue()


def camera_pairs(num_pairs: int) -> list[Pair]:
    """JPEGs of 2048 x 1536 pixels as cameras write them: quality 90, colour at half resolution."""
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(_camera_pair, range(num_pairs)))


def _camera_pair(number: int) -> Pair:
    draft, _ = SynthSource(number + 1, 0, HEIGHT).load(number)
    assert draft is not None
    rng = np.random.default_rng(number)
    left, right = (_on_sensor(draft.contents[f"{eye}.cfp.0.jpg"], rng) for eye in EYES)
    return left, right


def _on_sensor(raw: bytes, rng: np.random.Generator) -> bytes:
    """A square photograph in the middle of the camera's wider sensor, with its noise."""
    pixels_HWC = np.full((HEIGHT, WIDTH, 3), 6.0, dtype=np.float32)
    margin = (WIDTH - HEIGHT) // 2
    pixels_HWC[:, margin : margin + HEIGHT] = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    pixels_HWC += rng.normal(0, _NOISE, pixels_HWC.shape)
    return encode(Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)), 90, subsampling=2)


def shrunk(pairs: Sequence[Pair], short_side: int) -> list[Pair]:
    """The pairs as `shards build --size` stores them."""
    shrink = partial(_shrink, short_side=short_side)
    return [(shrink(left), shrink(right)) for left, right in pairs]


def _shrink(raw: bytes, short_side: int) -> bytes:
    image = Image.open(io.BytesIO(raw))
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return encode(image.resize(size, Image.Resampling.LANCZOS), 92, subsampling=0)


def build(pairs: Sequence[Pair], num_exams: int, out: Path) -> ShardIndex:
    """Shards of `num_exams` patients, in four tars; the pairs are used again and again."""
    return write_shards(PairSource(pairs, num_exams), out, exams_per_shard=num_exams // 4)


class PairSource:
    """An exam source of left and right photographs, each with a report."""

    name, digest = "bench", "bench"
    rejects: Sequence[Reject] = ()

    def __init__(self, pairs: Sequence[Pair], num_exams: int) -> None:
        self._pairs, self.num_items = pairs, num_exams

    def splits(self) -> Sequence[str]:
        return ["train"] * self.num_items

    def load(self, number: int) -> tuple[ExamDraft | None, list[Reject]]:
        pair = self._pairs[number % len(self._pairs)]
        report = text_member("en", 0)
        contents = {image_member(eye, "CFP", 0): raw for eye, raw in zip(EYES, pair, strict=True)}
        records = [_record(eye, raw) for eye, raw in zip(EYES, pair, strict=True)]
        texts = (TextRecord(report, "en"),)
        exam = Exam(f"patient{number}", f"exam{number}", "train", tuple(records), texts)
        return ExamDraft(exam, {**contents, report: report_of(number).encode()}), []

    def card(self) -> dict[str, Any]:
        return {}


def _record(eye: str, raw: bytes) -> ImageRecord:
    width, height = Image.open(io.BytesIO(raw)).size
    return ImageRecord(image_member(eye, "CFP", 0), eye, "CFP", width, height)


def report_of(number: int) -> str:
    """A report of ordinary length."""
    return f"Left eye: moderate haemorrhages, few exudates. Right eye: cup-to-disc ratio 0.{number % 10}."
