"""Zero-shot reading: no training image is used, only phrases that name each label.

A label's ensemble is the mean of its phrases' unit rows, normalised again. A finding's score is the cosine to
its ensemble minus the cosine to the ensemble of `normal`: the difference cancels what pulls an image towards
every text alike. `normal` itself is scored against the strongest finding. Grades of an ordered scale are no
findings: they, and sets without prompts for `normal`, are read by the cosine alone.

Legend: N images, D shared width, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fundusfm.errors import UserError
from fundusfm.evaluation.arrays import Features, Flags, Floats
from fundusfm.recipe.phrases import sentence

NORMAL = "normal"
Prompts = Mapping[str, Mapping[str, Sequence[str]]]
EmbedTexts = Callable[[list[str], str], Features]


def prompt_sentences(
    phrases: Mapping[str, Sequence[str]], eye: str, languages: Sequence[str], templates: Mapping[str, str]
) -> list[str]:
    """The sentences of one label about one eye, in the given languages (all if empty)."""
    return [
        sentence(language, eye, phrase, templates.get(language))
        for language, group in phrases.items()
        if not languages or language in languages
        for phrase in group
    ]


def ensembles(
    prompts: Prompts,
    eye: str,
    languages: Sequence[str],
    templates: Mapping[str, str],
    embed_texts: EmbedTexts,
    *,
    unit: bool = True,
) -> dict[str, Features]:
    """Label -> row (D,) of its prompts about one eye; only labels with a phrase in these languages.

    Without `unit` the mean of the prompts' unit rows stays as it is, shorter the more they differ.
    """
    sentences = {label: prompt_sentences(p, eye, languages, templates) for label, p in prompts.items()}
    sentences = {label: texts for label, texts in sentences.items() if texts}
    if not sentences:
        raise UserError(
            f"no prompt is in a language of the recipe ({', '.join(languages)})",
            where="data.languages",
            fix="add phrases to the prompt dictionary of the dataset card and build the shards again",
        )
    row_PD = embed_texts([text for texts in sentences.values() for text in texts], eye)
    ends = np.cumsum([len(texts) for texts in sentences.values()])[:-1]
    means = [group.mean(axis=0) for group in np.split(row_PD, ends)]
    lengths = [np.linalg.norm(mean) if unit else 1 for mean in means]
    return {label: m / length for label, m, length in zip(sentences, means, lengths, strict=True)}


def contrast_with_normal(cosine_NL: Floats, labels: Sequence[str], contrasted_L: Flags) -> Floats:
    """Scores from cosines; labels without prompts have columns of nan, only `contrasted_L` are contrasted."""
    chosen = np.flatnonzero(contrasted_L & ~np.isnan(cosine_NL).any(axis=0)).tolist()
    findings = [n for n in chosen if labels[n] != NORMAL]
    normal = next((n for n in chosen if labels[n] == NORMAL), None)
    if normal is None or not findings:
        return cosine_NL
    score_NL: Floats = cosine_NL.copy()
    score_NL[:, findings] -= cosine_NL[:, [normal]]
    score_NL[:, normal] -= cosine_NL[:, findings].max(axis=1)
    return score_NL


def cosines(
    embedding_ND: Features,
    eyes: Sequence[str],
    labels: Sequence[str],
    ensembles_of: Mapping[str, Mapping[str, Features]],
) -> Floats:
    """Cosine (N, L) of each image to `ensembles_of[eye][label]` of its own eye, nan without prompts."""
    cosine_NL = np.full((len(eyes), len(labels)), np.nan)
    eye_N = np.asarray(eyes, dtype=np.str_)
    for eye, rows in ensembles_of.items():
        of_eye_N = eye_N == eye
        for column, label in enumerate(labels):
            if label in rows:
                cosine_NL[of_eye_N, column] = embedding_ND[of_eye_N] @ rows[label]
    return cosine_NL
