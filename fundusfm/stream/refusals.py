"""Sources that an objective could learn nothing from, told at the start, with what is there instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from fundusfm.errors import UserError
from fundusfm.shards.exam import EYES, UNKNOWN_EYE, text_languages

_SHOWN_PATTERNS = 6


@dataclass(frozen=True)
class Holding:
    """What a source holds.

    `num_usable`: exams of the train split that the view can use. `kinds`: members of that split by kind
    (`left.cfp`, `report.en`, ...). `labels`: its images by label. `patterns`: the sets of kinds that its
    exams hold together.
    """

    root: str
    num_usable: int
    kinds: Mapping[str, int]
    labels: Mapping[str, int]
    patterns: frozenset[frozenset[str]] = frozenset()


def without_images(held: Sequence[Holding], modalities: Collection[str]) -> UserError | None:
    """The error of a source whose train split has no exam that the view can use."""
    for source in held:
        if not source.num_usable:
            wanted = ", ".join(modalities)
            return UserError(
                f"no exam of the train split has an image of {wanted}; {images_told([source])}",
                where=source.root,
                fix="choose data.modalities from what `fundusfm shards stats` lists",
            )
    return None


def without_texts(held: Sequence[Holding], languages: Collection[str]) -> UserError | None:
    """The error of sources that together have no text in one of `languages` (any if empty)."""
    texts = text_languages(kind for source in held for kind in source.kinds)
    if texts and (not languages or texts & set(languages)):
        return None
    wanted = f"in {', '.join(languages)}" if languages and texts else "at all"
    return UserError(
        f"no exam of the train split has a text {wanted}, and images are learned against texts",
        where=", ".join(source.root for source in held),
        fix="choose data.languages from what `fundusfm shards stats` lists, or build the shards "
        "with reports or a prompt dictionary",
    )


def without_labels(held: Sequence[Holding]) -> UserError | None:
    """The error of sources that together have no labelled image."""
    if any(source.labels for source in held):
        return None
    return UserError(
        f"no image has a label, and texts are made from labels; {images_told(held)}",
        where=", ".join(source.root for source in held),
        fix="name a label column in the dataset card and build the shards again",
    )


def without_pairs(
    held: Sequence[Holding], modalities: Collection[str], *, across: bool, same_eye: bool
) -> UserError | None:
    """The error of sources none of whose exams has two images that belong together.

    `modalities` in lower case; `across`: the two must be of different ones; `same_eye`: of one known eye.
    """
    if any(_has_pair(source, modalities, across=across, same_eye=same_eye) for source in held):
        return None
    wanted = "of two modalities" if across else "at all"
    wanted += " of the same eye" if same_eye else ""
    return UserError(
        f"no exam of the train split has two images {wanted} among {', '.join(modalities).upper()}; "
        f"{images_told(held)}, and exams hold {_patterns_told(held)}",
        where=", ".join(source.root for source in held),
        fix="name more of these in data.modalities, loosen objective.pairs or objective.pair_eyes, "
        "or set objective.image_image_weight to 0",
    )


def _has_pair(source: Holding, modalities: Collection[str], *, across: bool, same_eye: bool) -> bool:
    of_modalities = {kind for kind in source.kinds if kind.partition(".")[2] in modalities}
    images = [sorted(pattern & of_modalities) for pattern in source.patterns]
    if any(_belong(*two, across, same_eye) for kinds in images for two in combinations(kinds, 2)):
        return True
    # Two images of one kind are one word of a pattern; but with more images than exams some exam has two.
    return not across and sum(source.kinds[kind] for kind in of_modalities) > source.num_usable


def _belong(kind: str, other: str, across: bool, same_eye: bool) -> bool:
    (eye, _, modality), (other_eye, _, other_modality) = kind.partition("."), other.partition(".")
    known_as_one = eye == other_eye and eye != UNKNOWN_EYE
    return (modality != other_modality or not across) and (known_as_one or not same_eye)


def _patterns_told(held: Sequence[Holding]) -> str:
    """The sets of images that exams hold together, in words."""
    eyes = {eye or UNKNOWN_EYE for eye in EYES}
    images = {
        frozenset(kind for kind in pattern if kind.partition(".")[0] in eyes)
        for source in held
        for pattern in source.patterns
    }
    return " or ".join(sorted("+".join(sorted(kinds)) for kinds in images if kinds)[:_SHOWN_PATTERNS])


def images_told(held: Sequence[Holding]) -> str:
    """The images of the train splits by modality, in words."""
    counts: Counter[str] = Counter()
    for source in held:
        for kind, count in source.kinds.items():
            group, _, name = kind.partition(".")
            if group in ("left", "right", "unknown"):
                counts[name.upper()] += count
    told = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
    return f"there are {told}" if told else "there are no images"
