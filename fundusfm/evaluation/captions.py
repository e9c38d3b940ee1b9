"""Reports that an objective writes, against those that people wrote.

Each exam with a report is described from the image that its view shows. Beside the pretrained tower stand
the untrained one and two ways of writing without a look at the image: the most frequent report of the train
split, and one of that split drawn for each exam.

BLEU is that of the corpus, counted by torchmetrics; ROUGE-L and CIDEr (its form with cut counts and a penalty
for length) are means over exams, by the code of the COCO captions. Words are compared in lower case and
without punctuation, Chinese by character. In the bootstrap exams of a patient are drawn together; how rare a
phrase is (for CIDEr) is always counted over all of them.

Legend: E exams, R resamples, G the four lengths of n-grams.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.text import BLEUScore

from fundusfm.errors import UserError
from fundusfm.evaluation.arrays import Floats
from fundusfm.evaluation.bootstrap import Estimate, Resamples
from fundusfm.evaluation.examples import data_uri
from fundusfm.evaluation.exams import Report, written_reports
from fundusfm.evaluation.features import Pixels, Source, Towers
from fundusfm.evaluation.results import CaptionResult
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.view import ViewInputs
from fundusfm.stream.views import VIEWS

FREQUENT, DRAWN = "most frequent report of train", "a report of train, drawn"
NUM_GRAMS, NUM_SHOWN = 4, 8
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@dataclass(frozen=True)
class Written:
    """The exams that could be read with a report of their own, and by method the texts written about them.

    `pictures`: a few of the images, by place among the exams.
    """

    reports: list[Report]
    texts: dict[str, list[str]]
    pictures: dict[int, Pixels]


@dataclass(frozen=True)
class WrittenExample:
    """An image, the report that its exam has, and what each method wrote."""

    picture: str
    report: str
    texts: tuple[tuple[str, str], ...]


def check_metrics() -> None:
    """Before any work: UserError if the library that measures reports is not there."""
    _coco("cider.cider")


def write_captions(
    source: Source, train: str, reported: str, towers: Towers, tokens: Tokens, reports: list[Report]
) -> Written:
    """A report about each exam of `reports` by every tower, and by the two that look at no image."""
    begin, end = tokens.ends
    normaliser = source.normaliser()
    view = VIEWS[next(iter(towers.values())).view](ViewInputs(source.recipe, tokens, (source.index,)))
    wanted = {report.key: report for report in reports}
    found: list[Report] = []
    texts: dict[str, list[str]] = {name: [] for name in towers}
    pictures: dict[int, Pixels] = {}
    shown = _spread(len(reports))
    for batch in source.batches(reported, view):
        assert len(batch.images) == len(batch.keys), "reports are written about one image an exam"
        rows = [row for row, key in enumerate(batch.keys) if key in wanted]
        if not rows:
            continue
        images = batch.images[rows]
        for row, pixels_CHW in enumerate(images, start=len(found)):
            if row in shown:
                pictures[row] = pixels_CHW.permute(1, 2, 0).cpu().numpy()
        found += [wanted[batch.keys[row]] for row in rows]
        image_NCHW = normaliser.normalise(images.to(source.device))
        for name, tower in towers.items():
            texts[name] += map(tokens.text_of, tower.write_reports(image_NCHW, begin, end))
    blind = blind_texts([r.text for r in written_reports(source, train)], len(found), source.recipe.seed)
    return Written(found, {**texts, **blind}, pictures)


def _spread(num_exams: int) -> set[int]:
    """Places of a few exams, evenly over all."""
    return set(range(0, num_exams, max(1, num_exams // NUM_SHOWN)))


def blind_texts(train: Sequence[str], num_exams: int, seed: int) -> dict[str, list[str]]:
    """What can be written without a look: nothing at all where the train split has no report."""
    if not train:
        return {}
    drawn = np.random.default_rng(seed).integers(len(train), size=num_exams)
    frequent = Counter(train).most_common(1)[0][0]
    return {FREQUENT: [frequent] * num_exams, DRAWN: [train[place] for place in drawn]}


def measure_captions(written: Written, *, num_resamples: int, seed: int) -> tuple[CaptionResult, ...]:
    """Every method on the same exams, with the same resamples of patients."""
    patients = [report.patient for report in written.reports]
    resamples = Resamples(patients, num_resamples, seed)
    truth = [words_of(report.text) for report in written.reports]
    return tuple(
        _measure(method, [words_of(text) for text in texts], truth, resamples)
        for method, texts in written.texts.items()
        if truth
    )


def _measure(
    method: str, written: list[list[str]], truth: list[list[str]], resamples: Resamples
) -> CaptionResult:
    counts = BleuCounts.of(written, truth)
    bleu = [resamples.estimate(lambda weight_RE, n=n: counts.bleu(weight_RE)[:, n]) for n in range(NUM_GRAMS)]  # type: ignore[misc]
    scorers = (_coco("rouge.rouge").Rouge(), _coco("cider.cider").Cider())
    rouge_l, cider = (_mean(resamples, exam_scores(scorer, written, truth)) for scorer in scorers)
    num_words = float(np.mean([len(words) for words in written]))
    return CaptionResult(method, len(truth), num_words, tuple(bleu), rouge_l, cider)


def _mean(resamples: Resamples, value_E: Floats) -> Estimate:
    return resamples.estimate(lambda weight_RE: weight_RE @ value_E / weight_RE.sum(axis=1))


def words_of(text: str) -> list[str]:
    """What is compared: lower-case words and numbers, and each Chinese character."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class BleuCounts:
    """Of each exam: n-grams that are also in its report, n-grams written, and both lengths in words."""

    matched_EG: Floats
    written_EG: Floats
    length_E: Floats
    true_length_E: Floats

    @classmethod
    def of(cls, written: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> BleuCounts:
        """The counts that torchmetrics makes."""
        metric, rows = BLEUScore(n_gram=NUM_GRAMS), []
        for one, true in zip(written, truth, strict=True):
            metric.reset()
            metric.update([" ".join(one)], [[" ".join(true)]])
            lengths = torch.stack([metric.preds_len, metric.target_len]).flatten()
            rows.append(torch.cat([metric.numerator, metric.denominator, lengths]))
        count = torch.stack(rows).double().numpy()
        return cls(count[:, :NUM_GRAMS], count[:, NUM_GRAMS:-2], count[:, -2], count[:, -1])

    def bleu(self, weight_RE: Floats) -> Floats:
        """BLEU-1 to BLEU-4 (R, G) of a corpus in which each exam counts so often."""
        matched_RG, written_RG = weight_RE @ self.matched_EG, weight_RE @ self.written_EG
        length_R, true_length_R = weight_RE @ self.length_E, weight_RE @ self.true_length_E
        with np.errstate(divide="ignore"):
            log_RG = np.log(matched_RG / np.maximum(written_RG, 1))
            penalty_R = np.minimum(0, 1 - true_length_R / np.maximum(length_R, 1e-9))
        mean_RG = np.cumsum(log_RG, axis=1) / np.arange(1, NUM_GRAMS + 1)
        bleu_RG: Floats = np.exp(mean_RG + penalty_R[:, None])
        return bleu_RG


def exam_scores(scorer: Any, written: list[list[str]], truth: list[list[str]]) -> Floats:
    """What a scorer of the COCO captions gives each exam (E,)."""
    given, asked = ({row: [" ".join(words)] for row, words in enumerate(texts)} for texts in (truth, written))
    _, score_E = scorer.compute_score(given, asked)
    return np.asarray(score_E, dtype=np.float64)


def _coco(name: str) -> Any:
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ImportError as error:
        raise UserError(
            f"written reports cannot be measured: {error}",
            where="pycocoevalcap",
            fix="pip install 'fundusfm[captions]', or pycocoevalcap itself",
        ) from error


def caption_examples(written: Written) -> list[WrittenExample]:
    """The exams of `pictures` in their order."""
    return [
        WrittenExample(
            data_uri(pixels_HWC),
            written.reports[row].text,
            tuple((method, texts[row]) for method, texts in written.texts.items()),
        )
        for row, pixels_HWC in sorted(written.pictures.items())
    ]
