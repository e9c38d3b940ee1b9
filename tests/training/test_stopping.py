"""A run that its launcher or the clock stops is saved where it stands and ends with 0; DONE comes last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fundusfm.errors import UserError
from fundusfm.training import fit
from fundusfm.training.checkpoint import verify
from fundusfm.training.keeper import Keeper
from tests.training.conftest import SHORT, Finished
from tests.training.launch import finish, start


def test_flag__stops_at_the_first_boundary_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stop").touch()
    monkeypatch.setenv("FUNDUSFM_STOP_FLAG", str(tmp_path / "stop"))
    first = Finished(recipe, *SHORT)
    assert (first.outcome.step, first.outcome.signal_number) == (1, None)
    assert verify(first.outcome.checkpoint).step == 1
    assert f"stopped at step 1, stop file {tmp_path / 'stop'}; go on with --resume" in first.said
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
    assert "stopped at step 1, time limit: trainer.time_limit_minutes; go on" in late.said
    assert not (late.folder / "DONE").exists()


def test_stale_end_of_a_job__named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left in the environment of a shell, it stops every run; without a word nobody would find out why."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000000")
    stopped = Finished(recipe, *SHORT)
    assert "stopped at step 1, end of the SLURM job at 2001-09-" in stopped.said
    assert "SLURM_JOB_END_TIME; go on with --resume" in stopped.said


def test_sigterm_before_the_first_step__saved_after_it_and_143(recipe: Path) -> None:
    """On two ranks, which hear it at different moments."""
    own = ("objective.name=tests.training.own:TermedEarly", "objective.fidelity=corrected")
    said = finish(start(recipe, *SHORT, *own, "trainer.devices=2"), 143)
    assert said.count("stopped at step 1, signal SIGTERM; go on with --resume") == 1, said
    assert "Traceback" not in said
    assert verify(recipe.parent / "run" / "checkpoints" / "step-00000001").world_size == 2


@pytest.mark.parametrize(
    ("objective", "ends"), [("Impatient", KeyboardInterrupt), ("NanOnOneRank", UserError)]
)
def test_checkpoint_being_written__not_waited_for_after_a_second_ctrl_c(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, objective: str, ends: type[BaseException]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(Keeper, "settle", lambda self, limit_s, console: waited.append(limit_s))
    own = (f"objective.name=tests.training.own:{objective}", "objective.fidelity=corrected")
    with pytest.raises(ends):
        Finished(recipe, *SHORT, *own)
    assert waited == ([] if ends is KeyboardInterrupt else [60.0])


def test_variables_of_a_run__gone_after_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit_on_two_ranks(*_: Any) -> None:
        os.environ["LOCAL_RANK"] = os.environ["WORLD_SIZE"] = "1"
        raise UserError("broken")

    monkeypatch.setattr(fit, "_fit", fit_on_two_ranks)
    with pytest.raises(UserError, match="broken"):
        Finished(recipe, *SHORT)
    assert not {"LOCAL_RANK", "WORLD_SIZE", "FUNDUSFM_START"} & set(os.environ)
