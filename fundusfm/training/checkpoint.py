"""Checkpoints: a folder that is whole or does not exist under its name.

    checkpoints/step-00001200/{manifest.json, weights-00000.safetensors, optimiser-00000.safetensors,
                               trainer.pt, recipe.yaml, tokenizer/}
    checkpoints/latest -> step-00001200

Each rank writes one file of weights and one of optimiser state (`pieces.py`). Everything goes to a temporary
folder, is digested, flushed and renamed; only then are old ones pruned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fundusfm.errors import UserError
from fundusfm.training.pieces import (
    Piece,
    PieceReader,
    TornCheckpointError,
    UnreadableCheckpointError,
    write_pieces,
)

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
WEIGHTS, OPTIMISER = "weights", "optimiser"
_TRAINER = "trainer.pt"
_CHUNK_BYTES = 1 << 22
_log = logging.getLogger(__name__)
# How torch.save words that its file takes no more; the reason is lost on the way.
_OF_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream error")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: where training stood, what it was made with, and the digest of each file."""

    step: int
    exams_seen: int
    world_size: int
    strategy: str
    made_with: dict[str, str]
    shards: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


def step_folder(step: int) -> str:
    """`step-00001200`."""
    return f"step-{step:08d}"


def rank_file(kind: str, rank: int) -> str:
    """`weights-00003.safetensors`."""
    return f"{kind}-{rank:05d}.safetensors"


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk that takes no more is behind it: torch.save and safetensors wrap what they are told."""
    of_torch_save = isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_TORCH_SAVE)
    return of_torch_save or isinstance(error, (OSError, SafetensorError))


def cannot_write(final: Path, error: BaseException) -> UserError:
    """What the user is told when a checkpoint cannot be written; what was there before stays as it was."""
    reason = getattr(error, "strerror", None) or f"most likely the disk is full ({error})"
    return UserError(
        f"the checkpoint cannot be written: {reason}",
        where=str(final),
        fix="free some space or set runs_dir elsewhere, then resume; earlier checkpoints are untouched",
    )


def open_partial(final: Path) -> Path:
    """An empty temporary folder beside `final`. First rank only."""
    partial = final.parent / f".{final.name}.partial"
    clear_leftovers(final.parent)
    partial.mkdir(parents=True)
    return partial


def write_rank_files(
    partial: Path, rank: int, weights: Iterable[Piece], optimiser: Iterable[Piece], aliases: Mapping[str, str]
) -> dict[str, str]:
    """One rank's part of a checkpoint, flushed; returns the digest of each file."""
    paths = {kind: partial / rank_file(kind, rank) for kind in (WEIGHTS, OPTIMISER)}
    write_pieces(paths[WEIGHTS], weights, aliases)
    write_pieces(paths[OPTIMISER], optimiser, {})
    for path in paths.values():
        _flush(path)
    return {path.name: digest(path) for path in paths.values()}


def write_trainer_state(partial: Path, state: Mapping[str, Any]) -> None:
    """Loops, schedule, callbacks: everything but tensors of the model and the optimiser. First rank only."""
    torch.save(dict(state), partial / _TRAINER)


def complete(partial: Path, final: Path, manifest: Manifest, of_ranks: Mapping[str, str], keep: int) -> None:
    """Give a folder its manifest and its name, and prune all but the newest `keep`. First rank only.

    `of_ranks`: digests of the files that ranks have written and flushed; other files are digested here.
    """
    names = {str(p.relative_to(partial)): p for p in sorted(partial.rglob("*")) if p.is_file()}
    files = {name: of_ranks.get(name) or digest(path) for name, path in names.items()}
    record = {"schema": SCHEMA_VERSION, **manifest.__dict__, "files": {**of_ranks, **files}}
    record["digest"] = _digest_of_record(record)
    (partial / MANIFEST).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    _flush(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _point_latest(final)
    _flush(final.parent, deep=False)
    prune(final, keep)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or pruning. By whoever holds the run, while nothing is written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path, *, deep: bool = True) -> None:
    """Make files and names survive a power cut."""
    for path in [*(folder.rglob("*") if deep and folder.is_dir() else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _point_latest(final: Path) -> None:
    fresh = final.parent / f".{LATEST}.partial"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(final.name)
    fresh.replace(final.parent / LATEST)


def prune(newest: Path, keep: int) -> None:
    """Remove all but `newest` and the `keep` - 1 before it.

    Later ones stay: they are torn ones that a resumed run has passed over and will write again. One that
    cannot be removed now, since a reader on network storage has it open, is named and left to the next save.
    """
    for path in [path for path in step_folders(newest.parent) if path.name <= newest.name][:-keep]:
        try:
            # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.pruned")))
        except OSError as error:
            _log.warning("an old checkpoint cannot be removed yet: %s: %s", path, error.strerror or error)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in the order of their steps."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()


def _digest_of_record(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are not looked at; TornCheckpointError without a whole one."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema, own_digest = record["schema"], record.pop("digest", None)
    except OSError as error:
        raise _not_given(folder / MANIFEST, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornCheckpointError(
            f"the checkpoint has no readable {MANIFEST}: {error}", where=str(folder)
        ) from error
    if schema != SCHEMA_VERSION:
        raise TornCheckpointError(
            f"the checkpoint has schema version {schema}, not {SCHEMA_VERSION}", where=str(folder)
        )
    if own_digest != _digest_of_record(record):
        raise TornCheckpointError("a file of the checkpoint is damaged", where=str(folder / MANIFEST))
    return Manifest(**{key: value for key, value in record.items() if key != "schema"})


def verify(folder: Path) -> Manifest:
    """The manifest of a whole checkpoint; TornCheckpointError naming the file that is missing or changed."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            is_as_written = digest(path) == expected
        except OSError as error:
            raise _not_given(path, error) from error
        if not is_as_written:
            raise TornCheckpointError("a file of the checkpoint is damaged", where=str(path))
    return manifest


def _not_given(path: Path, error: OSError) -> TornCheckpointError:
    if isinstance(error, FileNotFoundError):
        return TornCheckpointError("a file of the checkpoint is missing", where=str(path))
    what = f"a file of the checkpoint cannot be read: {error.strerror or error}"
    if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)):
        return TornCheckpointError(what, where=str(path))
    return UnreadableCheckpointError(what, where=str(path), fix="start it again once the storage answers")


def newest_whole(folder: Path) -> tuple[Path | None, list[TornCheckpointError]]:
    """The newest whole checkpoint of a run, if there is one, and what was wrong with newer ones."""
    torn = []
    for path in reversed(step_folders(folder)):
        try:
            verify(path)
        except TornCheckpointError as error:
            torn.append(error)
        else:
            return path, torn
    return None, torn


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by its folder, `latest` or a run folder; UserError without one."""
    for folder in (path, path / "checkpoints" / LATEST):
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    if (path / "checkpoints").is_dir():
        newest, torn = newest_whole(path / "checkpoints")
        if newest:
            return newest
        if torn:
            raise torn[0]
    raise UserError(
        "there is no checkpoint", where=str(path), fix="give a run folder or runs/<name>/checkpoints/step-..."
    )


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """What `write_trainer_state` wrote, from a folder that was verified before."""
    state: dict[str, Any] = torch.load(folder / _TRAINER, map_location="cpu", weights_only=True)
    return state


def pieces_of(folder: Path, kind: str) -> PieceReader:
    """The tensors of a kind of a checkpoint that was verified before."""
    names = [name for name in read_manifest(folder).files if name.startswith(f"{kind}-")]
    return PieceReader([folder / name for name in sorted(names)])


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The objective's weights of a checkpoint, whole, under all their names."""
    reader = pieces_of(folder, WEIGHTS)
    weights = {name: reader.whole(name) for name in reader.names}
    return {**weights, **{alias: weights[name] for alias, name in reader.aliases.items()}}
