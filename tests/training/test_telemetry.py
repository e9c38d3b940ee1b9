"""The numbers of a run: pace, lines kept on resume, the similarity map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fundusfm.training import telemetry
from fundusfm.training.telemetry import Pace, keep_lines_until, similarity_map
from tests.objectives.tiny import random_batch, tiny_ret_clip


def test_pace__rate_and_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = 100.0
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: clock_s)
    pace = Pace(batch_size=30)
    for _ in range(4):
        clock_s += 0.5  # waits for data
        pace.step_begins()
        clock_s += 1.5  # computes
        pace.step_ends()
    assert pace.read() == {"exams_per_s": pytest.approx(15.0), "data_wait": pytest.approx(0.25)}
    clock_s += 1.0
    pace.step_begins()
    pace.step_ends()
    assert pace.read() == {"exams_per_s": pytest.approx(30.0), "data_wait": pytest.approx(1.0)}


def test_pace__validation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = 0.0
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: clock_s)
    pace = Pace(batch_size=10)
    clock_s += 500.0
    pace.restart()
    pace.step_begins()
    clock_s += 1.0
    pace.step_ends()
    assert pace.read() == {"exams_per_s": pytest.approx(10.0), "data_wait": pytest.approx(0.0)}


def test_keep_lines__until_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "tra')
    keep_lines_until(path, 3)
    assert path.read_text() == "\n".join(lines[:4]) + "\n"
    keep_lines_until(path, 0)
    assert path.read_text() == ""
    keep_lines_until(tmp_path / "absent", 3)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_similarity_map__cosines_from_0_to_1() -> None:
    objective = tiny_ret_clip().train()
    batch = random_batch(5, lacking=False)
    picture = similarity_map(objective, batch)
    assert objective.training
    assert picture.shape == (1, 5, 5)
    assert picture.min() >= 0
    assert picture.max() <= 1
    features = objective.features(batch)
    wanted = (features.image["patient"] @ features.text["patient"].T + 1) / 2
    torch.testing.assert_close(picture[0], wanted.detach())


def test_similarity_map__of_the_first_patients_only() -> None:
    objective = tiny_ret_clip()
    assert similarity_map(objective, random_batch(40)).shape == (1, 32, 32)
