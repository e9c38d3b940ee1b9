"""Reading by a few labelled images of each class: a probe on features, adapters on embeddings with phrases.

A support image shows exactly one of the labels in question, so that the labels can be told apart as classes;
what is reported is asked of all images, as of every other method.

Legend: S support images, N images, L labels, K labels with support, F features, D shared width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fundusfm.evaluation.adapters import ClipAdapter, Prototypes, Rows, learn_keys, tip_logits
from fundusfm.evaluation.arrays import Features, Flags, Floats, Integers
from fundusfm.evaluation.results import CLIP_ADAPTER, TIP_ADAPTER, TIP_ADAPTER_F

# As in FLAIR's published linear probe.
_STRENGTH, _MAX_ITERATIONS = 0.316, 1000


@dataclass(frozen=True)
class Support:
    """Rows of the training images that are learned from, and the label of each, a column (S,)."""

    row_S: Integers
    label_S: Integers

    @property
    def labels(self) -> Integers:
        """The labels that have an image (K,), rising."""
        return np.unique(self.label_S)

    def only(self, kept_S: Flags) -> Support:
        """Some of the images."""
        return Support(self.row_S[kept_S], self.label_S[kept_S])


def draw_support(target_NL: Flags, asked_L: Flags, shots: int, seed: int) -> Support:
    """Up to `shots` images of each asked label that show no other asked one, drawn by the seed."""
    only_N = (target_NL & asked_L).sum(axis=1) == 1
    shuffled = np.random.default_rng(seed).permutation(len(target_NL))
    of_label = [shuffled[(target_NL[:, n] & only_N)[shuffled]][:shots] for n in np.flatnonzero(asked_L)]
    labels = [np.full(len(rows), n) for rows, n in zip(of_label, np.flatnonzero(asked_L), strict=True)]
    return Support(np.concatenate(of_label), np.concatenate(labels))


def fit_probe(feature_SF: Features, label_S: Integers) -> LogisticRegression:
    """Multinomial regression (of two classes, one sigmoid) in which every class weighs alike, as in FLAIR."""
    probe = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=_MAX_ITERATIONS)
    with threadpool_limits(1):
        return probe.fit(feature_SF, label_S)


def probe_scores(feature_MF: Features, support: Support, feature_NF: Features, num_labels: int) -> Floats:
    """Probabilities (N, L) by the features of training images; nan for labels without support."""
    probe = fit_probe(feature_MF[support.row_S], support.label_S)
    return _in_columns(probe.predict_proba(feature_NF), support.labels, num_labels)


@dataclass(frozen=True)
class Embedded:
    """Unit rows of images (N, D) and the eye of each."""

    row_ND: Features
    eyes: Sequence[str]

    def take(self, rows: Integers) -> Embedded:
        """Some of the images."""
        return Embedded(self.row_ND[rows], [self.eyes[row] for row in rows])


@dataclass(frozen=True)
class Phrases:
    """`rows[eye][label]`: what a label looks like in words; `scales[eye]`: what cosines are multiplied by."""

    rows: Mapping[str, Mapping[str, Features]]
    scales: Mapping[str, float]

    def know(self, label: str) -> bool:
        """Whether there are phrases for this label and every eye."""
        return all(label in of_eye for of_eye in self.rows.values())

    def prototypes(self, labels: Sequence[str]) -> Prototypes:
        """Of known labels, eyes in the order of `rows`."""
        text_EKD = np.asarray([[of_eye[label] for label in labels] for of_eye in self.rows.values()])
        return Prototypes(torch.from_numpy(text_EKD), torch.tensor([self.scales[eye] for eye in self.rows]))

    def placed(self, images: Embedded) -> Rows:
        """Images with the places of their eyes."""
        place = {eye: n for n, eye in enumerate(self.rows)}
        return Rows(torch.from_numpy(images.row_ND), torch.tensor([place[eye] for eye in images.eyes]))


def adapter_scores(
    train: Embedded,
    support: Support,
    images: Embedded,
    phrases: Phrases,
    labels: Sequence[str],
    *,
    seed: int,
    released: bool,
) -> dict[str, Floats]:
    """Probabilities (N, L) by adapter, nan for labels without support or phrases; none with fewer than two.

    `released`: as in `learn_keys`.
    """
    support = support.only(np.asarray([phrases.know(labels[n]) for n in support.label_S], dtype=bool))
    if len(support.labels) < 2:
        return {}
    prototypes = phrases.prototypes([labels[n] for n in support.labels])
    shown, asked = phrases.placed(train.take(support.row_S)), phrases.placed(images)
    class_S = torch.from_numpy(np.searchsorted(support.labels, support.label_S))
    order = np.random.default_rng(seed).permutation(len(class_S)).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = ClipAdapter(shown.row_ND.shape[1])
    adapter.learn(shown, class_S, prototypes, order)
    class_SK = F.one_hot(class_S).to(shown.row_ND.dtype)
    key_SD = learn_keys(shown, class_SK, prototypes, order, released=released)
    logits = {
        CLIP_ADAPTER: adapter.logits(asked, prototypes).detach(),
        TIP_ADAPTER: tip_logits(asked, shown.row_ND, class_SK, prototypes),
        TIP_ADAPTER_F: tip_logits(asked, key_SD, class_SK, prototypes),
    }
    return {
        name: _in_columns(logit_NK.double().softmax(dim=1).numpy(), support.labels, len(labels))
        for name, logit_NK in logits.items()
    }


def _in_columns(score_NK: Floats, labels: Integers, num_labels: int) -> Floats:
    score_NL = np.full((len(score_NK), num_labels), np.nan)
    score_NL[:, labels] = score_NK
    return score_NL
