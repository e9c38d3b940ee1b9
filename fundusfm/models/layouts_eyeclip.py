"""The published layout of EyeCLIP: OpenAI's CLIP with a decoder inside its vision tower."""

from __future__ import annotations

import math

from torch import Tensor

from fundusfm.models.layout_rules import CLIP_VIT, Rule, leading_axes
from fundusfm.models.positions import sincos_table

_BLOCK = r"transformer\.resblocks\.(\d+)\."
_LAYER = r"text.trunk.encoder.layers.\1."


def _filled(table_1PD: Tensor) -> Tensor:
    """The decoder's positions, which the published code creates as zeros and never fills, as meant.

    Our `released` draws without positions, as that code does; `corrected` could not draw one patch unlike
    another without.
    """
    if table_1PD.any():
        return table_1PD
    _, num_positions, width = table_1PD.shape
    return sincos_table(width, math.isqrt(num_positions - 1)).to(table_1PD)[None]


_TEXT = [
    Rule(r"token_embedding\.weight", "text.trunk.embeddings.token_embedding.weight"),
    Rule(r"positional_embedding", "text.trunk.embeddings.position_embedding.weight"),
    Rule(
        rf"{_BLOCK}attn\.in_proj_(weight|bias)",
        tuple(rf"{_LAYER}self_attn.{part}_proj.\2" for part in "qkv"),
    ),
    Rule(rf"{_BLOCK}attn\.out_proj\.(weight|bias)", rf"{_LAYER}self_attn.out_proj.\2"),
    Rule(rf"{_BLOCK}ln_([12])\.(weight|bias)", rf"{_LAYER}layer_norm\2.\3"),
    Rule(rf"{_BLOCK}mlp\.c_fc\.(weight|bias)", rf"{_LAYER}mlp.fc1.\2"),
    Rule(rf"{_BLOCK}mlp\.c_proj\.(weight|bias)", rf"{_LAYER}mlp.fc2.\2"),
    Rule(r"ln_final\.(weight|bias)", r"text.trunk.final_layer_norm.\1"),
    Rule(r"text_projection", "text_head.weight", lambda tensor: tensor.T),
]
_DECODER = [
    Rule(r"visual\.decoder\.mask_token", "decoder.mask_token"),
    Rule(r"visual\.decoder\.decoder_pos_embed", "decoder.pos_embed", _filled),
    Rule(r"visual\.decoder\.decoder_blocks\.(.+)", r"decoder.blocks.\1"),
    Rule(r"visual\.decoder\.decoder_(embed|norm|pred)\.(weight|bias)", r"decoder.\1.\2"),
]
EYECLIP = [Rule(r"logit_scale", "log_scale", leading_axes(1)), *CLIP_VIT, *_DECODER, *_TEXT]
