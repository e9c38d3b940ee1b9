"""A light transformer that redraws hidden patches from the tokens of the visible ones.

Legend: as in `masked.py`, and V the decoder's width, L its tokens (class and all patches).
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fundusfm.models.masked import Masking


class PatchDecoder(nn.Module):
    """token_BSW of visible patches -> drawn_BPX of all patches.

    `width_in` W; `table_LV`: fixed positions, the class row first; `patch_numbers` X.
    """

    def __init__(
        self,
        width_in: int,
        table_LV: Tensor,
        patch_numbers: int,
        *,
        depth: int,
        heads: int,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width, norm = table_LV.shape[1], partial(nn.LayerNorm, eps=eps)
        self.embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # A parameter that is not trained, not a buffer: weight files hold it under this name.
        self.pos_embed = nn.Parameter(table_LV[None].clone(), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        self.pred = nn.Linear(width, patch_numbers)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, token_BSW: Tensor, masking: Masking) -> Tensor:
        token_BLV = self.reassemble(self.embed(token_BSW), masking) + self.pos_embed
        for block in self.blocks:
            token_BLV = block(token_BLV)
        drawn_BPX: Tensor = self.pred(self.norm(token_BLV)[:, 1:])
        return drawn_BPX

    def reassemble(self, token_BSV: Tensor, masking: Masking) -> Tensor:
        """The class token, then every patch in its place: its token, or the mask token where it is hidden."""
        most = masking.keep_BK.shape[1]
        patch_BKV = token_BSV[:, -most:]
        rank_BP1 = masking.restore_BP.clamp(max=most - 1)[..., None]
        placed_BPV = patch_BKV.gather(1, rank_BP1.expand(-1, -1, patch_BKV.shape[2]))
        filled_BPV = torch.where(masking.hidden_BP[..., None], self.mask_token.to(placed_BPV), placed_BPV)
        return torch.cat([token_BSV[:, :1], filled_BPV], dim=1)


def initialise(module: nn.Module) -> None:
    """MAE's start: Xavier-uniform matrices, no biases, norms that change nothing; tables are left alone."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.data.flatten(1))
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
