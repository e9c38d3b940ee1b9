"""k nearest neighbours by cosine: a label's score is its weighted share among them.

Weights are exp(cosine / 0.07), as in Wu et al., arXiv 1805.01978.

Legend: N reported images, M training images, F features, L labels, K neighbours.
"""

from __future__ import annotations

import numpy as np

from fundusfm.evaluation.arrays import Features, Flags, Floats

_TEMPERATURE = 0.07
_CHUNK_CELLS = 4_000_000


def neighbour_scores(
    train_MF: Features, target_ML: Flags, feature_NF: Features, num_neighbours: int
) -> Floats:
    """Scores (N, L) between 0 and 1; memory does not grow with N x M.

    Training sets smaller than `num_neighbours` are used whole.
    """
    train_MF, feature_NF = _unit(train_MF), _unit(feature_NF)
    share_ML = target_ML.astype(np.float64)
    step = max(1, _CHUNK_CELLS // len(train_MF))
    chunks = [feature_NF[start : start + step] for start in range(0, len(feature_NF), step)]
    return np.concatenate([_shares(chunk @ train_MF.T, share_ML, num_neighbours) for chunk in chunks])


def _shares(cosine_NM: Features, target_ML: Floats, num_neighbours: int) -> Floats:
    num_neighbours = min(num_neighbours, cosine_NM.shape[1])
    nearest_NK = np.argpartition(-cosine_NM, num_neighbours - 1, axis=1)[:, :num_neighbours]
    cosine_NK = np.take_along_axis(cosine_NM, nearest_NK, axis=1).astype(np.float64)
    weight_NK = np.exp((cosine_NK - cosine_NK.max(axis=1, keepdims=True)) / _TEMPERATURE)
    share_NL: Floats = np.einsum("nk,nkl->nl", weight_NK, target_ML[nearest_NK])
    share_NL /= weight_NK.sum(axis=1, keepdims=True)
    return share_NL


def _unit(feature_NF: Features) -> Features:
    length_N1 = np.linalg.norm(feature_NF, axis=1, keepdims=True)
    unit_NF: Features = feature_NF / np.maximum(length_N1, np.finfo(np.float32).tiny)
    return unit_NF
