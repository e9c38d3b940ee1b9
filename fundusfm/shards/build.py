"""`fundusfm shards build`: a dataset card or a bare cohort table to published shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fundusfm.errors import UserError
from fundusfm.shards.card import Card, load_card
from fundusfm.shards.cohort import CohortSource, Options, Visit, group_visits
from fundusfm.shards.draft import Reject
from fundusfm.shards.exam import SCHEMA_VERSION
from fundusfm.shards.image import CROPS, JPEG_QUALITY
from fundusfm.shards.index import ShardIndex
from fundusfm.shards.labeltext import Prompts, load_prompts
from fundusfm.shards.plan import Part
from fundusfm.shards.pseudonym import key_path, read_key, read_or_make_key
from fundusfm.shards.rows import Row, read_rows
from fundusfm.shards.secondtable import ExamNotes, read_notes
from fundusfm.shards.table import COHORT_COLUMNS, EXAM_COLUMNS, Cells, match_columns, read_table
from fundusfm.shards.workers import default_workers
from fundusfm.shards.writer import EXAMS_PER_SHARD, MAX_REJECTS, plain_disk_errors, write_part, write_shards

IMAGE_SIZE = 512


def build_shards(
    what: Path,
    out: Path,
    *,
    size: int = IMAGE_SIZE,
    workers: int | None = None,
    max_rejects: float = MAX_REJECTS,
    exams_per_shard: int = EXAMS_PER_SHARD,
    key: Path | None = None,
    crop: str | None = None,
) -> ShardIndex:
    """Build the shards of a card (.yaml) or cohort table (.csv, .tsv, .parquet) in the folder `out`.

    `size`: short side of the stored images in pixels. `key`: an existing key file, so that patients get the
    pseudonyms they have in another set; by default `<out>.key` is made. `crop` overrides the card's.
    """
    out = out.absolute()
    return write_shards(
        _source_of(what, out, size, exams_per_shard, key, crop),
        out,
        workers=default_workers() if workers is None else workers,
        exams_per_shard=exams_per_shard,
        max_rejects=max_rejects,
    )


def build_part(
    what: Path,
    out: Path,
    part: Part,
    *,
    size: int = IMAGE_SIZE,
    workers: int | None = None,
    max_rejects: float = MAX_REJECTS,
    exams_per_shard: int = EXAMS_PER_SHARD,
    key: Path | None = None,
    crop: str | None = None,
) -> int:
    """Build only a part of the shards, and publish nothing; returns how many shards the part has.

    Once all parts are built, `build_shards` with the same arguments publishes them; what is missing it makes.
    """
    out = out.absolute()
    return write_part(
        _source_of(what, out, size, exams_per_shard, key, crop),
        out,
        part,
        workers=default_workers() if workers is None else workers,
        exams_per_shard=exams_per_shard,
        max_rejects=max_rejects,
    )


def _source_of(
    what: Path, out: Path, size: int, exams_per_shard: int, key: Path | None, crop: str | None
) -> CohortSource:
    """The exams of a card or table, checked; makes the key of `out` if there is none."""
    if crop is not None and crop not in CROPS:
        raise UserError(
            f"there is no crop {crop!r}", where="--crop", fix=f"choose one of: {', '.join(CROPS)}"
        )
    _check_numbers(size=size, exams_per_shard=exams_per_shard)
    card = load_card(what)
    card.crop = crop or card.crop
    table, second = _read_cells(card)
    _refuse_input_folder(out, card, table)
    rows, rejects = read_rows(table, Path(card.images), card.labels)
    notes, more_rejects = _read_notes(second, card, rows)
    prompts = _load_prompts(card, rows, notes)
    with plain_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        key_bytes = read_key(key) if key else read_or_make_key(key_path(out))
    shares = (card.split.train, card.split.val, card.split.test)
    visits = group_visits(rows, notes, key_bytes, shares)
    text = (tuple(card.text.languages), card.text.variants) if prompts else ((), 1)
    source = CohortSource(
        name=card.name,
        digest="",
        num_items=len(table) + len(second),
        rejects=(*rejects, *more_rejects),
        folder=card.images,
        visits=visits,
        options=Options(size, card.crop, *text, prompts),
        about=_about(card, visits, prompts, size),
    )
    return replace(source, digest=_digest(source, key_bytes))


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}", where=f"--{name.replace('_', '-')}")


def _read_cells(card: Card) -> tuple[list[Cells], list[Cells]]:
    """Rows of the cohort table and of the second one under our column names, constants filled in."""
    path = Path(card.table)
    columns, cells = read_table(path)
    match_columns(columns, {name: name for name in card.drop}, (), (), path)  # a name to drop must exist
    columns = [name for name in columns if name not in card.drop]
    required = {"image", "patient_id"} - card.constants.keys()
    sources = match_columns(columns, card.columns, COHORT_COLUMNS, required, path)
    _refuse_shadows(card, sources)
    table = [
        {**{ours: record[theirs] for ours, theirs in sources.items()}, **card.constants} for record in cells
    ]
    if not card.exams.table:
        return table, []
    path = Path(card.exams.table)
    columns, cells = read_table(path)
    sources = match_columns(columns, card.exams.columns, EXAM_COLUMNS, {"patient_id"}, path)
    return table, [{ours: record[theirs] for ours, theirs in sources.items()} for record in cells]


def _refuse_shadows(card: Card, sources: Collection[str]) -> None:
    shadowed = ", ".join(name for name in card.constants if name in sources)
    if shadowed:
        raise UserError(
            f"the card gives a constant for columns that the table has: {shadowed}",
            where=card.table,
            fix="remove the constant, or name the column under `drop`",
        )


def _read_notes(second: list[Cells], card: Card, rows: list[Row]) -> tuple[ExamNotes, list[Reject]]:
    """Notes of the second table; ids written in two ways (`0012`, `12`) would lose all without a word."""
    notes, rejects = read_notes(second, card.labels, Path(card.exams.table).name)
    told = notes.labels.keys() | notes.texts.keys()
    exams = {(row.patient_id, exam_id) for row in rows for exam_id in ("", row.exam_id)}
    if told and rows and not told & exams:
        raise UserError(
            "no row of the second table is about an exam of the cohort",
            where=card.exams.table,
            fix="write patient_id and exam_id alike in both tables; spreadsheets drop leading zeros",
        )
    return notes, rejects


def _refuse_input_folder(out: Path, card: Card, table: list[Cells]) -> None:
    """UserError if `out` is a file, the table's folder, above the input, or in a folder of photographs."""
    if os.path.exists(out) and not out.is_dir():  # noqa: PTH110 - pathlib raises for a name too long
        raise UserError("the output is not a folder", where=str(out), fix="choose another --out")
    target = out.resolve()
    above_input = [Path(card.table).resolve().parent, Path(card.images).resolve()]
    images = [record["image"] for record in table if "\0" not in record["image"]]
    folders = {image.replace("\\", "/").rpartition("/")[0] for image in images}
    photographs = {(Path(card.images) / folder).resolve() for folder in folders if not folder.startswith("/")}
    inside = photographs & {target, *target.parents}
    if inside or any(target == folder or target in folder.parents for folder in above_input):
        raise UserError(
            "the output folder is part of the input, and input is never written to",
            where=str(out),
            fix="choose an --out outside the folders that hold the table and the photographs",
        )


def _load_prompts(card: Card, rows: list[Row], notes: ExamNotes) -> Prompts:
    if not card.text.prompts:
        return {}
    labels = {label for row in rows for label in row.labels or ()}
    labels |= {label for found in notes.labels.values() for label in found}
    return load_prompts(Path(card.text.prompts), labels, card.text.languages)


def _about(card: Card, visits: tuple[Visit, ...], prompts: Prompts, size: int) -> dict[str, Any]:
    """What the index says of the set; paths of this machine stay out of it."""
    labels = {label for visit in visits for row in visit.rows for label in row.labels or ()}
    labels |= {label for visit in visits for label in visit.labels or ()}
    described = {k: v for k, v in asdict(card).items() if k not in ("table", "images", "exams", "ordered")}
    described["text"] = {k: v for k, v in described["text"].items() if k != "prompts"} if prompts else {}
    return {
        "labels": sorted(labels),
        "ordered": card.ordered,
        "prompts": prompts,
        "card": described,
        "licence": card.licence,
        "image_size": size,
    }


def _digest(source: CohortSource, key: bytes) -> str:
    """Identity of the input and of all options that change the output.

    Photographs enter by name and size: reading them all would cost as much as building.
    """
    digest = hashlib.sha256(hashlib.sha256(key).digest())
    about = [SCHEMA_VERSION, JPEG_QUALITY, source.name, source.about, asdict(source.options)]
    digest.update(json.dumps(about, sort_keys=True).encode())
    for visit in source.visits:
        sizes = [(Path(source.folder) / row.image).stat().st_size for row in visit.rows]
        digest.update(json.dumps([asdict(visit), sizes], sort_keys=True).encode())
    digest.update(json.dumps([asdict(reject) for reject in source.rejects]).encode())
    return digest.hexdigest()
