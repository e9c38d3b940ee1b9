"""One exam as an item of several views at once, for runs with several objectives.

Only exams that every view can use are read, so that each objective sees whole batches of the same exams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.faults import Fault
from fundusfm.stream.refusals import Holding
from fundusfm.stream.view import Mask, Remarking, TrainingView

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


@dataclass
class CompositeBatch:
    """The same exams as a batch of each part; `keys`, `faults`, `padding` as everywhere."""

    parts: dict[str, Any]
    keys: list[str]
    faults: list[Fault]
    padding: bool = False

    @property
    def images(self) -> Tensor:
        """The images of the first part, to look at."""
        images: Tensor = next(iter(self.parts.values())).images
        return images

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return self.map_parts(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.map_parts(lambda part: part.pin_memory())

    def pieces(self, size: int) -> list[Self]:
        """Batches of `size` exams each, the last perhaps smaller."""
        cut = [part.pieces(size) for part in self.parts.values()]
        return [
            replace(
                self,
                parts=dict(zip(self.parts, pieces, strict=True)),
                keys=self.keys[n * size : (n + 1) * size],
            )
            for n, pieces in enumerate(zip(*cut, strict=True))
        ]

    def map_parts(self, change: Callable[[Any], Any]) -> Self:
        """The same exams with each part's batch changed."""
        return replace(self, parts={name: change(part) for name, part in self.parts.items()})


class CompositeView:
    """Items of `views` side by side, by name. The random numbers of an exam go to them in their order.

    So the first part sees exactly what it would see alone.
    """

    def __init__(self, views: Mapping[str, TrainingView[Any, Any]]) -> None:
        self._views = views

    def usable(self, offsets: Offsets) -> Mask:
        masks = [view.usable(offsets) for view in self._views.values()]
        by_all: Mask = np.logical_and.reduce(masks)
        return by_all

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        refusals = (view.refusal(held) for view in self._views.values())
        return next((refusal for refusal in refusals if refusal), None)

    def remarks(self, held: Sequence[Holding]) -> dict[str, str]:
        """What any of the views has to say of the sources."""
        telling = [view for view in self._views.values() if isinstance(view, Remarking)]
        return {name: told for view in telling for name, told in view.remarks(held).items()}

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> dict[str, Any]:
        return {name: view.load(stored, rng) for name, view in self._views.items()}

    def collate(
        self, items: Sequence[dict[str, Any]], keys: list[str], faults: list[Fault]
    ) -> CompositeBatch:
        parts = {
            name: view.collate([item[name] for item in items], keys, []) for name, view in self._views.items()
        }
        return CompositeBatch(parts, keys, faults)
