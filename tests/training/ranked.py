"""Whole runs on several ranks that are forked from this process, which spares them the imports."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only

from fundusfm.objectives import build_objective
from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import Recipe
from fundusfm.training import checkpoint, fit, saving
from fundusfm.training.launched import Launch
from tests.distributed.ranks import LIMIT_S, free_port, run_ranks

# Dropout masks belong to ranks. Nothing else knows how many there are.
SAME = (
    *("model.text.dropout=0", "data.workers=0", "telemetry.tensorboard=false"),
    *("trainer.val_every_steps=null", "objective.name=tests.training.own:Odd"),
    "model.vision.options={patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}",
)


def train(
    world_size: int,
    recipe: Path,
    *overrides: str,
    resume: bool = False,
    stop_after: int | None = None,
    same: Sequence[str] = SAME,
    limit_s: float = LIMIT_S,
) -> str:
    """`fundusfm pretrain` on so many ranks; returns what the first one said.

    `same`: what makes losses comparable. A resumed run starts from other initial weights: the losses show
    what a checkpoint does not bring back.
    """
    options = (*same, f"trainer.devices={world_size}", *overrides)
    said: list[str] = run_ranks(
        world_size, _rank, world_size, free_port(), recipe, options, resume, stop_after, limit_s=limit_s
    )
    return said[0]


def train_until_killed(
    world_size: int, recipe: Path, *overrides: str, resume: bool, kill: tuple[str, int]
) -> None:
    """The same, but every rank is killed (SIGKILL) at a place, of a step or a save: see `_kill_in`."""
    port = free_port()
    options = (*SAME, f"trainer.devices={world_size}", *overrides)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_doomed, args=(r, world_size, port, recipe, options, resume, kill, store))
            for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LIMIT_S)
            process.kill()
            process.join()
        assert -signal.SIGKILL in [process.exitcode for process in ranks], [p.exitcode for p in ranks]


def _doomed(
    rank: int,
    world_size: int,
    port: int,
    recipe: Path,
    options: tuple[str, ...],
    resume: bool,
    kill: tuple[str, int],
    store: str,
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        shared = dist.FileStore(store, world_size)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=world_size)
    _kill_in(*kill)
    _rank(rank, world_size, port, recipe, options, resume, None)


def _kill_in(place: str, number: int) -> None:
    """Die after the update of step `number`, or in the save of that number from here on, counted from 1.

    Places of a save: its files are there, its manifest is, it has its name, old ones are to be pruned. The
    first save of a process is waited for; training goes on during the later ones.
    """

    def dying(function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        saves = itertools.count(1)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # Of the three times that a save flushes: a rank's files, the folder, its name.
            counts = function is not flush or (args[0].is_dir() and not kwargs)
            doomed = counts and next(saves) == number
            answer = function(*args, **kwargs) if after or not doomed else None
            if doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return wrapped

    flush = checkpoint._flush
    if place == "step":
        os.environ["DIE_AFTER"] = str(number)
    elif place == "files":
        saving.write_rank_files = dying(saving.write_rank_files, after=True)
    elif place == "whole":
        checkpoint._flush = dying(flush)
    elif place == "renamed":
        checkpoint._point_latest = dying(checkpoint._point_latest)
    elif place == "pruning":
        checkpoint.prune = dying(checkpoint.prune)


def _rank(
    rank: int,
    world_size: int,
    port: int,
    recipe: Path,
    options: tuple[str, ...],
    resume: bool,
    stop_after: int | None,
) -> str:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "STOP_AFTER": str(stop_after),
    }
    if resume and (recipe.parent / "run" / "checkpoints" / "latest").exists():
        fit.build_objective = _otherwise_built
    Launch.from_first_rank = _from_first_rank  # type: ignore[method-assign]
    rank_zero_only.rank = rank
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        fit.pretrain(recipe, options, resume=resume)
    return heard.getvalue()


def _from_first_rank(self: Launch, about: str, word: str) -> str:
    """No launcher stands between these ranks, but they have met."""
    words = [word]
    if dist.is_initialized():
        dist.broadcast_object_list(words)
    return words[0]


def _otherwise_built(recipe: Recipe, vocab_size: int) -> Objective:
    objective = build_objective(recipe, vocab_size)
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            tensor.add_(torch.randn_like(tensor.float()).to(tensor.dtype))
    return objective
