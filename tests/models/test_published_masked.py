"""Published files of RETFound, with a decoder or without, and of UrFound give the reference features."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fundusfm import cli
from fundusfm.models.masked import hide_patches, visible_tokens
from fundusfm.models.published import import_weights
from fundusfm.objectives import build_objective, config_of
from fundusfm.objectives.mae import Mae
from fundusfm.objectives.urfound import UrFound
from fundusfm.recipe.load import load_recipe, recipe_to_yaml
from tests.goldens import load
from tests.objectives.tiny_masked import GOLDEN_SIZES, VOCAB_SIZE, image_batch, masked_recipe

GOLDEN = {name: torch.from_numpy(array) for name, array in load("mae/tiny_mae_seed0")[0].items()}
PUBLISHED = {k.removeprefix("w."): v for k, v in GOLDEN.items() if k.startswith("w.")}


def _is_of_decoder(name: str) -> bool:
    return name.startswith(("decoder_", "mask_token"))


def _imported(folder: Path, tensors: dict[str, Tensor], *overrides: str) -> Mae:
    """Through the command line and a recipe, from a checkpoint as the authors' code writes it."""
    content = {"model": tensors, "epoch": 799, "scaler": {"scale": 1.0}, "args": Namespace(mask_ratio=0.75)}
    torch.save(content, folder / "published.pth")
    out = folder / "ours.safetensors"
    with pytest.raises(SystemExit) as ended:
        cli.app(["weights", "import", "retfound", str(folder / "published.pth"), "--out", str(out)])
    assert not ended.value.code
    text = recipe_to_yaml(masked_recipe("mae", GOLDEN_SIZES)).replace("sources: []", "sources: [{shards: x}]")
    (folder / "recipe.yaml").write_text(text)
    chosen = [f"model.weights={json.dumps(str(out))}", *overrides]
    recipe = load_recipe(folder / "recipe.yaml", chosen, objective_config=config_of).recipe
    objective = build_objective(recipe, 0)
    assert isinstance(objective, Mae)
    return objective.eval()


def test_import__the_same_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = _imported(tmp_path, PUBLISHED)
    told = capsys.readouterr().out
    assert "decoder_pred.weight -> decoder.pred.weight" in told
    assert f"{len(PUBLISHED)} tensors, 0 not used" in told
    assert objective.fresh == []
    batch = image_batch(GOLDEN["imgs"])
    masking = hide_patches(GOLDEN["noise"], objective.kept, batch.modality_B)
    monkeypatch.setattr(objective, "masking", lambda _: masking)
    loss = objective.terms_of(objective.encode(batch))["loss_patches"]
    torch.testing.assert_close(loss, GOLDEN["loss_normpix"], rtol=1e-5, atol=0)


def test_encoder_alone__a_fresh_decoder_said_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = {name: tensor for name, tensor in PUBLISHED.items() if not _is_of_decoder(name)}
    objective = _imported(tmp_path, encoder)
    assert "decoder: not in the file" in capsys.readouterr().out
    assert {name.partition(".")[0] for name in objective.fresh} == {"decoder"}
    assert len(objective.fresh) == len(objective.decoder.state_dict())
    whole = _imported(tmp_path, PUBLISHED)
    images = GOLDEN["imgs"]
    assert objective.probe_features(images).equal(whole.probe_features(images))


def test_larger_images__table_moved_as_the_authors_do(tmp_path: Path) -> None:
    encoder = {name: tensor for name, tensor in PUBLISHED.items() if not _is_of_decoder(name)}
    objective = _imported(tmp_path, encoder, "data.image_size=48")
    grid = PUBLISHED["pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    moved = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    found = objective.trunk.pos_embed[:, 1:].detach()
    torch.testing.assert_close(found, moved.permute(0, 2, 3, 1).flatten(1, 2), rtol=1e-6, atol=1e-6)


def _urfound_file(num_words: int) -> dict[str, Tensor]:
    """The published layout: the golden encoder and decoder under their names, a small BERT under its own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    body = "bert_encoder.model.bert."
    file = {**PUBLISHED, "decoder_pred.weight": random(768, 16), "decoder_pred.bias": random(768)}
    file |= {"bert_mlp.weight": random(24, 32), "bert_mlp.bias": random(24)}
    tables = {"word": num_words, "position": 12, "token_type": 2}
    file |= {f"{body}embeddings.{name}_embeddings.weight": random(n, 24) for name, n in tables.items()}
    file[f"{body}embeddings.position_ids"] = torch.arange(12)[None]
    layers = {
        "attention.self.query": (24, 24),
        "attention.self.key": (24, 24),
        "attention.self.value": (24, 24),
    }
    layers |= {"attention.output.dense": (24, 24), "intermediate.dense": (48, 24), "output.dense": (24, 48)}
    named = {f"encoder.layer.{k}.{name}": shape for k in range(2) for name, shape in layers.items()}
    named["pooler.dense"] = (24, 24)
    for name, shape in named.items():
        file |= {f"{body}{name}.weight": random(*shape), f"{body}{name}.bias": random(shape[0])}
    norms = [f"encoder.layer.{k}.{part}output.LayerNorm" for k in range(2) for part in ("attention.", "")]
    for name in ("embeddings.LayerNorm", *norms):
        file |= {f"{body}{name}.weight": random(24), f"{body}{name}.bias": random(24)}
    head = "bert_encoder.model.cls.predictions."
    file |= {f"{head}transform.dense.weight": random(24, 24), f"{head}transform.dense.bias": random(24)}
    file |= {f"{head}transform.LayerNorm.weight": random(24), f"{head}transform.LayerNorm.bias": random(24)}
    file |= {f"{head}decoder.weight": random(num_words, 24), f"{head}decoder.bias": random(num_words)}
    return {**file, f"{head}bias": file[f"{head}decoder.bias"]}


def test_urfound__every_key_and_the_reference_tokens(tmp_path: Path) -> None:
    """Its vocabulary ends before the tokenizer's: the rest of the table keeps its start."""
    published = _urfound_file(num_words=30)
    torch.save({"model": published}, tmp_path / "published.pth")
    audit = import_weights("urfound", tmp_path / "published.pth", tmp_path / "ours.safetensors")
    assert audit.absent == []
    assert len(audit.ignored) == 4  # the pooler, position numbers, and a bias that is there twice
    assert len(audit.matched) == len(published) - 4
    recipe = masked_recipe("urfound", GOLDEN_SIZES)
    recipe.model.weights = str(tmp_path / "ours.safetensors")
    objective = build_objective(recipe, VOCAB_SIZE).eval()
    assert isinstance(objective, UrFound)
    assert objective.fresh == []
    masking = hide_patches(GOLDEN["noise"], objective.kept[:1])
    found = visible_tokens(objective.trunk, GOLDEN["imgs"], masking)
    torch.testing.assert_close(found, GOLDEN["latent"], rtol=1e-5, atol=1e-5)
    state = objective.state_dict()
    rows = state["text.trunk.embeddings.word_embeddings.weight"]
    assert rows[:30].equal(published["bert_encoder.model.bert.embeddings.word_embeddings.weight"])
    assert len(rows) == VOCAB_SIZE
    assert state["words.scores.weight"][:30].equal(
        published["bert_encoder.model.cls.predictions.decoder.weight"]
    )
