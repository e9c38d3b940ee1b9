"""What is written where, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.evaluation import output
from fundusfm.evaluation.predictions import predictions_of
from tests.evaluation.conftest import Evaluated
from tests.evaluation.fakes import make_index


def test_write__whole_or_not_at_all(
    tmp_path: Path, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "run" / "evaluation-fake"
    predictions = predictions_of(evaluated.results, evaluated.measurement)
    output.write(final, evaluated.results, "<html>one</html>", predictions)
    assert sorted(p.name for p in final.iterdir()) == ["predictions.npz", "report.html", "results.json"]
    assert json.loads((final / "results.json").read_bytes())["facts"]["run"] == "fake-run"
    output.write(final, evaluated.results, "<html>two</html>", predictions)
    assert (final / "report.html").read_text() == "<html>two</html>"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        output.write(final, evaluated.results, "<html>three</html>", predictions)
    assert (final / "report.html").read_text() == "<html>two</html>"
    assert [p.name for p in final.parent.iterdir()] == ["evaluation-fake"]


def test_write__an_earlier_report_survives_a_failed_rename(
    tmp_path: Path, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "evaluation-fake"
    predictions = predictions_of(evaluated.results, evaluated.measurement)
    output.write(final, evaluated.results, "one", predictions)
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(UserError, match="Permission denied"):
        output.write(final, evaluated.results, "two", predictions)
    assert (final / "report.html").read_text() == "one"


def test_check_out__not_into_the_shards_and_not_over_other_things(tmp_path: Path) -> None:
    index = make_index()
    with pytest.raises(UserError, match="into the shard set"):
        output.check_out(Path("fake-shards/report"), index)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        output.check_out(tmp_path, index)
    with pytest.raises(UserError, match="something else"):
        output.check_out(tmp_path / "notes.txt", index)
    (tmp_path / "results.json").write_text("{}")
    output.check_out(tmp_path, index)


def test_read_metrics__up_to_the_checkpoint_without_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert output.read_metrics(path, 5) == []
    path.write_text(
        '{"step": 1, "train/loss": 2.0, "note": "x"}\n{"step": 9, "train/loss": 1.0}\n{"step": 2, "tr'
    )
    assert output.read_metrics(path, 5) == [{"step": 1, "train/loss": 2.0}]
