"""`fundusfm checkpoint`: torn ones are named, and one file holds every weight of a spread model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fundusfm.errors import UserError
from fundusfm.training import audit, checkpoint
from fundusfm.training.checkpoint import find_checkpoint, load_weights
from fundusfm.training.loading import load_objective
from tests.badinput.conftest import ask, refused
from tests.conftest import Cohort
from tests.training.launch import write_recipe
from tests.training.ranked import train


@pytest.fixture(scope="module")
def spread_run(synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks under FSDP, with a frozen block, tied heads and a buffer; checkpoints at 2 and 4."""
    recipe = write_recipe(tmp_path_factory.mktemp("spread") / "recipe.yaml", synth_cohort)
    train(2, recipe, "trainer.strategy=fsdp", "trainer.max_steps=4", "checkpoint.every_steps=2")
    return recipe.parent / "run"


def test_list_and_verify(spread_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(spread_run, tmp_path / "run", symlinks=True))
    listed = ask("checkpoint", "list", run)
    assert listed.code == 0
    lines = listed.text.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["step-00000002", "whole", "24"],
        ["step-00000004", "whole", "48"],
    ]
    assert all("fsdp on 2 ranks" in line for line in lines)
    assert ask("checkpoint", "verify", run).code == 0
    torn = run / "checkpoints" / "step-00000004" / "optimiser-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert str(torn) in ask("checkpoint", "list", run).text
    assert f"{torn}" in refused("checkpoint", "verify", run)
    assert ask("checkpoint", "verify", run / "checkpoints" / "step-00000002").code == 0
    refused("checkpoint", "consolidate", run / "checkpoints" / "step-00000004", "--out", tmp_path / "w")
    refused("checkpoint", "list", tmp_path)


def test_consolidate__every_tensor_accounted_for(spread_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    answer = ask("checkpoint", "consolidate", spread_run, "--out", out)
    assert answer.code == 0, answer.text
    assert "vision.trunk.blocks.0.mlp.fc1.weight: frozen, [128, 32]" in answer.text
    assert "vision.trunk.blocks.1.mlp.fc1.weight: trained, [128, 32]" in answer.text
    assert "text_heads.right.0.weight: tied to text_heads.left.0.weight" in answer.text
    assert "seen: buffer, [2]" in answer.text
    assert "12 frozen, 1 buffer, 4 tied" in answer.text
    objective, _ = load_objective(find_checkpoint(spread_run))
    wanted = objective.state_dict()
    with torch.no_grad():
        for tensor in wanted.values():
            tensor.zero_()
    objective.load_state_dict(load_file(out))
    torch.testing.assert_close(
        objective.state_dict(), load_weights(find_checkpoint(spread_run)), rtol=0, atol=0
    )


def test_consolidate__a_lost_tensor_is_no_file(
    spread_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_weights(find_checkpoint(spread_run))
    monkeypatch.setattr(audit, "load_weights", lambda folder: {k: v for k, v in whole.items() if k != "seen"})
    with pytest.raises(UserError, match="seen"):
        audit.consolidate(spread_run, tmp_path / "weights.safetensors")
    changed = {name: tensor + 1 for name, tensor in whole.items()}
    monkeypatch.setattr(audit, "load_weights", lambda folder: changed)
    with pytest.raises(UserError, match="changed on the way"):
        audit.consolidate(spread_run, tmp_path / "weights.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("place", ["nowhere/weights.safetensors", "."])
def test_consolidate__a_place_that_cannot_be_written(spread_run: Path, tmp_path: Path, place: str) -> None:
    told = refused("checkpoint", "consolidate", spread_run, "--out", tmp_path / place)
    assert "the weights cannot be written" in told


def test_list__a_run_that_prunes_meanwhile(
    spread_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(spread_run, tmp_path / "run", symlinks=True))
    digest = checkpoint.digest

    def pruning(path: Path) -> str:
        if "step-00000002" in str(path):
            shutil.rmtree(path.parent)
        return digest(path)

    monkeypatch.setattr(checkpoint, "digest", pruning)
    assert [finding.folder.name for finding in audit.look_at(run)] == ["step-00000004"]
