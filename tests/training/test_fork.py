"""A fork goes on from another run's state under a recipe of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fundusfm.cli import app
from fundusfm.errors import UserError
from tests.training.conftest import SHORT, Finished
from tests.training.launch import losses

OWN = (*SHORT, "name=fork", "optim.lr=0.02", "optim.weight_decay=0.5")


@pytest.fixture
def begun(short_run: Finished, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and a copy of a run of it that has a checkpoint at step 3."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(short_run.recipe.read_text().replace(str(short_run.recipe.parent), str(tmp_path)))
    run = Path(shutil.copytree(short_run.folder, tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace(str(short_run.recipe.parent), str(tmp_path))
    )
    return recipe, run


def test_other_recipe__refused_and_the_fork_offered(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    with pytest.raises(UserError, match=r"optim\.lr was 0\.001, is 0\.02") as refused:
        Finished(recipe, *SHORT, "optim.lr=0.02", resume=True)
    assert f"--fork {run} name=" in refused.value.fix


def test_fork__the_others_state_and_its_own_rates(begun: tuple[Path, Path], short_run: Finished) -> None:
    recipe, run = begun
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    fork = Finished(recipe, *OWN, fork=run)
    assert "under another recipe" in " ".join(fork.said.replace("│", " ").split())
    ours, theirs = losses(recipe.parent / "fork" / "metrics.jsonl"), losses(short_run.metrics)
    assert min(step for step, _ in ours) == 4
    assert ours[4, False]["train/loss"] == theirs[4, False]["train/loss"], "another state or other exams"
    assert ours[4, False]["lr"] == pytest.approx(20 * theirs[4, False]["lr"])
    assert ours[5, False]["train/loss"] != theirs[5, False]["train/loss"]
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before


def test_fork__killed_before_its_first_checkpoint(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    Finished(recipe, *OWN, fork=run)
    fork = recipe.parent / "fork"
    wanted = losses(fork / "metrics.jsonl")
    shutil.rmtree(fork / "checkpoints")
    (fork / "checkpoints").mkdir()
    Finished(recipe, *OWN, resume=True)
    assert losses(fork / "metrics.jsonl") == wanted


def test_fork__given_again_by_a_launcher(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    Finished(recipe, *OWN, "checkpoint.every_steps=1", resume_if_any=True, fork=run)
    shutil.rmtree(recipe.parent / "fork" / "checkpoints" / "step-00000006")
    again = Finished(recipe, *OWN, resume_if_any=True, fork=run)
    assert "step-00000005, as it was left" in again.said


def test_run_folder__not_for_another_recipe(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    (run / "DONE").touch()
    asked = ("recipe", "folder", str(recipe), *SHORT)
    result = CliRunner().invoke(app, [*asked, "data.workers=1"])
    assert (result.exit_code, result.stdout) == (0, f"{run}\n")
    result = CliRunner().invoke(app, [*asked, "optim.lr=0.02"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "optim.lr was 0.001, is 0.02" in result.stderr


def test_fork__not_with_resume(begun: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="both given"):
        Finished(begun[0], *OWN, resume=True, fork=begun[1])


def test_fork__objective_of_another_size_refused(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    with pytest.raises(UserError, match=r"tensors of the checkpoint do not fit the objective"):
        Finished(recipe, *OWN, "model.embed_dim=8", fork=run)


def test_fork__resumed_without_its_origin(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    Finished(recipe, *OWN, "checkpoint.every_steps=1", fork=run)
    shutil.rmtree(run)
    shutil.rmtree(recipe.parent / "fork" / "checkpoints" / "step-00000006")
    again = Finished(recipe, *OWN, resume=True)
    assert "step-00000005, as it was left" in again.said
    assert again.outcome.step == 6


def test_fork__its_origin_gone_before_a_checkpoint_of_its_own(begun: tuple[Path, Path]) -> None:
    recipe, run = begun
    Finished(recipe, *OWN, fork=run)
    shutil.rmtree(run)
    shutil.rmtree(recipe.parent / "fork" / "checkpoints")
    with pytest.raises(
        UserError, match="the one it was forked from cannot be used: there is no checkpoint"
    ) as e:
        Finished(recipe, *OWN, resume=True)
    assert e.value.where == str(run / "checkpoints" / "step-00000003")
    assert "--fork CKPT" in e.value.fix
