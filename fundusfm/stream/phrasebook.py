"""What is said of a label: the phrases of dictionaries and of dataset cards, put into a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from fundusfm.recipe.phrases import knowledge_prompt, sentence
from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.exam import ImageRecord
from fundusfm.shards.index import ShardIndex
from fundusfm.shards.labeltext import load_prompts
from fundusfm.stream.view import pick

Prompts = Mapping[str, Mapping[str, Sequence[str]]]


def gather_prompts(
    config: DataConfig, indices: Iterable[ShardIndex], labels: Collection[str] | None = None
) -> Prompts:
    """label -> language -> phrases: those of the cards of `indices`, then those of `data.prompts`.

    Of dictionaries only those about `labels`, if given: they know many more than a set has. A phrase that
    several of them have counts once. UserError for a dictionary that cannot be read.
    """
    books: list[Prompts] = [index.prompts for index in indices]
    for file in config.prompts:
        read = load_prompts(Path(file), (), ())
        books.append({label: read[label] for label in read if labels is None or label in labels})
    merged: dict[str, dict[str, list[str]]] = {}
    for book in books:
        for label, by_language in book.items():
            for language, phrases in by_language.items():
                known = merged.setdefault(label, {}).setdefault(language, [])
                known += [phrase for phrase in phrases if phrase not in known]
    return merged


class Phrasebook:
    """Sentences about labels, by draws in [0, 1). A label without phrases speaks by its own name.

    `templates`: language -> sentence in place of the built-in one. With `english_names` a label's own name
    stands among its phrases in English only: in a Chinese sentence it would be a foreign word.
    """

    def __init__(
        self,
        prompts: Prompts,
        languages: Collection[str],
        templates: Mapping[str, str] | None = None,
        *,
        english_names: bool = False,
    ) -> None:
        self._prompts, self._languages = prompts, languages
        self._templates, self._english_names = templates or {}, english_names

    def unknown(self, labels: Iterable[str]) -> list[str]:
        """The labels that have no phrase in a language of the recipe."""
        return [label for label in labels if not self._spoken(label)]

    def tell(self, label: str, image: ImageRecord, draws: Sequence[float]) -> str:
        """A sentence: the first draw chooses the language, the second the words."""
        languages = self._spoken(label)
        language = pick(languages, draws[0]) if languages else "en"
        words = pick(self._names(label, language), draws[1])
        if language in self._templates:
            return sentence(language, image.eye, words, self._templates[language])
        return knowledge_prompt(language, image.modality, words)

    def _spoken(self, label: str) -> list[str]:
        known = self._prompts.get(label, {})
        return [
            one
            for one, phrases in known.items()
            if phrases and (one in self._languages or not self._languages)
        ]

    def _names(self, label: str, language: str) -> list[str]:
        own, phrases = label.replace("_", " "), self._prompts.get(label, {}).get(language, ())
        return [*phrases] if self._english_names and phrases and language != "en" else [own, *phrases]
