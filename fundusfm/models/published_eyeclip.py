"""How the published EyeCLIP code redraws patches, fault for fault.

Legend: B images, P patches, K patches kept, V the decoder's width, L its tokens, X numbers in a patch, C H W
channels and pixels.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fundusfm.models.decoder import PatchDecoder
from fundusfm.models.masked import Masking


def draw_as_published(
    trunk: VisionTransformer, decoder: PatchDecoder, image_BCHW: Tensor, masking: Masking
) -> Tensor:
    """Drawn patches (B, P, X).

    The encoder reads all patches, without class token, positions or final norm; only then are some hidden.
    The decoder takes the first kept patch for a class token, so that each of the others stands where the one
    kept before it belongs and the place of the last is left to a mask token. Its positions are zeros: nothing
    tells one hidden place from another, and all of an image's hidden patches come out the same.
    """
    token_BPW = all_tokens(trunk, image_BCHW)
    kept_BKW = token_BPW.gather(1, masking.keep_BK[..., None].expand(-1, -1, token_BPW.shape[2]))
    token_BLV = shifted(decoder, decoder.embed(kept_BKW), masking)
    for block in decoder.blocks:
        token_BLV = block(token_BLV)
    drawn_BPX: Tensor = decoder.pred(decoder.norm(token_BLV)[:, 1:])
    return drawn_BPX


def all_tokens(trunk: VisionTransformer, image_BCHW: Tensor) -> Tensor:
    """Tokens (B, P, W) of all patches, without class token, positions and final norm."""
    token_BPW: Tensor = trunk.norm_pre(trunk.patch_embed(image_BCHW))
    for block in trunk.blocks:
        if trunk.grad_checkpointing and torch.is_grad_enabled():
            token_BPW = checkpoint(block, token_BPW, use_reentrant=False)
        else:
            token_BPW = block(token_BPW)
    return token_BPW


def shifted(decoder: PatchDecoder, kept_BKV: Tensor, masking: Masking) -> Tensor:
    """What enters the decoder (B, 1 + P, V)."""
    count, num_kept = kept_BKV.shape[:2]
    num_hidden = masking.restore_BP.shape[1] + 1 - num_kept
    hidden_BHV = decoder.mask_token.to(kept_BKV).expand(count, num_hidden, -1)
    ranked_BPV = torch.cat([kept_BKV[:, 1:], hidden_BHV], dim=1)
    placed_BPV = ranked_BPV.gather(1, masking.restore_BP[..., None].expand(-1, -1, kept_BKV.shape[2]))
    return torch.cat([kept_BKV[:, :1], placed_BPV], dim=1)
