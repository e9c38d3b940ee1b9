"""Masked patches against the published masked autoencoder: indices, tokens, pictures, losses, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.losses import patch_loss
from fundusfm.models.decoder import PatchDecoder, initialise
from fundusfm.models.masked import (
    hide_patches,
    masked_trunk,
    mean_of_patches,
    normalised,
    num_kept,
    patchify,
    unpatchify,
    visible_tokens,
)
from fundusfm.models.positions import sincos_table
from tests.goldens import load

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def _trunk(name: str = "vit_base_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    trunk = timm.create_model(name, pretrained=False, num_classes=0, **{**SIZES, **options})
    return masked_trunk(trunk, "here")


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("case", range(8))
def test_golden__random_masking(case: int) -> None:
    arrays, told = load("mae/random_masking")
    golden = {
        k.removeprefix(f"c{case}_"): v for k, v in _tensors(arrays).items() if k.startswith(f"c{case}_")
    }
    facts = told["cases"][case]
    kept = num_kept(facts["L"], facts["mask_ratio"])
    assert kept == facts["len_keep"]
    masking = hide_patches(golden["noise"], [kept])
    assert masking.valid_BK is None
    assert masking.keep_BK.equal(golden["ids_keep"])
    assert masking.restore_BP.equal(golden["ids_restore"])
    assert masking.hidden_BP.equal(golden["mask"].bool())
    kept = golden["x"].gather(1, masking.keep_BK[..., None].expand(-1, -1, golden["x"].shape[2]))
    assert kept.equal(golden["x_visible"])


def test_golden__decoder_reassembly() -> None:
    golden = _tensors(load("mae/decoder_reassembly")[0])
    masking = hide_patches(golden["noise"], [num_kept(16, 0.75)])
    assert masking.restore_BP.equal(golden["ids_restore"])
    assert masking.hidden_BP.equal(golden["mask"].bool())
    decoder = PatchDecoder(16, torch.zeros(17, 16), 3, depth=0, heads=1)
    decoder.mask_token.data = golden["mask_token"]
    kept = golden["x"].gather(1, masking.keep_BK[..., None].expand(-1, -1, 16))
    found = decoder.reassemble(torch.cat([golden["cls"], kept], dim=1), masking)
    assert found[:, :1].equal(golden["cls"])
    assert found[:, 1:].equal(golden["out"])


def test_golden__patches_and_loss() -> None:
    golden = _tensors(load("mae/masked_loss_seed0")[0])
    patches = patchify(golden["imgs"], 8)
    assert patches.equal(golden["patches"])
    assert unpatchify(patches, 8).equal(golden["unpatchified"])
    flat = patchify(golden["imgs_flatpatch"], 8)
    targets = {"raw": patches, "normpix": normalised(patches)}
    hidden = golden["mask"].bool()
    for name, target in targets.items():
        drawn = golden["pred"].clone().requires_grad_()
        loss = patch_loss(drawn, target, hidden)
        loss.backward()
        torch.testing.assert_close(loss, golden[f"loss_{name}"], rtol=1e-6, atol=0)
        torch.testing.assert_close(drawn.grad, golden[f"grad_pred_{name}"], rtol=1e-5, atol=1e-8)
    flat_losses = {"raw_flatpatch": flat, "normpix_flatpatch": normalised(flat)}
    for name, target in flat_losses.items():
        loss = patch_loss(golden["pred"], target, hidden)
        torch.testing.assert_close(loss, golden[f"loss_{name}"], rtol=1e-6, atol=0)


def _golden_model(golden: dict[str, Tensor]) -> tuple[nn.Module, PatchDecoder]:
    trunk, decoder = _trunk(), PatchDecoder(32, sincos_table(16, 4).float(), 192, depth=1, heads=2)
    weights = {k.removeprefix("w."): v for k, v in golden.items() if k.startswith("w.")}
    assert sincos_table(32, 4).float().allclose(weights["pos_embed"][0], atol=1e-6)
    assert decoder.pos_embed.allclose(weights["decoder_pos_embed"], atol=1e-6)
    is_drawn = {k for k in weights if k.startswith(("decoder_", "mask_token"))}
    trunk.load_state_dict({k: v for k, v in weights.items() if k not in is_drawn})
    decoder.load_state_dict({k.removeprefix("decoder_"): weights[k] for k in is_drawn})
    return trunk, decoder


def test_golden__forward_and_every_gradient() -> None:
    golden = _tensors(load("mae/tiny_mae_seed0")[0])
    trunk, decoder = _golden_model(golden)
    masking = hide_patches(golden["noise"], [num_kept(16, 0.75)])
    assert masking.hidden_BP.equal(golden["mask"].bool())
    assert masking.restore_BP.equal(golden["ids_restore"])
    latent = visible_tokens(trunk, golden["imgs"], masking)
    torch.testing.assert_close(latent, golden["latent"], rtol=1e-5, atol=1e-5)
    drawn = decoder(latent, masking)
    torch.testing.assert_close(drawn, golden["pred"], rtol=1e-5, atol=1e-5)
    target = patchify(golden["imgs"], 8)
    raw = patch_loss(drawn, target, masking.hidden_BP)
    torch.testing.assert_close(raw, golden["loss_raw"], rtol=1e-5, atol=0)
    loss = patch_loss(drawn, normalised(target), masking.hidden_BP)
    torch.testing.assert_close(loss, golden["loss_normpix"], rtol=1e-5, atol=0)
    loss.backward()
    ours = {n: p.grad for n, p in trunk.named_parameters()}
    ours |= {f"decoder_{n}": p.grad for n, p in decoder.named_parameters()}
    ours["mask_token"] = ours.pop("decoder_mask_token")
    theirs = {k.removeprefix("g."): v for k, v in golden.items() if k.startswith("g.")}
    assert len(theirs) > 40
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("vit_base_patch16_224", {"reg_tokens": 2}),
        ("vit_base_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    ],
)
def test_nothing_hidden__the_trunk_itself(name: str, options: dict[str, Any]) -> None:
    """With every patch kept and in place, tokens are those that timm computes."""
    trunk = _trunk(name, **options).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    masking = hide_patches(torch.arange(16.0).expand(2, -1), [16])
    found = visible_tokens(trunk, images, masking)
    torch.testing.assert_close(found, trunk.forward_features(images), rtol=1e-10, atol=1e-12)


def test_hidden_pixels__never_looked_at() -> None:
    """Not even a number that would spoil all it touches comes through; of two kinds of image likewise."""
    trunk, kind_B = _trunk().double(), torch.tensor([0, 1, 0])
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for kept in ([4, 4], [4, 2]):
        masking = hide_patches(torch.rand(3, 16), kept, kind_B)
        patches = patchify(images, 8)
        spoilt = unpatchify(patches.masked_fill(masking.hidden_BP[..., None], torch.nan), 8)
        assert visible_tokens(trunk, spoilt, masking).equal(visible_tokens(trunk, images, masking))


def test_gradient_of_positions__the_same_every_time() -> None:
    """On two threads, or no run of them could be repeated bit for bit."""
    trunk = _trunk(img_size=96, embed_dim=192, depth=1)
    images, masking = torch.randn(32, 3, 96, 96), hide_patches(torch.rand(32, 144), [72])
    weight = torch.randn(32, 73, 192)

    def grad() -> Tensor:
        return torch.autograd.grad((visible_tokens(trunk, images, masking) * weight).sum(), trunk.pos_embed)[
            0
        ]

    torch.set_num_threads(2)
    try:
        first = grad()
        assert all(grad().equal(first) for _ in range(10))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_kinds__each_as_if_alone(checkpointing: bool) -> None:
    """Tokens, pictures and gradients of images that keep different numbers of patches in one batch."""
    trunk, noise, kind_B = _trunk().double(), torch.rand(4, 16), torch.tensor([0, 1, 1, 0])
    trunk.set_grad_checkpointing(checkpointing)
    decoder = PatchDecoder(32, sincos_table(16, 4), 192, depth=1, heads=2).double()
    images, kept = torch.randn(4, 3, 32, 32, dtype=torch.float64), [4, 2]
    both = [*trunk.parameters(), *decoder.parameters()]

    def grads(loss: Tensor) -> list[Tensor]:
        trained = [p for p in both if p.requires_grad]
        return [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]

    masking = hide_patches(noise, kept, kind_B)
    tokens = visible_tokens(trunk, images, masking)
    drawn, mean = decoder(tokens, masking), mean_of_patches(tokens[:, 1:], masking)
    together, apart = drawn.square().sum() + mean.sum(), torch.zeros(())
    for row in range(4):
        own = hide_patches(noise[row, None], [kept[int(kind_B[row])]])
        own_tokens = visible_tokens(trunk, images[row, None], own)
        own_drawn, own_mean = decoder(own_tokens, own), mean_of_patches(own_tokens[:, 1:], own)
        torch.testing.assert_close(drawn[row, None], own_drawn, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(mean[row, None], own_mean, rtol=1e-9, atol=1e-11)
        apart = apart + own_drawn.square().sum() + own_mean.sum()
    for one, other in zip(grads(together), grads(apart), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_initialise__matrices_of_the_right_spread() -> None:
    trunk = _trunk()
    initialise(trunk)
    kernel = trunk.patch_embed.proj.weight
    bound = (6 / (32 + 3 * 64)) ** 0.5
    assert 0.95 * bound < kernel.abs().max() <= bound
    assert all(not m.bias.any() for m in trunk.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_small_patch14_reg4_dinov2.lvd142m", "vit_pe_core_tiny_patch16_384"]
)
def test_trunk__only_plain_transformers(name: str) -> None:
    trunk = timm.create_model(name, pretrained=False, num_classes=0)
    if name.startswith("vit_small"):
        assert masked_trunk(trunk, "here") is trunk
    else:
        with pytest.raises(UserError, match="plain vision transformer"):
            masked_trunk(trunk, "model.vision.name")
