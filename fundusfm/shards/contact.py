"""The contact sheet: a few samples of every label and modality, with captions."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fundusfm.errors import UserError
from fundusfm.shards.exam import ImageRecord
from fundusfm.shards.files import mapped
from fundusfm.shards.image import ImageError, decode_image
from fundusfm.shards.index import Offsets, ShardEntry, ShardIndex, write_atomically
from fundusfm.shards.reading import exam_at

_TILE_PX, _CAPTION_PX, _TITLE_PX, _GAP_PX = 176, 42, 22, 6
_SAMPLES = 8
_MAX_ROWS = 24
_EXAMS_A_SHARD = 400  # enough to meet every label of a set that is shuffled over its shards
_INK, _FAINT, _PAPER = "#1b1b1b", "#5c5c5c", "#ffffff"
Sample = tuple[Image.Image, str]


@dataclass(frozen=True)
class _Place:
    """Where an image lies, so that only those on the sheet are decoded."""

    path: Path
    start: int
    end: int
    split: str
    image: ImageRecord
    exam_labels: tuple[str, ...]


def draw_sheet(index: ShardIndex, path: Path) -> None:
    """Write the sheet: a row for each modality and label, up to eight samples, sources in turn."""
    rows = _samples(index)
    width = _SAMPLES * (_TILE_PX + _GAP_PX) + _GAP_PX
    row_height = _TITLE_PX + _TILE_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (width, max(1, len(rows)) * row_height + _GAP_PX), _PAPER)
    for number, (title, samples) in enumerate(rows.items()):
        _draw_row(sheet, number * row_height + _GAP_PX, title, samples)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, stream.getvalue())
    except OSError as error:
        what = f"the contact sheet cannot be written: {error.strerror}"
        raise UserError(what, where=str(path), fix="give another place with --sheet") from error


def _draw_row(sheet: Image.Image, top: int, title: str, samples: list[Sample]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP_PX, top), title, fill=_INK, font=ImageFont.load_default(15))
    font = ImageFont.load_default(11)
    for column, (picture, caption) in enumerate(samples):
        left = _GAP_PX + column * (_TILE_PX + _GAP_PX)
        sheet.paste(picture, (left, top + _TITLE_PX))
        for line, text in enumerate(caption.split("\n")):
            place = (left, top + _TITLE_PX + _TILE_PX + 1 + 13 * line)
            draw.text(place, _fitting(text, font), fill=_FAINT, font=font)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut to the width of a tile; letters that the built-in font lacks become question marks."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and font.getlength(text) > _TILE_PX:
        text = text[:-1]
    return text


def _samples(index: ShardIndex) -> dict[str, list[Sample]]:
    """`MODALITY: label` -> decoded samples, ordered by modality and label."""
    places: dict[str, dict[str, list[_Place]]] = defaultdict(lambda: defaultdict(list))
    for shard in index.shards:
        for place in _readable_places(index, shard):
            for title in _titles(place):
                places[title][place.image.source].append(place)
    titles = sorted(places)[:_MAX_ROWS]
    return {title: [_decode(place) for place in _in_turn(places[title].values())] for title in titles}


def _readable_places(index: ShardIndex, shard: ShardEntry) -> list[_Place]:
    """As `_places`; UserError if the shard is missing or damaged."""
    path = Path(index.path(shard.name))
    try:
        return list(_places(path, shard, index.path(shard.offsets)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the shard cannot be read: {error}", where=str(path), fix="run `fundusfm shards check`"
        ) from error


def _places(path: Path, shard: ShardEntry, offsets: str) -> Iterator[_Place]:
    """The images of the first exams of a shard; only their json is read."""
    where = Offsets.load(offsets)
    with mapped(path) as buffer:
        for start, end in list(zip(where.start_E.tolist(), where.end_E.tolist(), strict=True))[
            :_EXAMS_A_SHARD
        ]:
            exam = exam_at(buffer, start, end, split=shard.split).exam
            for image in exam.images:
                yield _Place(path, start, end, shard.split, image, exam.labels or ())


def _titles(place: _Place) -> list[str]:
    labels = dict.fromkeys((*(place.image.labels or ()), *place.exam_labels))
    return [f"{place.image.modality}: {label}" for label in labels or ("no label",)]


def _in_turn(groups: Iterable[list[_Place]]) -> list[_Place]:
    """The first of each source, then the second of each, up to the width of the sheet."""
    rounds = zip_longest(*groups)
    return [place for turn in rounds for place in turn if place is not None][:_SAMPLES]


def _decode(place: _Place) -> Sample:
    """The picture on a black tile, and where it comes from."""
    image = place.image
    caption = f"{image.eye or 'unknown eye'}, {place.split}, {image.width} x {image.height}\n{image.source}"
    with mapped(place.path) as buffer:
        raw = exam_at(buffer, place.start, place.end, split=place.split).read(image.name)
    try:
        picture = decode_image(raw).convert("RGB")
    except ImageError as error:
        return Image.new("RGB", (_TILE_PX, _TILE_PX), "black"), f"{caption}\n{error}"
    return ImageOps.pad(picture, (_TILE_PX, _TILE_PX), Image.Resampling.BICUBIC, color="black"), caption
