"""The sentence around a finding: of reports, of text made from labels, of prompts."""

from __future__ import annotations

from fundusfm.errors import UserError

TEMPLATES = {"en": "{eye} eye: {finding}.", "zh": "{eye}：{finding}。"}
EYE_WORDS = {
    "en": {"left": "Left", "right": "Right", "": "Either"},
    "zh": {"left": "左眼", "right": "右眼", "": "单眼"},
}
# What an image is called, by modality in lower case; others are called by their own name.
_IMAGE_WORDS = {
    "en": {"cfp": "fundus photograph", "uwf": "ultra-widefield fundus photograph", "ffa": "fundus angiogram"},
    "zh": {"cfp": "眼底照片", "uwf": "超广角眼底照片", "ffa": "眼底血管造影", "oct": "光学相干断层扫描图像"},
}


def sentence(language: str, eye: str, finding: str, template: str | None = None) -> str:
    """One sentence naming an eye and a finding; `eye` is `left`, `right` or empty where it is not known.

    `template` replaces the built-in sentence of that language; UserError for a language without one.
    """
    words = EYE_WORDS.get(language, EYE_WORDS["en"])
    template = template or TEMPLATES.get(language)
    if template is None:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"there is no sentence template for the language {language!r}",
            where="evaluation.templates",
            fix=f"give one in the recipe, with {{eye}} and {{finding}}, or use one of: {known}",
        )
    return template.format(eye=words[eye], finding=finding)


def knowledge_prompt(language: str, modality: str, finding: str, attribute: str = "") -> str:
    """What an image shows, in UrFound's words (arXiv 2408.05618): `A noisy fundus photograph of drusen`.

    `finding` is a label or an expert's phrase for one, `attribute` a word on the image itself. The Chinese
    wording is our own; any other language is put into the English sentence.
    """
    kind = modality.lower()
    if language == "zh":
        return f"{attribute}{_IMAGE_WORDS['zh'].get(kind, modality + '图像')}显示{finding}"
    if kind == "oct":
        return f"An Optical Coherence Tomography Image shows {finding.lower()}"
    words = _IMAGE_WORDS["en"].get(kind, f"{modality} image")
    return f"A {attribute} {words} of {finding}".replace("  ", " ")
