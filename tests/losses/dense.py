"""The definitions of the losses, written with whole matrices and plain autograd."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Batch:
    """A global batch of pairs, and everything a target or a mask may want to know of it."""

    image_NK: Tensor
    text_NK: Tensor
    group_N: Tensor
    label_NC: Tensor
    soft_NN: Tensor
    patient_N: Tensor
    report_N: Tensor
    valid_a_N: Tensor
    valid_b_N: Tensor
    weight_a_N: Tensor
    weight_b_N: Tensor

    def rows(self, index: slice) -> Batch:
        """The rows of one rank; `soft` keeps all its columns."""
        return Batch(*(getattr(self, field.name)[index] for field in fields(self)))


def weights_of(target: str, batch: Batch) -> Tensor:
    """w_NN of a target."""
    if target == "diagonal":
        return torch.eye(len(batch.group_N), dtype=torch.float64)
    if target == "group":
        ids = batch.group_N
        return ((ids[:, None] == ids) & (ids >= 0)[:, None]).double()
    if target == "labels":
        return batch.label_NC.double() @ batch.label_NC.double().T
    return batch.soft_NN.double()


def left_out(batch: Batch, target: str) -> Tensor:
    """Pairs of one patient or of one report text, unless they are positives."""
    equal = torch.zeros(len(batch.group_N), len(batch.group_N), dtype=torch.bool)
    for ids in (batch.patient_N, batch.report_N):
        equal |= (ids[:, None] == ids) & (ids >= 0)[:, None]
    return equal & (weights_of(target, batch) == 0)


def contrastive(
    a_ND: Tensor, b_ND: Tensor, scale: Tensor, target: str, batch: Batch, *, masked: bool
) -> Tensor:
    """Rows and columns by log-softmax over what is left of them, means over those with a positive."""
    candidate_NN = batch.valid_a_N[:, None] & batch.valid_b_N
    w_NN = weights_of(target, batch) * candidate_NN
    if masked:
        candidate_NN = candidate_NN & ~left_out(batch, target)
    logits_NN = torch.where(candidate_NN, scale * a_ND @ b_ND.T, -torch.inf)
    halves = [
        _mean_cross_entropy(logits_NN, w_NN, batch.weight_a_N),
        _mean_cross_entropy(logits_NN.T, w_NN.T, batch.weight_b_N),
    ]
    return torch.stack(halves).sum() / 2


def _mean_cross_entropy(logits_NN: Tensor, w_NN: Tensor, weight_N: Tensor) -> Tensor:
    total, terms = torch.zeros((), dtype=logits_NN.dtype), []
    for logits_N, w_N, weight in zip(logits_NN, w_NN, weight_N, strict=True):
        if w_N.sum() > 0 and weight > 0:
            positive = w_N > 0
            log_share_N = logits_N - logits_N.logsumexp(0)
            terms.append(-weight * (w_N[positive] / w_N.sum() * log_share_N[positive]).sum())
            total = total + weight
    return torch.stack(terms).sum() / total if terms else 0.0 * torch.nan_to_num(logits_NN, neginf=0.0).sum()


def sigmoid(
    a_ND: Tensor, b_ND: Tensor, scale: Tensor, bias: Tensor, target: str, batch: Batch, *, masked: bool
) -> Tensor:
    """Binary cross-entropy of every pair, over the number of valid rows."""
    use_NN = batch.valid_a_N[:, None] & batch.valid_b_N
    if masked:
        use_NN = use_NN & ~left_out(batch, target)
    logits_NN = scale * a_ND @ b_ND.T + bias
    terms_NN = F.binary_cross_entropy_with_logits(logits_NN, weights_of(target, batch), reduction="none")
    return torch.where(use_NN, terms_NN, 0).sum() / max(1, int(batch.valid_a_N.sum()))
