"""Text from labels: sentences that name each eye and a phrase for each of its labels."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from fundusfm.errors import UserError
from fundusfm.recipe.phrases import sentence
from fundusfm.shards.exam import EYES, ImageRecord
from fundusfm.shards.table import nearest

Prompts = dict[str, dict[str, list[str]]]
_JOINER = {"zh": "，"}


def load_prompts(path: Path, labels: Collection[str], languages: Sequence[str]) -> Prompts:
    """A prompt dictionary `label -> language -> phrases`; UserError lists every label that
    lacks a phrase in one of the `languages`.
    """
    try:
        content = yaml.load(path.read_text("utf-8-sig"), Loader=yaml.BaseLoader)
        prompts = {label: {lang: _list(p) for lang, p in by.items()} for label, by in content.items()}
    except OSError as error:
        raise UserError(f"the prompt dictionary cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        what = "the prompt dictionary is not label -> language -> list of phrases"
        fix = "write each label as `glaucoma: {en: [a large cup, a thin rim]}`"
        raise UserError(what, where=str(path), fix=fix) from error
    missing = [
        f"{label!r} in {lang!r}{nearest(label, prompts)}"
        for label in sorted(labels)
        for lang in languages
        if not prompts.get(label, {}).get(lang)
    ]
    if missing:
        raise UserError(
            f"no phrase for {'; '.join(missing)}", where=str(path), fix="add phrases, or map the label"
        )
    return prompts


def _list(phrases: Any) -> list[str]:
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise TypeError(phrases)  # a text alone would be taken for a list of letters
    return phrases


def texts_from_labels(
    images: Sequence[ImageRecord],
    exam_labels: Sequence[str] | None,
    prompts: Prompts,
    language: str,
    variants: int,
    seed: int,
) -> list[str]:
    """`variants` different texts such as "Left eye: <phrase>. Right eye: <phrase>."; none without labels.

    Labels of the exam as a whole are told only where no image has labels of its own.
    """
    by_eye = {eye: _labels_of(images, eye) for eye in EYES}
    if not any(by_eye.values()):
        by_eye[""] = list(exam_labels or ())
    gap = "" if language == "zh" else " "
    texts = []
    for variant in range(variants):
        sentences = [
            sentence(language, eye, _phrases(labels, prompts, language, variant, f"{seed}.{eye}"))
            for eye, labels in by_eye.items()
            if labels
        ]
        texts.append(gap.join(sentences))
    return list(dict.fromkeys(text for text in texts if text))


def _labels_of(images: Sequence[ImageRecord], eye: str) -> list[str]:
    return list(dict.fromkeys(label for i in images if i.eye == eye for label in i.labels or ()))


def _phrases(labels: Sequence[str], prompts: Prompts, language: str, variant: int, seed: str) -> str:
    """One phrase a label; the next variant takes the next phrase, so variants differ while phrases last."""
    chosen = []
    for label in labels:
        phrases = prompts[label][language]
        start = int.from_bytes(hashlib.blake2b(f"{seed}.{label}".encode(), digest_size=8).digest(), "big")
        chosen.append(phrases[(start + variant) % len(phrases)])
    return _JOINER.get(language, ", ").join(chosen)
