"""A cohort without files and towers without weights: images carry their findings in their pixels.

Legend: N images, C H W pixels, F features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import Recipe
from fundusfm.shards.exam import Exam, ImageRecord, TextRecord
from fundusfm.shards.index import ShardEntry, ShardIndex
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.items import ImageBatch, ImagesView
from fundusfm.stream.transforms import DeviceTail

FINDINGS = ("drusen", "haemorrhages", "large_cup")
GRADES = ("dr_none", "dr_mild", "dr_severe")
LABELS = ("normal", *FINDINGS, *GRADES, "tiny_dots", "fluid")
PHRASES = {
    "normal": "nothing abnormal",
    "drusen": "yellow deposits",
    "haemorrhages": "dark red blots",
    "large_cup": "a wide cup",
}
SIZE_PX = 24


@dataclass
class FakeExam:
    """One patient with both eyes; `labels` by eye."""

    patient: str
    key: str
    source: str
    labels: dict[str, tuple[str, ...] | None]
    report: str | None
    pixels: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = field(default_factory=dict)

    def stored(self) -> StoredExam:
        texts = (TextRecord("report.en.txt", "en"),) if self.report is not None else ()
        images = tuple(ImageRecord(f"{e}.cfp.0.jpg", e, "CFP", SIZE_PX, SIZE_PX) for e in self.labels)
        return FakeStored(Exam(self.patient, self.key, "test", images, texts), self.report or "")  # type: ignore[return-value]


@dataclass
class FakeStored:
    exam: Exam
    text: str

    def read(self, name: str) -> bytes:
        return self.text.encode()


def make_exams(split: str, num_patients: int, seed: int) -> list[FakeExam]:
    """Findings by eye, drawn into the pixels as columns of light; half of the exams have a report."""
    rng = np.random.default_rng([seed, len(split)])
    exams = []
    for number in range(num_patients):
        exam = FakeExam(f"{split}{number}", f"{split}-000000.tar:{number:06d}", "ab"[number % 2], {}, None)
        sentences = []
        for eye in ("left", "right"):
            has_F = rng.random(len(FINDINGS)) < 0.35
            own = tuple(name for name, has in zip(FINDINGS, has_F, strict=True) if has)
            grade = GRADES[int(has_F.sum() > 0) + int(has_F.sum() > 1)]
            exam.labels[eye] = None if number % 10 == 9 else ((*own, grade) if own else ("normal", grade))
            sentences += [f"{eye.title()} eye: {PHRASES[name]}." for name in own or ("normal",)]
            exam.pixels[eye] = _draw(rng, has_F)
        exam.report = " ".join(sentences) if number % 2 else None
        exams.append(exam)
    return exams


def _draw(rng: np.random.Generator, has_F: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Eight columns a finding, brighter where there is one, under noise."""
    light_W = np.repeat(has_F * 60.0, SIZE_PX // len(has_F))
    image_CHW = 90 + light_W[None, None, :] + rng.normal(0, 60, (3, SIZE_PX, SIZE_PX)) + rng.normal(0, 12)
    return image_CHW.clip(0, 255).astype(np.uint8)


@dataclass
class FakeSource:
    """Stands in for `features.Source`."""

    index: ShardIndex
    recipe: Recipe
    exams: dict[str, list[FakeExam]]
    batch_size: int = 10

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def images(self, split: str) -> Iterator[ImageBatch]:
        yield from self.batches(split, ImagesView(self.recipe.data))

    def normaliser(self) -> DeviceTail:
        return DeviceTail(self.recipe.data.mean, self.recipe.data.std)

    def batches(self, split: str, view: Any) -> Iterator[Any]:
        exams = self.exams[split]
        for start in range(0, len(exams), self.batch_size):
            chunk = exams[start : start + self.batch_size]
            if hasattr(view, "collate") and type(view).__name__ == "ReportsView":
                yield view.collate([view.load(e.stored(), None) for e in chunk], [e.key for e in chunk], [])
            elif isinstance(view, ImagesView):
                yield _image_batch(chunk)
            else:
                yield FakeExamBatch(_pixels(chunk), [e.key for e in chunk])


@dataclass
class FakeExamBatch:
    images: torch.Tensor
    keys: list[str]
    color_N34: None = None
    erase_N4: None = None

    def to(self, device: torch.device) -> FakeExamBatch:
        return self


def _pixels(exams: list[FakeExam]) -> torch.Tensor:
    return torch.from_numpy(np.stack([pixels for e in exams for pixels in e.pixels.values()]))


def _image_batch(exams: list[FakeExam]) -> ImageBatch:
    flat = [(e, eye) for e in exams for eye in e.pixels]
    return ImageBatch(
        images=_pixels(exams),
        eyes=[eye for _, eye in flat],
        modalities=["CFP"] * len(flat),
        sources=[e.source for e, _ in flat],
        patients=[e.patient for e, _ in flat],
        labels=[e.labels[eye] for e, eye in flat],
        keys=[e.key for e, _ in flat],
    )


class FakeTower:
    """Reads the findings out of the pixels if it can `see`, otherwise mixes all pixels at random.

    Embeddings have one axis an eye, finding and normal, so texts and images of different eyes are far apart.
    """

    view = "patient_pair"
    aligns_text, writes_reports, unit_prototypes = True, False, True
    pictures = Objective.pictures
    device = torch.device("cpu")

    def __init__(self, sees: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self._sees = sees
        self._mix = torch.randn(3 * SIZE_PX, 8, generator=generator)
        self._axes = torch.randn(8, 4, generator=generator)

    def contrast_scale(self, eye: str) -> float:
        return 20.0

    def probe_features(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        if not self._sees:
            return image_NCHW.mean(dim=2).flatten(1) @ self._mix
        return image_NCHW.mean(dim=(1, 2)).unflatten(1, (len(FINDINGS), -1)).mean(dim=2)

    def embed_images(self, image_NCHW: torch.Tensor, eye: str) -> torch.Tensor:
        feature_NF = self.probe_features(image_NCHW)
        if not self._sees:
            return _unit(feature_NF @ self._axes)
        findings_NF = (
            feature_NF - feature_NF.mean(dim=1, keepdim=True) + (feature_NF.mean(dim=1, keepdim=True) + 0.1)
        )
        return _unit(torch.cat([findings_NF, -findings_NF.amax(dim=1, keepdim=True)], dim=1))

    def embed_texts(self, token_BT: torch.Tensor, mask_BT: torch.Tensor, eye: str) -> torch.Tensor:
        words = [PHRASES[name] for name in (*FINDINGS, "normal")]
        rows = [[float(text.count(word)) for word in words] for text in map(_decode, token_BT)]
        return _unit(torch.tensor(rows) + 1e-3)

    def embed_exams(self, batch: FakeExamBatch) -> tuple[torch.Tensor, torch.Tensor]:
        image_BD = _unit(self.embed_images(batch.images, "").unflatten(0, (-1, 2)).sum(dim=1))
        return image_BD, image_BD


def _unit(row_ND: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(row_ND, dim=-1)


def fake_tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Code points, so that the fake tower can read the text back."""
    length = max(map(len, texts))
    token_BT = torch.tensor([[ord(c) for c in text.ljust(length)] for text in texts])
    return token_BT, token_BT > 0


def _decode(token_T: torch.Tensor) -> str:
    return "".join(map(chr, token_T.tolist()))


def make_index(splits: tuple[str, ...] = ("train", "val", "test"), **changes: Any) -> ShardIndex:
    """An index of the fake cohort; no file lies behind it."""
    shards = tuple(ShardEntry(f"{s}-000000.tar", s, 1, 1, 1, "", "", "") for s in splits)
    fields: dict[str, Any] = {
        "labels": LABELS,
        "ordered": {"retinopathy_grade": list(GRADES)},
        "prompts": {name: {"en": [phrase]} for name, phrase in PHRASES.items()},
        "card": {"visible_from_px": {"tiny_dots": 192}},
        "digest": "d" * 64,
        "image_size": SIZE_PX,
        **changes,
    }
    return ShardIndex(root="fake-shards", name="fake", shards=shards, **fields)


def make_source(
    splits: tuple[str, ...] = ("train", "val", "test"), num_patients: int = 60, **changes: Any
) -> FakeSource:
    """The cohort of an index with a small recipe."""
    recipe = Recipe(name="fake-run")
    recipe.data.image_size = SIZE_PX
    recipe.evaluation.num_resamples = 60
    exams = {split: make_exams(split, num_patients, seed) for seed, split in enumerate(splits)}
    return FakeSource(make_index(splits, **changes), recipe, exams)


def make_towers() -> dict[str, Any]:
    return {"pretrained": FakeTower(sees=True), "untrained": FakeTower(sees=False)}
