"""What a method must beat: colour alone, and knowing where an image comes from without looking at it.

Legend: N images, M training images, C H W channels and pixels, B bins a channel, P pixels, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fundusfm.evaluation.arrays import Features, Flags, Floats

NUM_BINS = 8
# Outside the field of view a photograph is black but for the traces of compression.
_DARKEST = 16 / 255


def color_histogram(image_NCHW: Tensor) -> Features:
    """Joint red-green-blue histogram (N, B**3) of the field of view, as square roots of shares (Hellinger).

    `image_NCHW` lies in 0..1. An image that is black throughout gives a row of zeros.
    """
    inside_NP = (image_NCHW.amax(dim=1) > _DARKEST).flatten(1)
    bin_NCP = (image_NCHW * NUM_BINS).long().clamp(0, NUM_BINS - 1).flatten(2)
    cell_NP = (bin_NCP[:, 0] * NUM_BINS + bin_NCP[:, 1]) * NUM_BINS + bin_NCP[:, 2]
    count_NB = torch.zeros(len(image_NCHW), NUM_BINS**3, device=image_NCHW.device)
    count_NB.scatter_add_(1, cell_NP, inside_NP.float())
    share_NB = count_NB / count_NB.sum(dim=1, keepdim=True).clamp(min=1)
    histogram_NB: Features = share_NB.sqrt().cpu().numpy()
    return histogram_NB


def source_scores(train_sources: Sequence[str], target_ML: Flags, sources: Sequence[str]) -> Floats:
    """Each image scored (N, L) by how common the label is in its source in training.

    A source unknown to training gets the overall share. Whatever this reaches, a method may owe to the
    camera rather than to the eye.
    """
    source_M = np.asarray(train_sources, dtype=np.str_)
    overall_L = target_ML.mean(axis=0)
    shares = {name: target_ML[source_M == name].mean(axis=0) for name in set(train_sources)}
    return np.stack([shares.get(name, overall_L) for name in sources]).astype(np.float64)
