"""Where a run begins: at its own newest whole checkpoint, at another run's, or from nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fundusfm.errors import UserError, plain_write_errors
from fundusfm.objectives import config_of
from fundusfm.objectives.base import Objective
from fundusfm.recipe.load import ResolvedRecipe, recipe_from_yaml_text
from fundusfm.recipe.schema import Negatives, Recipe
from fundusfm.recipe.values import diff_recipes
from fundusfm.shards.index import write_atomically
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.tokens import Tokens, load_tokens
from fundusfm.training.checkpoint import find_checkpoint, newest_whole, read_manifest, verify
from fundusfm.training.keeper import shards_of
from fundusfm.training.pieces import UnreadableCheckpointError
from fundusfm.training.runfolder import ANOTHER_RUNS_DIR, RunFolder

_FREE_TO_CHANGE = (
    *("runs_dir", "checkpoint.", "evaluation.", "telemetry."),
    *("data.workers", "data.cache_", "data.error_budget"),
    *("trainer.device", "trainer.devices", "trainer.nodes", "trainer.val_"),
    *("trainer.strategy", "trainer.offload", "trainer.compile"),
    *("trainer.stall_minutes", "trainer.time_limit_minutes"),
    *("model.vision.gradient_checkpointing", "model.text.gradient_checkpointing"),
)


@dataclass(frozen=True)
class Run:
    """Everything a run is made of."""

    resolved: ResolvedRecipe
    folder: RunFolder
    tokens: Tokens
    objective: Objective
    stream: Stream

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe


@dataclass(frozen=True)
class Start:
    """The checkpoint to go on from. A fork takes weights, averages and position; its recipe is its own."""

    folder: Path
    is_fork: bool

    def __str__(self) -> str:
        return (
            f"{self.folder}, under another recipe" if self.is_fork else f"{self.folder.name}, as it was left"
        )

    def encode(self) -> str:
        """As text, for the other ranks."""
        return json.dumps([str(self.folder), self.is_fork])

    @classmethod
    def decode(cls, text: str) -> Start | None:
        """What `encode` gave; None for nothing."""
        if not text:
            return None
        folder, is_fork = json.loads(text)
        return cls(Path(folder), is_fork)


def begin(run: Run, console: Console, *, resume: bool, fork: Path | None) -> str:
    """Where to go on from, encoded; empty for nothing. Notes what a new run is. First rank only."""
    start = _newest_of(run, console) if resume else _origin(fork)
    if not resume:
        with plain_write_errors("the run folder", run.folder.root, ANOTHER_RUNS_DIR):
            if start:
                write_atomically(run.folder.forked_from, str(start.folder).encode())
            write_atomically(run.folder.recipe, run.resolved.to_yaml().encode())
    return start.encode() if start else ""


def _origin(fork: Path | None) -> Start | None:
    if fork is None:
        return None
    folder = find_checkpoint(fork)
    verify(folder)
    return Start(folder, is_fork=True)


def _newest_of(run: Run, console: Console) -> Start | None:
    """The checkpoint to go on from; torn ones are named and passed over."""
    refuse_other_recipe(run.folder, run.recipe)
    newest, torn = newest_whole(run.folder.checkpoints)
    for error in torn:
        console.print(f"[yellow]passed over:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if torn and not newest:
        passing = next((error for error in torn if isinstance(error, UnreadableCheckpointError)), None)
        if passing:
            raise passing
        raise UserError(
            "none of the checkpoints of this run is whole",
            where=str(run.folder.checkpoints),
            fix="bring one of them back from a copy, or start a new run with another name=...",
        )
    if newest:
        _refuse_other_data(run, newest)
        return Start(newest, is_fork=False)
    return _origin_of(run.folder) if run.folder.forked_from.exists() else None


def _origin_of(folder: RunFolder) -> Start | None:
    """Where a fork began that has no checkpoint of its own yet."""
    origin = Path(folder.forked_from.read_text(encoding="utf-8"))
    try:
        return _origin(origin)
    except UserError as error:
        raise UserError(
            f"this run has no checkpoint yet, and the one it was forked from cannot be used: {error.what}",
            where=str(origin),
            fix="bring that one back, or fork another: --fork CKPT name=...",
        ) from error


def _refuse_other_data(run: Run, start: Path) -> None:
    """Shards or a tokenizer that were made anew under their old names would go on with other numbers."""
    reads_text = run.recipe.data.tokenizer is not None
    saved = load_tokens(str(start / "tokenizer") if reads_text else None, run.recipe.data.context_length)
    digests = list(read_manifest(start).shards.values())
    problems = []
    if digests != list(shards_of(run.stream).values()):
        problems.append("shards " + ", ".join(index.root for index in run.stream.indices))
    if saved.vocabulary != run.tokens.vocabulary:
        problems.append(f"tokenizer {run.recipe.data.tokenizer}")
    if problems:
        raise UserError(
            f"the run began with other data: {'; '.join(problems)} changed since",
            where=str(start),
            fix="bring the old ones back, or start a new run with another name=...",
        )


def refuse_other_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """A run that has begun keeps its recipe, but for keys that leave the numbers alone."""
    if not folder.recipe.exists():
        return
    text = folder.recipe.read_text(encoding="utf-8")
    saved = recipe_from_yaml_text(text, objective_config=config_of, where=str(folder.recipe))
    free: tuple[str, ...] = _FREE_TO_CHANGE
    if recipe.objective.negatives is Negatives["global"]:  # fewer ranks may need smaller pieces
        free = (*free, "data.micro_batch_size")
    changes = [c for c in diff_recipes(saved, recipe) if not c[0].startswith(free)]
    if changes:
        raise UserError(
            "the recipe differs from the one this run began with: "
            + ", ".join(f"{key} was {old}, is {new}" for key, old, new in changes),
            where=str(folder.recipe),
            fix="set these keys back, or begin a new run with this one's state: "
            f"--fork {folder.root} name=... instead of --resume",
        )
