"""Losses: pure functions of tensors and a process group."""

from fundusfm.losses.contrastive import contrastive_loss
from fundusfm.losses.covariance import barlow_twins_loss, eckart_young_loss, vicreg_loss
from fundusfm.losses.masked import patch_errors, patch_loss, word_errors, word_loss
from fundusfm.losses.means import global_mean
from fundusfm.losses.sigmoid import sigmoid_loss
from fundusfm.losses.targets import Diagonal, LabelOverlap, SameGroup, SameId, Soft

__all__ = [
    "Diagonal",
    "LabelOverlap",
    "SameGroup",
    "SameId",
    "Soft",
    "barlow_twins_loss",
    "contrastive_loss",
    "eckart_young_loss",
    "global_mean",
    "patch_errors",
    "patch_loss",
    "sigmoid_loss",
    "vicreg_loss",
    "word_errors",
    "word_loss",
]
