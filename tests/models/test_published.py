"""The published RET-CLIP file, in every form it travels in, gives the published features."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fundusfm import cli
from fundusfm.objectives import build_objective, config_of
from fundusfm.objectives.ret_clip import TERMS
from fundusfm.recipe.load import load_recipe, recipe_to_yaml
from tests.goldens import load
from tests.objectives.tiny import VOCAB_SIZE, golden_batch, tiny_recipe

ARRAYS, DESCRIPTION = load("ret_clip/forward_tiny_f32")
PUBLISHED = {
    k.removeprefix("param/"): torch.from_numpy(v) for k, v in ARRAYS.items() if k.startswith("param/")
}


def _import(file: Path, out: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.app(["weights", "import", "ret_clip", str(file), "--out", str(out)])
    return int(ended.value.code or 0)


def _write(folder: Path, form: str, prefix: str, tensors: dict[str, torch.Tensor]) -> Path:
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    if form == "safetensors":
        save_file(named, folder / "published.safetensors")
        return folder / "published.safetensors"
    content: Any = named if form == "flat" else {"epoch": 10, "step": 7570, "name": "x", "state_dict": named}
    torch.save(content, folder / "published.pt")
    return folder / "published.pt"


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["flat", "wrapped", "safetensors"])
def test_import__the_same_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, prefix: str
) -> None:
    pooler = {"bert.pooler.dense.weight": torch.zeros(2, 2)}
    out = tmp_path / "ours.safetensors"
    assert _import(_write(tmp_path, form, prefix, {**PUBLISHED, **pooler}), out) == 0
    told = capsys.readouterr().out
    for name in PUBLISHED:
        assert f"{prefix}{name} -> " in told
    assert f"{prefix}bert.pooler.dense.weight is not used" in told
    assert f"{len(PUBLISHED)} tensors, 1 not used" in told

    saved = recipe_to_yaml(tiny_recipe()).replace("sources: []", "sources: [{shards: x}]")
    (tmp_path / "recipe.yaml").write_text(saved)
    overrides = [f"model.weights={json.dumps(str(out))}", "trainer.max_steps=9"]
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides, objective_config=config_of).recipe
    model = build_objective(recipe, VOCAB_SIZE).eval()
    batch = golden_batch(ARRAYS["in_img_left"], ARRAYS["in_img_right"], ARRAYS["in_tokens"])
    features = model.features(batch)  # type: ignore[operator]
    tolerance = {"rtol": DESCRIPTION["suggested_rtol"], "atol": 1e-5}
    for term in TERMS:
        np.testing.assert_allclose(features.image[term].detach(), ARRAYS[f"out_{term}_image"], **tolerance)
        np.testing.assert_allclose(features.text[term].detach(), ARRAYS[f"out_{term}_text"], **tolerance)


@pytest.mark.parametrize("what", ["unknown key", "other system", "empty"])
def test_unknown_keys__refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    tensors = {
        "unknown key": {**PUBLISHED, "visual.extra": torch.zeros(1)},
        "other system": {"encoder.weight": torch.zeros(1)},
        "empty": {},
    }[what]
    file = _write(tmp_path, "flat", "module.", tensors)
    assert _import(file, tmp_path / "ours.safetensors") == 2
    complaint = capsys.readouterr().err
    assert "published.pt" in complaint
    assert {"unknown key": "module.visual.extra", "other system": "encoder.weight", "empty": "no key"}[
        what
    ] in complaint
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code__refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "published.pt"
    torch.save({"state_dict": PUBLISHED, "args": _Trap(tmp_path / "sprung")}, file)
    assert _import(file, tmp_path / "ours.safetensors") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_unwritable_output__one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path, "flat", "", PUBLISHED)
    (tmp_path / "taken").write_text("a file where a folder should be")
    assert _import(file, tmp_path / "taken" / "ours.safetensors") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert _import(file, tmp_path / "new" / "folder" / "ours.safetensors") == 0


def test_unknown_system__refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.app(["weights", "import", "ret_klip", str(tmp_path / "x"), "--out", str(tmp_path / "y")])
    assert ended.value.code == 2
    assert "ret_clip" in capsys.readouterr().err
