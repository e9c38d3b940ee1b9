"""Files in FLAIR's and KeepFIT's layout, against torchvision's and transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from transformers import BertConfig, BertModel

from fundusfm.errors import UserError
from fundusfm.models.published import import_weights
from fundusfm.objectives import build_objective, config_of
from fundusfm.recipe.load import load_recipe
from tests.recipe.test_recipes import RECIPES

VOCAB_SIZE, EMBED_DIM, WIDTH = 60, 16, 32
SMALL = (
    f"model.embed_dim={EMBED_DIM}",
    f"model.text={{layers: 3, width: {WIDTH}, heads: 4, mlp_width: 48, max_positions: 20, dropout: 0.0}}",
    "data.context_length=12",
    "data.image_size=64",
)


class Published(nn.Module):
    """The modules that the authors' code is made of, under the names of its files."""

    def __init__(self, system: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logit_scale = nn.Parameter(torch.tensor(3.1))
        config = BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=20,
        )
        vision, text = resnet50(), BertModel(config)
        vision.fc = nn.Identity()
        self.vision_model, self.text_model = nn.Module(), nn.Module()
        self.vision_model.model, self.text_model.model = vision, text
        self.vision_model.projection_head_vision = nn.Module()
        self.vision_model.projection_head_vision.projection = nn.Linear(2048, EMBED_DIM, bias=False)
        self.text_model.projection_head_text = nn.Module()
        self.text_model.projection_head_text.projection = nn.Linear(WIDTH, EMBED_DIM, bias=False)
        if system == "keepfit":
            self.attention = nn.Module()
            for name in "qkvo":
                setattr(self.attention, f"W_{name}", nn.Linear(EMBED_DIM, EMBED_DIM, bias=False))

    def images(self, image_NCHW: Tensor) -> Tensor:
        head = self.vision_model.projection_head_vision.projection
        return F.normalize(head(F.normalize(self.vision_model.model(image_NCHW), dim=-1)), dim=-1)

    def texts(self, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
        states = self.text_model.model(token_BT, mask_BT, output_hidden_states=True).hidden_states
        mean = torch.stack([states[k].mean(1) for k in (1, 2, -1)]).mean(0)
        return F.normalize(self.text_model.projection_head_text.projection(F.normalize(mean, dim=-1)), dim=-1)


def _file(folder: Path, published: Published, more: dict[str, Tensor] | None = None) -> Path:
    state = {f"module.{name}": tensor for name, tensor in published.state_dict().items()}
    state["module.text_model.model.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save(state | (more or {}), folder / "published.pth")
    return folder / "published.pth"


@pytest.mark.parametrize("system", ["flair", "keepfit"])
def test_import__the_same_features(tmp_path: Path, system: str) -> None:
    published, out = Published(system).eval(), tmp_path / "ours.safetensors"
    audit = import_weights(system, _file(tmp_path, published), out)
    assert not audit.unexplained
    assert len(audit.ignored) == 3
    overrides = [*SMALL, f"model.weights={out}", "objective.fidelity=released"]
    recipe = load_recipe(RECIPES / f"{system}.yaml", overrides, objective_config=config_of).recipe
    model = build_objective(recipe, VOCAB_SIZE).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    token_BT = torch.randint(1, VOCAB_SIZE, (3, 9), generator=generator)
    mask_BT = torch.arange(9) < torch.tensor([[9], [4], [6]])
    with torch.no_grad():
        torch.testing.assert_close(
            model.embed_images(images, ""), published.images(images), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            model.embed_texts(token_BT, mask_BT, ""), published.texts(token_BT, mask_BT), rtol=1e-4, atol=1e-5
        )
        pooled = published.vision_model.model(images)
        torch.testing.assert_close(model.probe_features(images), pooled, rtol=1e-4, atol=1e-5)
    assert model.state_dict()["log_scale"].item() == pytest.approx(3.1)
    for name in "qkvo" if system == "keepfit" else "":
        found = model.state_dict()[f"revision.{name}.weight"]
        assert found.equal(published.state_dict()[f"attention.W_{name}.weight"])


def test_flair__reads_a_keepfit_file_without_its_attention(tmp_path: Path) -> None:
    audit = import_weights("flair", _file(tmp_path, Published("keepfit")), tmp_path / "ours.safetensors")
    assert sum("attention.W_" in name for name in audit.ignored) == 4


@pytest.mark.parametrize(
    "name", ["vision_model.model.fc.weight", "vision_model.model.layer5.0.conv1.weight", "extra"]
)
def test_anything_else__refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"1 keys are not those of flair: {name}"):
        import_weights("flair", _file(tmp_path, Published("flair"), {name: torch.zeros(1)}), tmp_path / "out")
