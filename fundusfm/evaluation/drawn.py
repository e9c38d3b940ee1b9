"""What an objective draws of a few exams: its own pictures, for the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fundusfm.evaluation.features import Pixels, Source
from fundusfm.objectives.base import Objective
from fundusfm.stream.datamodule import normalised
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.view import ViewInputs
from fundusfm.stream.views import VIEWS


def exam_batches(source: Source, split: str, tower: Objective, tokens: Tokens) -> Iterator[Any]:
    """Every exam of a split once through the tower's own view, normalised on its device."""
    normaliser = source.normaliser()
    view = VIEWS[tower.view](ViewInputs(source.recipe, tokens, (source.index,)))
    for batch in source.batches(split, view):
        yield normalised(batch.to(source.device), normaliser)


@torch.inference_mode()
def draw(source: Source, split: str, tower: Objective, tokens: Tokens) -> dict[str, Pixels]:
    """The objective's pictures of the first exams of a split, pixels_HWC by name; none if it has none."""
    if type(tower).pictures is Objective.pictures:
        return {}
    batch = next(exam_batches(source, split, tower, tokens))
    pictures = tower.pictures(batch)
    return {
        name: (picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        for name, picture in pictures.items()
    }
