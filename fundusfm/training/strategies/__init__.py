"""Strategies by name: how a model is spread over ranks. All of them save and load the same checkpoints."""

from __future__ import annotations

import importlib.util
import os

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.plugins.precision import Precision as Plugin

from fundusfm.errors import UserError
from fundusfm.recipe.schema import Precision, Recipe, Strategy
from fundusfm.training.strategies.fsdp import Autocast, FullPrecision, ShardedBlocks
from fundusfm.training.strategies.plain import Alone, Replicated
from fundusfm.training.strategies.portable import Portable
from fundusfm.training.watchdog import collective_timeout

_STAGES = {Strategy.zero1: 1, Strategy.zero2: 2, Strategy.zero3: 3}


def make_strategy(recipe: Recipe, accelerator: str) -> tuple[Portable, Plugin]:
    """The strategy a recipe names, on `cpu` or `cuda`, and the precision that goes with it."""
    name, is_bf16 = recipe.trainer.strategy, recipe.trainer.precision is Precision.bf16
    if name in _STAGES:
        return _zero(recipe, _STAGES[name], accelerator)
    timeout = collective_timeout(recipe.trainer.stall_minutes)
    if name is Strategy.fsdp:
        return ShardedBlocks(timeout=timeout), Autocast(
            "bf16-mixed", accelerator
        ) if is_bf16 else FullPrecision()
    plugin = MixedPrecision("bf16-mixed", accelerator) if is_bf16 else Plugin()
    if recipe.trainer.devices * recipe.trainer.nodes == 1:
        return Alone(torch.device(accelerator, 0) if accelerator == "cuda" else torch.device("cpu")), plugin
    # Looking for parameters without gradients, which `Replicated` refuses, keeps DDP from arranging its
    # buckets anew after the first step of a process. More than two ranks would then be added up in another
    # order, and the first step after a restart would differ in its last bits. GPUs choose their own order.
    fixed = accelerator == "cpu"
    return Replicated(gradient_as_bucket_view=True, find_unused_parameters=fixed, timeout=timeout), plugin


def _zero(recipe: Recipe, stage: int, accelerator: str) -> tuple[Portable, Plugin]:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "this strategy needs DeepSpeed, which is not installed",
            where=f"trainer.strategy: {recipe.trainer.strategy.value}",
            fix="pip install deepspeed, or use trainer.strategy=fsdp",
        )
    os.environ.setdefault("DS_ACCELERATOR", accelerator)  # else it tries each in turn, aloud
    from fundusfm.training.strategies.zero import Zero, Zero3, full_precision

    return Zero3(recipe, stage) if stage == 3 else Zero(recipe, stage), full_precision()
