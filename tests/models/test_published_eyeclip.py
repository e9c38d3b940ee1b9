"""The published EyeCLIP file, as its training script saves it, gives the published features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fundusfm import cli
from fundusfm.models.positions import sincos_table
from fundusfm.models.published import import_weights
from fundusfm.models.weights import read_weights
from fundusfm.objectives import build_objective, config_of
from fundusfm.recipe.load import load_recipe, recipe_to_yaml
from fundusfm.recipe.schema import Fidelity
from tests.goldens import load_parts
from tests.objectives.tiny_eyeclip import VOCAB_SIZE, golden_batch, golden_recipe


def _published(folder: Path, **changes: torch.Tensor) -> Path:
    """The golden's weights in the dictionary that the script saves beside its optimiser."""
    arrays, _ = load_parts("eyeclip/tiny_model_weights")
    state = {key.removeprefix("w."): torch.from_numpy(array) for key, array in arrays.items()} | changes
    optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 7.8e-4, "params": [0]}]}
    content = {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": optimiser, "loss": 5.1}
    torch.save(content, folder / "published.pt")
    return folder / "published.pt"


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_import__the_same_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fidelity: Fidelity
) -> None:
    out = tmp_path / "ours.safetensors"
    with pytest.raises(SystemExit) as ended:
        cli.app(["weights", "import", "eyeclip", str(_published(tmp_path)), "--out", str(out)])
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "visual.decoder.mask_token -> decoder.mask_token" in told
    assert "70 tensors, 0 not used" in told

    saved = recipe_to_yaml(golden_recipe(fidelity)).replace("sources: []", "sources: [{shards: x}]")
    (tmp_path / "recipe.yaml").write_text(saved)
    overrides = [f"model.weights={json.dumps(str(out))}", "trainer.max_steps=99"]
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides, objective_config=config_of).recipe
    model = build_objective(recipe, VOCAB_SIZE).eval()
    arrays, _ = load_parts("eyeclip/total_loss_seed0")
    batch = golden_batch(arrays["caption_imgs"], tokens=arrays["caption_tokens"])
    with torch.no_grad():
        feature_BD = model.probe_features(batch.images)
        text_BD = model.embed_texts(batch.token_BT, batch.mask_BT, "")
    np.testing.assert_allclose(feature_BD, arrays["feat_img"], rtol=2e-4, atol=2e-5)
    wanted = arrays["feat_text"] / np.linalg.norm(arrays["feat_text"], axis=1, keepdims=True)
    np.testing.assert_allclose(text_BD, wanted, rtol=2e-4, atol=2e-5)


def test_decoder_positions__filled_where_the_published_code_left_zeros(tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    import_weights("eyeclip", _published(tmp_path), out)
    assert read_weights(out)["decoder.pos_embed"].equal(sincos_table(16, 4).float()[None])
    filled = torch.randn(1, 17, 16)
    import_weights("eyeclip", _published(tmp_path, **{"visual.decoder.decoder_pos_embed": filled}), out)
    assert read_weights(out)["decoder.pos_embed"].equal(filled)


def test_unknown_key__refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _published(tmp_path, **{"visual.decoder.extra": torch.zeros(1)})
    with pytest.raises(SystemExit) as ended:
        cli.app(["weights", "import", "eyeclip", str(file), "--out", str(tmp_path / "ours.safetensors")])
    assert ended.value.code == 2
    assert "visual.decoder.extra" in capsys.readouterr().err
    assert not (tmp_path / "ours.safetensors").exists()
