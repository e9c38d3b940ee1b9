"""Vision towers by timm name: sizes, weights from a file, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fundusfm.errors import UserError
from fundusfm.models.vision import VisionTower, build_vision
from fundusfm.recipe.schema import VisionConfig

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _tower(image_size: int = 32, **config: Any) -> VisionTower:
    torch.manual_seed(0)
    return build_vision(VisionConfig(**{"options": SMALL, **config}), image_size, 16)


def _images(image_size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [
        ("vit_base_patch16_clip_quickgelu_224", SMALL, 32),
        ("resnetv2_18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}, 32),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 32),
    ],
)
def test_any_timm_name(name: str, options: dict[str, Any], width: int) -> None:
    tower = _tower(name=name, options=options)
    assert tower.width == width
    feature_ND = tower.eval()(_images())
    assert feature_ND.shape == (3, 16)
    torch.testing.assert_close(feature_ND, tower.trunk(_images()) @ tower.proj.weight.T)


def test_unknown_name__near_ones_named() -> None:
    with pytest.raises(UserError, match="vit_base_patch17") as refused:
        _tower(name="vit_base_patch17")
    assert "vit_base_patch16" in str(refused.value)


@pytest.mark.parametrize(
    ("image_size", "options"),
    [
        (32, {"embed_dim": 33, "num_heads": 2, "depth": 1, "patch_size": 8}),
        (32, {"no_such_option": 1}),
        (32, {"depth": "two"}),
    ],
)
def test_impossible_options__refused(image_size: int, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="timm cannot build"):
        _tower(image_size, options=options)


@pytest.mark.parametrize("image_size", [32, 64])
def test_weights__from_a_file_and_onto_another_grid(tmp_path: Path, image_size: int) -> None:
    trunk = build_vision(VisionConfig(options=SMALL), 32, 16).trunk
    # A timm file has a classifier, which the tower leaves out.
    state = {**trunk.state_dict(), "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    save_file(state, tmp_path / "trunk.safetensors")
    tower = _tower(image_size, weights=str(tmp_path / "trunk.safetensors"))
    for name, tensor in tower.trunk.state_dict().items():
        if image_size == 32 or name != "pos_embed":
            assert tensor.equal(trunk.state_dict()[name]), name
    assert tower.trunk.pos_embed.shape[1] == (image_size // 8) ** 2 + 1
    assert tower(_images(image_size)).isfinite().all()


@pytest.mark.parametrize("fault", ["missing", "spare", "shape"])
def test_wrong_weights__refused_by_name(tmp_path: Path, fault: str) -> None:
    state = dict(_tower().trunk.state_dict())
    if fault == "missing":
        del state["norm.weight"]
    elif fault == "spare":
        state["stem.weight"] = torch.zeros(2)
    else:
        state["norm.weight"] = torch.zeros(7)
    save_file(state, tmp_path / "trunk.safetensors")
    with pytest.raises(UserError, match="stem.weight" if fault == "spare" else r"norm\.weight"):
        _tower(weights=str(tmp_path / "trunk.safetensors"))


def test_gradient_checkpointing__the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        tower = _tower(gradient_checkpointing=checkpointing).train()
        assert tower.trunk.grad_checkpointing is checkpointing
        tower(_images()).square().sum().backward()
        grads.append({name: p.grad for name, p in tower.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


def test_projection__spread_of_the_published_one() -> None:
    tower = build_vision(VisionConfig(options={**SMALL, "embed_dim": 64}), 32, 512)
    assert tower.proj.bias is None
    assert tower.proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)
