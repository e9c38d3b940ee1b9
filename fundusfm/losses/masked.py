"""What was hidden and how well it was found: squared error of patches, cross-entropy of words.

Both come in two steps. A row's sum and count need this row alone, so micro-batches can be joined; the mean
over what all rows of all ranks hide is `global_mean`, which is collective.

Legend: B rows, P patches of a row, X numbers in a patch, T tokens of a row, H hidden tokens of all rows,
V words of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses.means import global_mean
from fundusfm.losses.ranks import Group, accumulation_dtype


def patch_errors(drawn_BPX: Tensor, target_BPX: Tensor, hidden_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum over its hidden patches of a patch's mean squared error, and how many these are."""
    dtype = accumulation_dtype(drawn_BPX)
    with torch.autocast(drawn_BPX.device.type, enabled=False):
        error_BP = (drawn_BPX.to(dtype) - target_BPX.to(dtype)).square().mean(dim=-1)
        return torch.where(hidden_BP, error_BP, 0).sum(dim=1), hidden_BP.sum(dim=1)


def patch_loss(drawn_BPX: Tensor, target_BPX: Tensor, hidden_BP: Tensor, group: Group = None) -> Tensor:
    """Mean over the hidden patches of all ranks of a patch's mean squared error. Collective."""
    return global_mean(*patch_errors(drawn_BPX, target_BPX, hidden_BP), group)


def word_errors(logits_HV: Tensor, word_H: Tensor, counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum of the cross-entropies of its counted places, and how many these are.

    `logits_HV`, `word_H`: scores and truth at the places that `counted_BT` marks, in the order of
    `counted_BT.nonzero()`; so no scores are needed anywhere else.
    """
    dtype = accumulation_dtype(logits_HV)
    with torch.autocast(logits_HV.device.type, enabled=False):
        error_H = F.cross_entropy(logits_HV.to(dtype), word_H, reduction="none")
        sum_B = error_H.new_zeros(len(counted_BT)).index_add(0, counted_BT.nonzero()[:, 0], error_H)
    return sum_B, counted_BT.sum(dim=1)


def word_loss(logits_HV: Tensor, word_H: Tensor, counted_BT: Tensor, group: Group = None) -> Tensor:
    """Mean over the counted places of all ranks of the cross-entropy there. Collective."""
    return global_mean(*word_errors(logits_HV, word_H, counted_BT), group)
