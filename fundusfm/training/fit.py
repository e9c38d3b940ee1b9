"""`fundusfm pretrain`: a recipe, its data and its objective brought together under a Lightning trainer."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision as Plugin
from rich.console import Console

from fundusfm.errors import UserError
from fundusfm.objectives import build_objective, config_of, objective_class
from fundusfm.objectives.base import Objective
from fundusfm.recipe.load import ResolvedRecipe, load_recipe
from fundusfm.recipe.schema import Device, Recipe
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.faults import Quarantine
from fundusfm.stream.tokens import load_tokens
from fundusfm.training.agreement import Agreement
from fundusfm.training.boundary import StepBoundary
from fundusfm.training.checkpoint import clear_leftovers, step_folders
from fundusfm.training.conduct import Conduct
from fundusfm.training.facts import where_it_runs
from fundusfm.training.header import header_rows, show_header
from fundusfm.training.keeper import Keeper
from fundusfm.training.launched import Launch
from fundusfm.training.loading import without_files
from fundusfm.training.owed import OwedValidation
from fundusfm.training.progress import ProgressLine
from fundusfm.training.runfolder import RunFolder, RunLock
from fundusfm.training.starting import Run, Start, begin
from fundusfm.training.strategies import make_strategy
from fundusfm.training.strategies.memory import refuse_small_disk
from fundusfm.training.strategies.portable import Portable
from fundusfm.training.telemetry import Telemetry

# What Lightning would say about things that are meant here.
_MEANT = (
    ".*ended before the epoch ended.*",  # the sample order has no state that a loader would need to store
    ".*does not have many workers.*",
    ".*`LightningModule.val_dataloader`.*",
    ".*GPU available but not used.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*`srun` command is available.*",
    ".*find_unused_parameters=True was specified.*",  # with good reason: see `make_strategy`
)
_SETTLE_S = 60.0  # what a checkpoint that is being written may take when training ends with an error


@dataclass(frozen=True)
class Outcome:
    """How training ended: the newest checkpoint, and the signal that stopped it early, if one did.

    Only the first rank names the signal: another rank that ended with an exit code of its own would have the
    launcher kill the rest. A stop that the launcher asked for, or that the clock did, is no signal.
    """

    checkpoint: Path
    step: int
    signal_number: int | None


def pretrain(
    recipe_file: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    resume_if_any: bool = False,
    fork: Path | None = None,
) -> Outcome:
    """Train what a recipe describes, from the start or from the newest whole checkpoint of its run folder.

    `resume_if_any`: start if nothing has begun, else resume. `fork`: a checkpoint or a run folder, from whose
    state a new run begins. Called by every rank; under torchrun and srun at once, else Lightning starts the
    others. UserError for anything that the user can mend.
    """
    began_s = time.time()
    launch = Launch.found()
    console = Console(stderr=True, quiet=not launch.is_first)
    with ExitStack() as held:
        held.callback(launch.forget)
        with launch.one_voice():
            _refuse_both(recipe_file, resume=resume, fork=fork)
            resolved = load_recipe(recipe_file, overrides, objective_config=config_of)
            launch.refuse_other_world(resolved.recipe.trainer)
            folder = RunFolder.of(resolved.recipe)
            resume = resume or (resume_if_any and folder.recipe.exists())
            if launch.is_first:
                folder.create(resume=resume)
                held.enter_context(RunLock(folder))
                clear_leftovers(folder.checkpoints)
            accelerator_of(resolved.recipe)
            run = assemble(resolved, folder, resume=resume)
            conduct = Conduct.of_run(launch, resolved.recipe.trainer, began_s)
            start = ""
            if launch.is_first:  # which alone writes the folder, and so reads it for all
                refuse_small_disk(folder.checkpoints, run.objective, resolved.recipe.checkpoint.keep)
                start = begin(run, console, resume=resume, fork=fork)
        start = launch.from_first_rank(str(folder.root), start)
        return _fit(run, console, Start.decode(start), conduct)


def _refuse_both(recipe_file: Path, *, resume: bool, fork: Path | None) -> None:
    if resume and fork:
        raise UserError(
            "--resume and --fork are both given",
            where=str(recipe_file),
            fix="--fork once, to begin a new run; --resume from then on, which knows where it began",
        )


def assemble(resolved: ResolvedRecipe, folder: RunFolder, *, resume: bool = False) -> Run:
    """Build the towers and open the data of a recipe; refuses what cannot be exact."""
    recipe = resolved.recipe
    has_own_weights = resume and bool(step_folders(folder.checkpoints))
    tokens = load_tokens(recipe.data.tokenizer, recipe.data.context_length)
    stream = Stream(recipe, objective_class(recipe.objective.name).view, tokens)
    objective = build_objective(without_files(recipe) if has_own_weights else recipe, tokens.vocab_size)
    objective.total_steps = total_steps(recipe)
    if recipe.trainer.devices * recipe.trainer.nodes > 1 or recipe.data.micro_batch_size is not None:
        _refuse_batch_norm(objective)
    if objective.cuts_gradients:
        _refuse_zero(recipe)
    return Run(resolved, folder, tokens, objective, stream)


def total_steps(recipe: Recipe) -> int:
    """Optimiser steps of the whole run."""
    trainer = recipe.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    assert trainer.max_exams is not None
    return math.ceil(trainer.max_exams / recipe.data.global_batch_size)


def _refuse_batch_norm(objective: Objective) -> None:
    kind = torch.nn.modules.batchnorm._BatchNorm
    found = next((name for name, module in objective.named_modules() if isinstance(module, kind)), None)
    if found:
        raise UserError(
            "a tower with batch normalisation depends on how the global batch is split",
            where=f"model.vision.name: layer {found}",
            fix="choose a tower with layer or group normalisation, or one device without micro-batches",
        )


def _refuse_zero(recipe: Recipe) -> None:
    if recipe.trainer.strategy.value.startswith("zero"):
        raise UserError(
            f"{recipe.objective.name} as released cuts each value of a gradient, and ZeRO hides them",
            where="trainer.strategy",
            fix="use ddp or fsdp, or objective.fidelity: corrected",
        )


def _fit(run: Run, console: Console, start: Start | None, conduct: Conduct) -> Outcome:
    strategy, precision = make_strategy(run.recipe, accelerator_of(run.recipe))
    folder = start.folder if start else None
    strategy.is_fork = start is not None and start.is_fork
    keeper = Keeper(run.folder.checkpoints, run.resolved, run.tokens, run.stream, strategy)
    placed = (strategy, precision)
    trainer = make_trainer(run, console, conduct, keeper, placed, start)
    rows = header_rows(run.recipe, run.objective, run.stream, where_it_runs(trainer.strategy.root_device))
    show_header(console, rows, _told_start(run, conduct.launch, start))
    with warnings.catch_warnings(), conduct.endings(trainer):
        for text in _MEANT:
            warnings.filterwarnings("ignore", text)
        try:
            trainer.fit(run.objective, datamodule=run.stream, ckpt_path=folder, weights_only=True)
        finally:
            if not conduct.stop.is_hurried:
                conduct.stop.watch()  # Lightning ignores Ctrl-C after the first one
                keeper.settle(_SETTLE_S, console)
    step = trainer.global_step
    early = step < run.objective.total_steps
    if trainer.is_global_zero and not early:
        run.folder.note_done(step)
    told = f"stopped at step {step}, {conduct.why_stopped()}; go on with --resume" if early else "done"
    console.print(f"{told}: {keeper.folder_of(step)}", markup=False, highlight=False, soft_wrap=True)
    speaks = early and trainer.is_global_zero
    return Outcome(keeper.folder_of(step), step, conduct.signal_that_stopped() if speaks else None)


def _told_start(run: Run, launch: Launch, start: Start | None) -> str:
    """Where training begins, and how often this run was started, which the first rank notes in its folder."""
    told = str(start or "from the beginning")
    if not launch.is_first:
        return told
    trainer = run.recipe.trainer
    facts = {"from": start.folder.name if start else None, "num_ranks": trainer.devices * trainer.nodes}
    number = run.folder.note_start(facts)
    return f"{told}; start {number} of this run" if number > 1 else told


def make_trainer(
    run: Run,
    console: Console,
    conduct: Conduct,
    keeper: Keeper,
    placed: tuple[Portable, Plugin],
    start: Start | None = None,
) -> pl.Trainer:
    """A Lightning trainer that counts in steps, logs and saves through our callbacks only."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    recipe = run.recipe
    val_every_steps = _val_every_steps(run)
    strategy, precision = placed
    return pl.Trainer(
        accelerator=accelerator_of(recipe),
        devices=recipe.trainer.devices,
        num_nodes=recipe.trainer.nodes,
        strategy=strategy,
        plugins=[precision, conduct.launch.environment],
        max_steps=run.objective.total_steps,
        max_epochs=-1,
        gradient_clip_val=recipe.optim.clip_norm,
        val_check_interval=val_every_steps,
        check_val_every_n_epoch=None,
        limit_val_batches=0 if val_every_steps is None else None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=_callbacks(run, console, conduct, keeper, start),
    )


def _callbacks(
    run: Run, console: Console, conduct: Conduct, keeper: Keeper, start: Start | None
) -> list[pl.Callback]:
    """Ours, in the order in which they must hear of things."""
    recipe, val_every_steps = run.recipe, _val_every_steps(run)
    quarantine = Quarantine(run.folder.quarantine, run.stream.num_exams, recipe.data.error_budget)
    save = conduct.watched(keeper.save, console)
    telemetry = Telemetry(recipe, run.folder)
    # What another run's checkpoint lacks is no debt of this one.
    owed_every_steps = None if start and start.is_fork else val_every_steps
    return [
        # Before the others: the phase that it hears of is theirs, too.
        conduct.watchdog,
        Agreement(recipe, run.stream, run.tokens, start.encode() if start else ""),
        telemetry,
        ProgressLine(console, recipe.data.global_batch_size),
        # After the others: what is saved has been logged.
        StepBoundary(
            recipe.checkpoint, run.stream, quarantine, conduct.stop, save, conduct.limit, val_every_steps
        ),
        keeper,
        OwedValidation(telemetry, owed_every_steps, console),
    ]


def _val_every_steps(run: Run) -> int | None:
    """None where nothing is validated."""
    return run.recipe.trainer.val_every_steps if run.stream.has_val else None


def accelerator_of(recipe: Recipe) -> str:
    """`cpu` or `cuda`."""
    wanted = recipe.trainer.device
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device", where="trainer.device", fix="set trainer.device=cpu or auto"
        )
    if wanted is Device.cpu or not torch.cuda.is_available():
        return "cpu"
    if recipe.trainer.devices > (found := torch.cuda.device_count()):
        raise UserError(
            f"{recipe.trainer.devices} devices a node are asked for, and this process sees {found}",
            where="trainer.devices",
            fix="lower it, or let each task see all GPUs of its node: --gpus-per-node, not --gpus-per-task",
        )
    return "cuda"
