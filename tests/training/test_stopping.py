"""A run that its launcher or the clock stops is saved where it stands and ends with 0; DONE comes last."""

from __future__ import annotations

from pathlib import Path

import pytest

from fundusfm.training.checkpoint import verify
from tests.training.conftest import SHORT, Finished


def test_flag__stops_at_the_first_boundary_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stop").touch()
    monkeypatch.setenv("FUNDUSFM_STOP_FLAG", str(tmp_path / "stop"))
    first = Finished(recipe, *SHORT)
    assert (first.outcome.step, first.outcome.signal_number) == (1, None)
    assert verify(first.outcome.checkpoint).step == 1
    assert "go on with --resume" in first.said
    assert not (first.folder / "DONE").exists()
    monkeypatch.delenv("FUNDUSFM_STOP_FLAG")
    second = Finished(recipe, *SHORT, resume_if_any=True)
    assert "step-00000001, as it was left; start 2 of this run" in " ".join(second.said.split())
    assert second.outcome.step == 6
    assert (second.folder / "DONE").read_text().startswith("step 6 ")


def test_time_limit__kept_and_the_lead_time_told(recipe: Path) -> None:
    late = Finished(recipe, *SHORT, "trainer.time_limit_minutes=0.001", resume_if_any=True)
    assert (late.outcome.step, late.outcome.signal_number) == (1, None)
    assert late.said.count("stopping takes") == 1
    assert not (late.folder / "DONE").exists()
