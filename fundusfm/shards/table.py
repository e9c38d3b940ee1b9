"""Tables as people have them: CSV, TSV or Parquet, in UTF-8, UTF-16 or GB18030, read as plain text cells."""

from __future__ import annotations

import difflib
import io
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fundusfm.errors import UserError

Cells = dict[str, str]
COHORT_COLUMNS = (
    "image",
    "patient_id",
    "exam_id",
    "eye",
    "modality",
    "label",
    "report",
    "lang",
    "split",
    "source",
)
EXAM_COLUMNS = ("patient_id", "exam_id", "report", "lang", "label")
_DELIMITERS = (",", "\t", ";")


def read_table(path: Path) -> tuple[list[str], list[Cells]]:
    """Column names and rows, every cell a stripped string (empty where missing).

    UserError: no such file, no rows, not readable as a table.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"the table cannot be read: {error.strerror}", where=str(path)) from error
    frame = _parquet(raw, path) if path.suffix.lower() in (".parquet", ".pq") else _text_table(raw, path)
    frame.columns = [str(name).strip() for name in frame.columns]
    _refuse_twins(list(frame.columns), path)
    if frame.empty:
        raise UserError("the table has no rows", where=str(path), fix="give one row an image, under a header")
    columns = list(frame.columns)
    cells = [[_text(value) for value in frame[name].tolist()] for name in columns]
    return columns, [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]


def match_columns(
    columns: list[str],
    mapping: Mapping[str, str],
    known: Collection[str],
    required: Collection[str],
    path: Path,
) -> dict[str, str]:
    """Which column of the table gives each of ours: our name -> theirs; further columns give themselves.

    `mapping`: ours -> theirs, for columns of other names; one of theirs may serve several of ours. A column
    that has one of our names, where `mapping` names another one for it, is left out. UserError naming every
    missing column and the nearest one there is.
    """
    wanted = {**{name: name for name in known if name in columns or name in required}, **mapping}
    missing = [theirs for theirs in wanted.values() if theirs not in columns]
    if missing:
        problems = "; ".join(f"{name!r}{nearest(name, columns)}" for name in missing)
        raise UserError(
            f"the table lacks a column: {problems}",
            where=f"{path} (columns: {', '.join(columns)})",
            fix="rename the column, or map it in a dataset card (columns: {image: ..., patient_id: ...})",
        )
    taken = {*wanted, *wanted.values()}
    return {**wanted, **{name: name for name in columns if name not in taken}}


def nearest(name: str, known: Collection[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no known name is near."""
    lowered = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f" (did you mean {lowered[found[0]]!r}?)" if found else ""


def _text_table(raw: bytes, path: Path) -> pd.DataFrame:
    text = _decode(raw, path)
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    options: dict[str, Any] = {"sep": delimiter, "dtype": str, "keep_default_na": False, "engine": "c"}
    try:
        names = pd.read_csv(io.StringIO(text), header=None, nrows=1, **options)
        _refuse_twins([str(name).strip() for name in names.iloc[0]], path)
        with warnings.catch_warnings():
            # Else cells beyond the header would be dropped.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table: pd.DataFrame = pd.read_csv(io.StringIO(text), index_col=False, **options)
    except pd.errors.EmptyDataError as error:
        raise UserError(
            "the table is empty", where=str(path), fix="give a header and one row an image"
        ) from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = str(error).strip().rpartition("C error: ")[2]
        raise UserError(
            f"the table cannot be read: {reason}",
            where=str(path),
            fix="put cells that hold the separator or a line break into quotes, and close every quote",
        ) from error
    return table


def _refuse_twins(names: list[str], path: Path) -> None:
    """Of two columns of one name in a CSV, pandas would rename the second, and an id travel as metadata."""
    twins = sorted({name for name in names if name and names.count(name) > 1})
    if twins:
        raise UserError(
            f"several columns have one name: {', '.join(twins)}",
            where=str(path),
            fix="rename or remove all but one of them",
        )


def _decode(raw: bytes, path: Path) -> str:
    """UTF-8 with or without a byte-order mark, UTF-16 with one, else GB18030, which Chinese Excel writes."""
    encodings = ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030")
    text = next((text for text in map(partial(_decoded, raw), encodings) if text is not None), None)
    if text is not None:
        return text
    raise UserError(
        "the table is neither UTF-8 nor GB18030 text",
        where=str(path),
        fix="save it as CSV in UTF-8, or as Parquet",
    )


def _decoded(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _parquet(raw: bytes, path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(io.BytesIO(raw))
    except Exception as error:  # Arrow has its own exceptions, and pandas wraps only some
        raise UserError(f"the Parquet file cannot be read: {error}", where=str(path)) from error


def _text(value: Any) -> str:
    """A cell as text; whole numbers that Parquet keeps as floats lose their `.0`, lists become `a|b`."""
    if isinstance(value, (np.ndarray, list, tuple)):
        return "|".join(_text(item) for item in value)
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
