"""Finding an exam's report among all reports by its images, and its images among all exams by its report.

Exams whose reports read alike count as right for each other. Ties count against the method, so a tower that
gives every exam the same row finds nothing. In the bootstrap patients are resampled as queries; the gallery
stays whole.

Legend: E exams, D shared width, C exams of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fundusfm.evaluation.arrays import Features, Floats, Integers
from fundusfm.evaluation.bootstrap import Estimate, Resamples

CUTOFFS = (1, 5, 10)
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Retrieval:
    """One direction. `recall[k]` is the share of queries with a right answer among the first k.

    `chance[k]` is that of a random order, `num_reports` counts distinct texts.
    """

    direction: str
    num_exams: int
    num_reports: int
    recall: dict[int, Estimate]
    chance: dict[int, float]
    median_rank: float


def ranks(query_ED: Features, gallery_ED: Features, groups: Sequence[int]) -> Integers:
    """Rank (1 is best) of the best right answer to each query (E,); the full E x E matrix never exists."""
    group_E = torch.as_tensor(groups)
    queries, gallery = torch.from_numpy(query_ED), torch.from_numpy(gallery_ED)
    step = max(1, _CHUNK_CELLS // max(1, len(gallery)))
    found = [
        _ranks(queries[start : start + step] @ gallery.T, group_E[start : start + step, None] == group_E)
        for start in range(0, len(queries), step)
    ]
    ranks_E: Integers = torch.cat(found).numpy()
    return ranks_E


def _ranks(cosine_CE: torch.Tensor, right_CE: torch.Tensor) -> torch.Tensor:
    best_C1 = cosine_CE.masked_fill(~right_CE, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((cosine_CE >= best_C1) & ~right_CE).sum(dim=1)


def measure_retrieval(
    image_ED: Features,
    text_ED: Features,
    reports: Sequence[str],
    patients: Sequence[str],
    *,
    num_resamples: int,
    seed: int,
) -> tuple[Retrieval, Retrieval]:
    """Image to report, then report to image; row e of both is exam e with the text `reports[e]`."""
    _, group_E = np.unique(np.asarray(reports, dtype=object), return_inverse=True)
    resamples = Resamples(patients, num_resamples, seed)
    chance = {k: chance_recall(group_E, k) for k in CUTOFFS}
    pairs = {"image to report": (image_ED, text_ED), "report to image": (text_ED, image_ED)}
    first, second = (
        _summary(direction, ranks(*pair, group_E.tolist()), int(group_E.max()) + 1, resamples, chance)
        for direction, pair in pairs.items()
    )
    return first, second


def _summary(
    direction: str, rank_E: Integers, num_reports: int, resamples: Resamples, chance: dict[int, float]
) -> Retrieval:
    recall = {k: resamples.estimate(lambda w, k=k: _weighted_mean(w, rank_E <= k)) for k in CUTOFFS}  # type: ignore[misc]
    return Retrieval(direction, len(rank_E), num_reports, recall, chance, float(np.median(rank_E)))


def _weighted_mean(weight_RE: Floats, value_E: np.ndarray[Any, Any]) -> Floats:
    mean: Floats = weight_RE @ value_E.astype(np.float64) / weight_RE.sum(axis=1)
    return mean


def chance_recall(group_E: Integers, cutoff: int) -> float:
    """Recall of a random order: one minus the chance that the first `cutoff` of E miss every right answer."""
    num_exams = len(group_E)
    right_E = np.bincount(group_E)[group_E]
    drawn = np.arange(min(cutoff, num_exams))
    missed_E = np.prod((num_exams - right_E[:, None] - drawn).clip(0) / (num_exams - drawn), axis=1)
    return float(1 - missed_E.mean())
