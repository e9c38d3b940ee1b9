"""The files of an evaluation: a run's metrics in, a whole folder out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fundusfm.errors import UserError
from fundusfm.evaluation.predictions import PREDICTIONS, Predictions
from fundusfm.evaluation.results import Results
from fundusfm.shards.index import ShardIndex

REPORT, RESULTS = "report.html", "results.json"
_ANOTHER_FOLDER = "give another folder with --out"


def read_metrics(path: Path, last_step: int) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl` up to a step, without torn ones; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if record["step"] <= last_step:
            found.append({key: value for key, value in record.items() if isinstance(value, int | float)})
    return found


def check_out(final: Path, index: ShardIndex) -> None:
    """Before any work: never into the shards, never over something that is no evaluation."""
    place = final.resolve()
    if "://" not in index.root and Path(index.root).resolve() in (place, *place.parents):
        raise UserError(
            "the report would be written into the shard set", where=str(final), fix=_ANOTHER_FOLDER
        )
    refuse_other_content(final, RESULTS)


def refuse_other_content(final: Path, marker: str) -> None:
    """UserError if `final` holds anything but an earlier output, known by `marker`, or cannot be written."""
    if final.exists() and not (final / marker).is_file() and (not final.is_dir() or any(final.iterdir())):
        raise UserError("the folder holds something else", where=str(final), fix=_ANOTHER_FOLDER)
    place = final.resolve()
    above = next(folder for folder in place.parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise UserError("the report cannot be written there", where=str(above), fix=_ANOTHER_FOLDER)


def write(final: Path, results: Results, html: str, predictions: Predictions) -> None:
    """Put a whole evaluation under its final name; an earlier one stays until then."""
    files = {RESULTS: results.to_json(), REPORT: html.encode(), PREDICTIONS: predictions.to_bytes()}
    write_folder(final, files)


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Files as a folder that is whole or not there; an earlier one stays until then."""
    final = final.absolute()  # `.` has no name
    partial, old = (final.with_name(f".{final.name}.{os.getpid()}.{state}") for state in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            with (partial / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if final.exists():
            final.rename(old)
        partial.rename(final)
    except OSError as error:
        if old.exists() and not final.exists():
            old.rename(final)
        raise UserError(
            f"the report cannot be written: {error.strerror or error}", where=str(final), fix=_ANOTHER_FOLDER
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
