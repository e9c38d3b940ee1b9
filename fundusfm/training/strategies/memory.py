"""What a rank's memory is taken by, and a checkpoint's room on the disk; both known before the first step."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from torch import nn

from fundusfm.errors import UserError
from fundusfm.recipe.schema import Recipe, Strategy
from fundusfm.training.strategies.portable import blocks_of, tied_names

_AVERAGES = 2  # AdamW's, of the size of what is trained
_NUMBER_BYTES = 4
_GIB = 2**30


def memory_of(recipe: Recipe, module: nn.Module) -> dict[str, int]:
    """Bytes of each part on one rank, without activations. ZeRO has a master copy of what it trains."""
    ranks, strategy = recipe.trainer.devices * recipe.trainer.nodes, recipe.trainer.strategy
    total = _num_bytes(module, trained_only=False)
    trained = _num_bytes(module, trained_only=True)
    weights, gradients, optimiser = total, trained, _AVERAGES * trained
    if strategy is Strategy.fsdp:
        blocks = list(blocks_of(module))
        in_blocks = sum(_num_bytes(block, trained_only=False) for block in blocks)
        trained_in_blocks = sum(_num_bytes(block, trained_only=True) for block in blocks)
        spared = math.ceil(trained_in_blocks * (ranks - 1) / ranks)
        weights -= math.ceil(in_blocks * (ranks - 1) / ranks)
        gradients, optimiser = gradients - spared, optimiser - _AVERAGES * spared
    elif strategy is not Strategy.ddp:
        share = math.ceil(trained / ranks)
        optimiser = _AVERAGES * share + share
        gradients = gradients if strategy is Strategy.zero1 else share
        weights = weights if strategy is not Strategy.zero3 else math.ceil(total / ranks)
    return {"weights": weights, "gradients": gradients, "optimiser": optimiser}


def memory_line(recipe: Recipe, module: nn.Module) -> str:
    """The line of the header."""
    parts = memory_of(recipe, module)
    where = ", optimiser in the host's memory" if recipe.trainer.offload else ""
    sizes = " + ".join(f"{_in_words(size)} {name}" for name, size in parts.items())
    return f"{sizes} = {_in_words(sum(parts.values()))} a rank, and activations{where}"


def checkpoint_bytes(module: nn.Module) -> int:
    """What one checkpoint takes on the disk, within some kilobytes."""
    aliases = tied_names(module)
    state = module.state_dict()
    stored: int = sum(t.numel() * t.element_size() for name, t in state.items() if name not in aliases)
    return stored + _AVERAGES * _num_bytes(module, trained_only=True)


def refuse_small_disk(folder: Path, module: nn.Module, keep: int) -> None:
    """Refuse to train for hours towards a checkpoint that cannot be written."""
    needed, free = checkpoint_bytes(module), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"a checkpoint needs {_in_words(needed)}, and {_in_words(free)} are free",
            where=str(folder),
            fix=f"free some space or set runs_dir elsewhere; checkpoint.keep={keep} needs "
            f"{_in_words((keep + 1) * needed)} in all",
        )


def _num_bytes(module: nn.Module, *, trained_only: bool) -> int:
    return sum(p.numel() * _NUMBER_BYTES for p in module.parameters() if p.requires_grad or not trained_only)


def _in_words(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"
