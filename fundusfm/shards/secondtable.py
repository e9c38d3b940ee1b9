"""The second table: texts and labels for an exam as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fundusfm.shards.draft import Reject
from fundusfm.shards.rows import RowError, language_of, split_labels
from fundusfm.shards.table import Cells

_Key = tuple[str, str]


@dataclass(frozen=True)
class ExamNotes:
    """Labels and texts by (patient id, exam id); an empty exam id speaks for every exam of the patient."""

    labels: dict[_Key, tuple[str, ...]] = field(default_factory=dict)
    texts: dict[_Key, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def of(self, patient_id: str, exam_id: str) -> tuple[tuple[str, ...] | None, tuple[tuple[str, str], ...]]:
        """Labels (None if nobody gave any) and texts as (language, text) of one exam."""
        keys = dict.fromkeys([(patient_id, ""), (patient_id, exam_id)])
        given = [self.labels[key] for key in keys if key in self.labels]
        labels = tuple(dict.fromkeys(label for part in given for label in part)) if given else None
        return labels, tuple(text for key in keys for text in self.texts.get(key, ()))


def read_notes(
    cells: Sequence[Cells], label_names: Mapping[str, str], table_name: str
) -> tuple[ExamNotes, list[Reject]]:
    """Notes of a second table. Rows about other exams do no harm: hospitals export all reports."""
    labels: dict[_Key, list[str]] = {}
    texts: dict[_Key, list[tuple[str, str]]] = defaultdict(list)
    rejects = []
    for number, record in enumerate(cells, 1):
        key = record["patient_id"], record.get("exam_id", "")
        try:
            text = _text_of(record)
        except RowError as error:
            rejects.append(Reject(number, table_name, str(error)))
            continue
        if text is not None:
            texts[key].append(text)
        found = split_labels(record.get("label", ""), label_names)
        if found is not None:
            labels.setdefault(key, []).extend(found)
    unique = {key: tuple(dict.fromkeys(found)) for key, found in labels.items()}
    return ExamNotes(unique, {key: tuple(found) for key, found in texts.items()}), rejects


def _text_of(record: Cells) -> tuple[str, str] | None:
    """(language, text) of a row, if it has a text; RowError if it is nobody's."""
    if not record["patient_id"]:
        raise RowError("the patient id is empty")
    report = record.get("report", "")
    return (language_of(report, record.get("lang", "")), report) if report else None
