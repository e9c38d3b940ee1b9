"""Recipes that are well written and ask for what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.badinput.conftest import ask, refused


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.modalities=[XYZ]", "no exam of the train split has an image of XYZ"),
        ("data.languages=[fr]", "no exam of the train split has a text in fr"),
        ("data.image_size=50", "50 pixels are no whole number of the 16-pixel patches"),
        ("data.augment.brihgtness=0.1", "did you mean brightness?"),
        ("data.tokenizer=gone.json", "there is no such tokenizer file"),
        ("data.tokenizer=recipe.yaml", "the tokenizer cannot be loaded"),
        ("model.vision.name=vit_bse_patch16_224", "timm has no model"),
        ("model.vision.options={depht: 3}", "unexpected keyword argument 'depht'"),
        ("model.weights=gone.safetensors", "the weight file cannot be opened"),
        ("model.weights=recipe.yaml", "the weight file cannot be read"),
        ("runs_dir=recipe.yaml", "the run folder cannot be written"),
        ("name=../up", "cannot be the name of a run folder"),
        ("data.sources=[]", "needs at least one source"),
    ],
)
def test_pretrain__refused_before_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str, told: str
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert told in refused("pretrain", recipe, override)
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()
    assert not (recipe.parent / "run" / "recipe.yaml").exists(), "the name is taken by a run that never began"


def test_no_val_split__told_at_the_start(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = ["image,patient_id,split,report"]
    for number in range(4):
        Image.new("RGB", (40, 40), (40 * number, 60, 20)).save(tmp_path / "in" / f"{number}.jpg")
        rows.append(f"{number}.jpg,{number},train,a small disc {number}")
    (tmp_path / "in" / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    built = ("--out", tmp_path / "train only", "--size", "32", "--workers", "1")
    assert ask("shards", "build", tmp_path / "in" / "t.csv", *built).code == 0
    source = f"data.sources=[{{shards: '{tmp_path / 'train only'}'}}]"
    answer = ask("pretrain", recipe, source, "trainer.max_steps=4", "data.workers=0")
    assert answer.code == 0 and "none: no val split" in answer.text and "zero" not in answer.text


def test_quarantine_cut_short__is_no_obstacle(recipe: Path) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    (run / "quarantine.jsonl").write_text('{"shards": "synth", "sha')
    assert ask("pretrain", recipe, "trainer.max_steps=4", "data.workers=0").code == 0
