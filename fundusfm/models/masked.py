"""Masked patches: which are hidden, tokens of the visible ones from any timm vision transformer, and pixels.

Hidden patches are never computed: not even their pixels are looked at. The transformer stays a plain timm
trunk, which other objectives may read whole images with.

Legend: B images, P patches, K patches kept (the most that any image keeps), R the trunk's own leading tokens
(class, registers), W width, X numbers in a patch, C H W channels and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundusfm.errors import UserError

_EPS = 1e-6


@dataclass(frozen=True)
class Masking:
    """Which patches of a batch are hidden.

    `keep_BK`: the kept patches in ascending order of their noise; `valid_BK` false in places that an image
    which keeps fewer has over (they repeat its first), None if every image keeps K. `restore_BP`: the rank of
    each patch's noise. `hidden_BP`: what is to be found out.
    """

    keep_BK: Tensor
    valid_BK: Tensor | None
    restore_BP: Tensor
    hidden_BP: Tensor


def num_kept(num_patches: int, ratio: float) -> int:
    """How many patches stay visible at a mask ratio, rounded as the published codes do, in binary numbers."""
    return int(num_patches * (1 - ratio))


def hide_patches(noise_BP: Tensor, kept: Sequence[int], kind_B: Tensor | None = None) -> Masking:
    """Keep the patches of lowest noise. `kept`: how many, by kind of image; `kind_B`: the kind of each."""
    order_BP = noise_BP.argsort(dim=1, stable=True)
    restore_BP = order_BP.argsort(dim=1)
    if len(set(kept)) == 1:
        return Masking(order_BP[:, : kept[0]], None, restore_BP, restore_BP >= kept[0])
    assert kind_B is not None, "images of several kinds must say which they are of"
    kept_B1 = torch.tensor(kept, device=noise_BP.device)[kind_B][:, None]
    most = max(kept)
    valid_BK = torch.arange(most, device=noise_BP.device) < kept_B1
    keep_BK = torch.where(valid_BK, order_BP[:, :most], order_BP[:, :1])
    return Masking(keep_BK, valid_BK, restore_BP, restore_BP >= kept_B1)


def masked_trunk(trunk: nn.Module, where: str) -> VisionTransformer:
    """`trunk` if patches can be hidden from it, else UserError that names `where` it was chosen."""
    known = isinstance(trunk, VisionTransformer) and trunk.pos_embed is not None
    if known and trunk.cls_token is not None and isinstance(trunk.norm, nn.LayerNorm):
        return trunk
    raise UserError(
        "patches can only be hidden from a plain vision transformer with a class token, a position table and "
        "a norm after its blocks",
        where=where,
        fix="choose a timm vit_* that pools by its class token, for example vit_large_patch16_224",
    )


def visible_tokens(trunk: VisionTransformer, image_BCHW: Tensor, masking: Masking) -> Tensor:
    """Tokens (B, R + K, W): the leading ones, then the kept patches by rising noise; normalised."""
    count, num_leading = len(image_BCHW), trunk.num_prefix_tokens
    leading_BRW, position_PW = _leading_and_positions(trunk, count)
    patch_px = trunk.patch_embed.patch_size[0]
    pixel_BPX = rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_px, q=patch_px)
    kept_BKX = pixel_BPX.gather(1, masking.keep_BK[..., None].expand(-1, -1, pixel_BPX.shape[2]))
    # The patch convolution as the matrix product that it is.
    kernel = trunk.patch_embed.proj
    patch_BKW = trunk.patch_embed.norm(F.linear(kept_BKX, kernel.weight.flatten(1), kernel.bias))
    # Not `position_PW[...]`, whose gradient CPU threads add up in no fixed order: no run could be repeated.
    patch_BKW = patch_BKW + F.embedding(masking.keep_BK, position_PW)
    token_BSW = trunk.norm_pre(trunk.pos_drop(torch.cat([leading_BRW.to(patch_BKW), patch_BKW], dim=1)))
    options: dict[str, Any] = {}
    if masking.valid_BK is not None:
        seen_BS = F.pad(masking.valid_BK, (num_leading, 0), value=True)
        options["attn_mask"] = seen_BS[:, None, None]
    for block in trunk.blocks:
        if trunk.grad_checkpointing and torch.is_grad_enabled():
            token_BSW = checkpoint(block, token_BSW, use_reentrant=False, **options)
        else:
            token_BSW = block(token_BSW, **options)
    normalised_BSW: Tensor = trunk.norm(token_BSW)
    return normalised_BSW


def _leading_and_positions(trunk: VisionTransformer, count: int) -> tuple[Tensor, Tensor]:
    """The leading tokens of `count` images with their positions, and the positions of patches (P, W)."""
    leading = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    leading_1RW, table_PW = torch.cat(leading, dim=1), trunk.pos_embed[0]
    if not trunk.no_embed_class:
        num_leading = leading_1RW.shape[1]
        leading_1RW, table_PW = leading_1RW + table_PW[:num_leading], table_PW[num_leading:]
    return leading_1RW.expand(count, -1, -1), table_PW


def mean_of_patches(patch_BKW: Tensor, masking: Masking) -> Tensor:
    """Mean (B, W) of what stands for an image's kept patches."""
    if masking.valid_BK is None:
        return patch_BKW.mean(dim=1)
    valid_BK1 = masking.valid_BK[..., None]
    return torch.where(valid_BK1, patch_BKW, 0).sum(dim=1) / valid_BK1.sum(dim=1)


def patchify(image_BCHW: Tensor, patch_px: int) -> Tensor:
    """Patches (B, P, X), row by row; in each the channel runs fastest, then the column."""
    return rearrange(image_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_px, q=patch_px)


def unpatchify(patch_BPX: Tensor, patch_px: int) -> Tensor:
    """The square images (B, C, H, W) that `patchify` cut."""
    side = round(patch_BPX.shape[1] ** 0.5)
    return rearrange(patch_BPX, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch_px, q=patch_px)


def patch_scale(patch_BPX: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, P, 1) of each patch: unbiased variance, kept off 0."""
    variance_BP1 = patch_BPX.var(dim=-1, keepdim=True)
    return patch_BPX.mean(dim=-1, keepdim=True), (variance_BP1 + _EPS).sqrt()


def normalised(patch_BPX: Tensor) -> Tensor:
    """Each patch brought to mean 0 and deviation 1, as a target: structure counts, brightness does not."""
    mean_BP1, std_BP1 = patch_scale(patch_BPX)
    return (patch_BPX - mean_BP1) / std_BP1
