"""The loaders to compare with: RET-CLIP's, written from its description, and plain webdataset with PIL."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import torch
import webdataset
from photographs import Pair, report_of
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fundusfm.recipe.schema import DataConfig
from fundusfm.stream.loader import prepare_worker
from fundusfm.stream.tokens import Tokens

Transform = Callable[[Image.Image], torch.Tensor]
Sample = tuple[torch.Tensor, torch.Tensor, str]
_MAP_BYTES = 2**34


def published_transform(config: DataConfig) -> Transform:
    """RET-CLIP's augmentation as timm builds it: float images, everything in the worker."""
    return create_transform(
        input_size=config.image_size,
        is_training=True,
        scale=config.augment.crop_scale,
        color_jitter=config.augment.brightness,
        interpolation="bicubic",
        re_prob=config.augment.erase_probability,
        mean=config.mean,
        std=config.std,
    )


def collate(samples: Sequence[Sample], tokens: Tokens) -> list[torch.Tensor]:
    """Float images stacked, texts tokenised all at once (RET-CLIP does it one by one, which is slower)."""
    left, right, texts = zip(*samples, strict=True)
    return [torch.stack(left), torch.stack(right), *tokens(list(texts))]


def write_lmdb(pairs: Sequence[Pair], num_exams: int, folder: Path) -> None:
    """RET-CLIP's layout: patient -> pickle of two base64 strings; index -> pickle of patient and text."""
    with lmdb.open(str(folder / "imgs"), map_size=_MAP_BYTES) as images, images.begin(write=True) as put:
        for number in range(num_exams):
            eyes = tuple(base64.urlsafe_b64encode(raw).decode() for raw in pairs[number % len(pairs)])
            put.put(f"patient{number}".encode(), pickle.dumps(eyes))
    with lmdb.open(str(folder / "pairs"), map_size=_MAP_BYTES) as texts, texts.begin(write=True) as put:
        for number in range(num_exams):
            record = (f"patient{number}", number, report_of(number))
            put.put(str(number).encode(), pickle.dumps(record))
        put.put(b"num_samples", str(num_exams).encode())


class LmdbPairs(Dataset[Sample]):
    """Pairs as RET-CLIP reads them: unpickle, base64, full decode by PIL, transform each eye by itself."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self._folder, self._transform = folder, published_transform(config)
        self._open: tuple[Any, Any] | None = None
        with lmdb.open(str(folder / "pairs"), readonly=True, lock=False) as pairs, pairs.begin() as view:
            self._length = int(view.get(b"num_samples"))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Sample:
        pairs, images = self._views()
        patient, _, text = pickle.loads(pairs.get(str(number).encode()))
        left, right = (self._image(eye) for eye in pickle.loads(images.get(patient.encode())))
        return left, right, text

    def _image(self, encoded: str) -> torch.Tensor:
        image = Image.open(io.BytesIO(base64.urlsafe_b64decode(encoded))).convert("RGB")
        return self._transform(image)

    def _views(self) -> tuple[Any, Any]:
        """LMDB does not survive a fork, so each worker opens its own."""
        if self._open is None:
            names = ("pairs", "imgs")
            found = [
                lmdb.open(str(self._folder / n), readonly=True, lock=False, readahead=False).begin()
                for n in names
            ]
            self._open = (found[0], found[1])
        return self._open


def lmdb_loader(folder: Path, config: DataConfig, tokens: Tokens, workers: int) -> DataLoader[Any]:
    """Endless shuffled batches."""
    dataset = LmdbPairs(folder, config)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    return DataLoader(
        dataset,
        batch_size=config.global_batch_size,
        sampler=sampler,
        collate_fn=partial(collate, tokens=tokens),
        num_workers=workers,
        worker_init_fn=prepare_worker,
    )


class TarPairs(IterableDataset[Any]):
    """The same tars read by webdataset, images decoded by its PIL handler."""

    def __init__(self, tars: Sequence[str], config: DataConfig, tokens: Tokens) -> None:
        self._transform = published_transform(config)
        self._pipeline = (
            webdataset.WebDataset(list(tars), shardshuffle=False, nodesplitter=None)
            .repeat()
            .decode("pil")
            .map(self._item)
            .batched(config.global_batch_size, collation_fn=partial(collate, tokens=tokens))
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pipeline)

    def _item(self, sample: dict[str, Any]) -> Sample:
        left, right = (self._transform(sample[f"{eye}.cfp.0.jpg"]) for eye in ("left", "right"))
        return left, right, sample["report.en.txt"]


def tar_loader(tars: Sequence[str], config: DataConfig, tokens: Tokens, workers: int) -> DataLoader[Any]:
    """Endless batches in the order of the files, without a shuffle buffer."""
    dataset = TarPairs(tars, config, tokens)
    return DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=prepare_worker)
