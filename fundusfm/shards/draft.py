"""What the writer takes: a source of exams that can be loaded one by one, in any process, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fundusfm.shards.exam import Exam


@dataclass(frozen=True)
class ExamDraft:
    """An exam ready to be written: `contents` maps the member suffix of each image and text to its bytes."""

    exam: Exam
    contents: dict[str, bytes]


@dataclass(frozen=True)
class Reject:
    """Something of the input that cannot be used. `row` counts from 1 under the header of the table."""

    row: int
    item: str
    reason: str


class ExamSource(Protocol):
    """Exams to write. Instances travel to worker processes, so they pickle and hold no open files.

    `digest` identifies the input and every option that changes the output: a build resumes only onto its own.
    `rejects` are known before any image is opened; `num_items` is what `--max-rejects` is a share of.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def num_items(self) -> int: ...

    @property
    def rejects(self) -> Sequence[Reject]: ...

    def splits(self) -> Sequence[str]:
        """The split of each exam; its length is the number of exams."""
        ...

    def load(self, number: int) -> tuple[ExamDraft | None, list[Reject]]:
        """Exam `number` with images encoded, and what of it had to be rejected; None if nothing is left."""
        ...

    def card(self) -> dict[str, Any]:
        """What `index.json` says: `labels`, `ordered`, `prompts`, `card`, `licence`, `image_size`."""
        ...
