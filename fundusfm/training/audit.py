"""Looking into checkpoints: are they whole, what do they hold; all weights in one file with an account."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fundusfm.errors import UserError, plain_write_errors
from fundusfm.training.checkpoint import (
    Manifest,
    find_checkpoint,
    load_weights,
    step_folders,
    verify,
)
from fundusfm.training.loading import load_objective
from fundusfm.training.pieces import TornCheckpointError
from fundusfm.training.strategies.portable import tied_names


@dataclass(frozen=True)
class Finding:
    """One checkpoint: its manifest if it is whole, else what is wrong with it."""

    folder: Path
    manifest: Manifest | None
    fault: TornCheckpointError | None
    size_gib: float


def look_at(path: Path) -> list[Finding]:
    """The checkpoints of a run folder in the order of steps, or the one `path` is; each file is read.

    A run that is training meanwhile prunes old ones; those that are gone when their turn comes are left out.
    """
    if (path / "checkpoints").is_dir():
        folders = step_folders(path / "checkpoints")
    else:
        folders = [folder for folder in step_folders(path.resolve().parent) if folder == path.resolve()]
    findings = [finding for folder in folders if (finding := _finding(folder))]
    if not findings:
        raise UserError(
            "there is no checkpoint",
            where=str(path),
            fix="give a run folder or runs/<name>/checkpoints/step-...",
        )
    return findings


def _finding(folder: Path) -> Finding | None:
    manifest, fault = None, None
    try:
        manifest = verify(folder)
    except TornCheckpointError as error:
        fault = error
    try:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:
        size = 0
    return Finding(folder, manifest, fault, size / 2**30) if folder.is_dir() else None


def consolidate(path: Path, out: Path) -> dict[str, str]:
    """Write all weights of a checkpoint to one safetensors file that any strict loader takes.

    Returns the audit: each tensor of the objective -> what it is and its shape. Tied tensors are written
    under each of their names. Nothing is left at `out` if a single one is missing, surplus or changed.
    """
    folder = find_checkpoint(path)
    manifest = verify(folder)
    objective, _ = load_objective(folder)
    weights = {name: tensor.clone() for name, tensor in load_weights(folder).items()}
    kinds = kinds_of(objective)
    expected = objective.state_dict()
    if odd := sorted(kinds.keys() ^ weights.keys()):
        raise UserError(f"tensors of the objective and of the checkpoint differ: {odd[:5]}", str(folder))
    partial = out.with_name(f".{out.name}.partial")
    with plain_write_errors("the weights", out, "free some space, or set another --out"):
        try:
            _save(weights, partial, manifest.step)
            written = load_file(partial)
            changed = [name for name, tensor in expected.items() if not written[name].equal(tensor)]
            if changed:
                raise UserError(f"tensors changed on the way: {changed[:5]}", where=str(out))
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    return {name: f"{kind}, {json.dumps([*weights[name].shape])}" for name, kind in kinds.items()}


def _save(weights: dict[str, Tensor], path: Path, step: int) -> None:
    try:
        save_file(weights, path, {"format": "pt", "step": str(step)})
    except SafetensorError as error:  # what it makes of an OSError
        raise OSError(str(error)) from error


def kinds_of(module: nn.Module) -> dict[str, str]:
    """Each name of a state dict -> `trained`, `frozen`, `buffer`, or whom it is tied to."""
    tied = tied_names(module)
    kinds = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in tied:
            kinds[name] = f"tied to {tied[name]}"
        elif not isinstance(tensor, nn.Parameter):
            kinds[name] = "buffer"
        else:
            kinds[name] = "trained" if tensor.requires_grad else "frozen"
    return kinds
