"""Objectives of a user's own, reached by import path: RET-CLIP that breaks in a known way, or is odd."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from fundusfm.objectives.cached import Features
from fundusfm.objectives.ret_clip import RetClip
from fundusfm.recipe.schema import Recipe
from fundusfm.stream.views import PatientPairBatch

BREAKS_AT, STEP_S = 4, float(os.environ.get("STEP_S", "0.3"))


class NanFeaturesOnOneRank(RetClip):
    """At step 4 the features of the last rank's third patient are not numbers."""

    def encode(self, batch: PatientPairBatch) -> Features:
        features = super().encode(batch)
        is_last = self.global_rank == self.trainer.world_size - 1
        if self.training and self.global_step == BREAKS_AT and is_last:
            text_BD, valid_B = features["text_patient"], torch.ones_like(features["text_valid"])
            features["text_patient"] = text_BD.index_fill(0, torch.tensor([2]), torch.nan)
            features["text_valid"] = valid_B
        return features


class NanOnOneRank(RetClip):
    """The loss of the last rank is not a number at step 4; that of the others is."""

    def loss_terms(self, batch: PatientPairBatch) -> dict[str, Tensor]:
        terms = super().loss_terms(batch)
        is_last = self.global_rank == self.trainer.world_size - 1
        if self.training and self.global_step == BREAKS_AT and is_last:
            terms["loss_left"] = terms["loss_left"] * torch.nan
        return terms


class BreaksGradient(RetClip):
    """At step 4 the loss is a number, and its gradient is not."""

    def loss_terms(self, batch: PatientPairBatch) -> dict[str, Tensor]:
        terms = super().loss_terms(batch)
        if self.training and self.global_step == BREAKS_AT:
            terms["loss_left"] = terms["loss_left"] + (0 * terms["loss_left"]).sqrt()
        return terms


class Odd(RetClip):
    """What is easily lost in a checkpoint: a frozen block, tied heads, and a buffer that the loss feels.

    After so many steps as STOP_AFTER says, the run is asked to stop, as a cluster would; DIE_AFTER kills it.
    """

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe, vocab_size)
        self.vision.trunk.get_submodule("blocks.0").requires_grad_(False)
        self.text_heads["left"] = self.text_heads["right"]
        self.register_buffer("seen", torch.zeros(2))

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        if self.training:
            self.seen += 1
        return {name: term * (1 + self.seen[1] / 10) for name, term in super().terms_of(features).items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if os.environ.get("STOP_AFTER") == str(self.global_step + 1):  # counted after this
            os.kill(os.getpid(), signal.SIGUSR1)
        if os.environ.get("DIE_AFTER") == str(self.global_step + 1):
            os.kill(os.getpid(), signal.SIGKILL)


class FrozenStem(RetClip):
    """The first block that is trained reads what needs no gradient."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe, vocab_size)
        self.vision.trunk.requires_grad_(False)
        for part in ("blocks", "norm"):
            self.vision.trunk.get_submodule(part).requires_grad_(True)


class Idle(RetClip):
    """Has a parameter that nothing is made of."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe, vocab_size)
        self.idle = torch.nn.Parameter(torch.ones(3))


class TermedEarly(RetClip):
    """SIGTERM comes to every rank when the trainer is set up, and before the first step begins."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        os.kill(os.getpid(), signal.SIGTERM)


class Impatient(RetClip):
    """At step 4 its user presses Ctrl-C twice."""

    def loss_terms(self, batch: PatientPairBatch) -> dict[str, Tensor]:
        if self.training and self.global_step == BREAKS_AT:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss_terms(batch)


class Slow(RetClip):
    """Takes its time, so that a test meets it in the middle of a run; sleeping costs the machine nothing."""

    def loss_terms(self, batch: PatientPairBatch) -> dict[str, Tensor]:
        time.sleep(STEP_S)
        return super().loss_terms(batch)


class CrashOnOneRank(RetClip):
    """The last rank has a bug at step 4."""

    def loss_terms(self, batch: PatientPairBatch) -> dict[str, Tensor]:
        if self.global_step == BREAKS_AT and self.global_rank == self.trainer.world_size - 1:
            raise ZeroDivisionError("broken on purpose")
        return super().loss_terms(batch)


def fall_asleep() -> None:
    time.sleep(3600)
