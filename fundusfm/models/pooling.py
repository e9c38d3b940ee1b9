"""A text tower that speaks by the mean of its words over several layers, as FLAIR's does.

Legend: B texts, T tokens, W encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fundusfm.errors import UserError
from fundusfm.models.text import TextTower

# Of the encoder's states: after its first and second layer and after the last; 0 would be the embeddings.
LAYERS = (1, 2, -1)


def mean_of_words(state_BTW: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The mean (B, W) over the positions of the text, or over all, padding included, without a mask."""
    if mask_BT is None:
        return state_BTW.mean(dim=1)
    share_BT = mask_BT.to(state_BTW.dtype) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("btw,bt->bw", state_BTW, share_BT)


def mean_of_layers(states: Sequence[Tensor], mask_BT: Tensor | None) -> Tensor:
    """Mean of the words, then of the layers `LAYERS`, (B, W); `states` are (B, T, W), embeddings first."""
    return torch.stack([mean_of_words(states[layer], mask_BT) for layer in LAYERS]).mean(dim=0)


class PooledTextTower(TextTower):
    """token_BT, mask_BT -> state_BW, the mean of words of several layers of an encoder.

    `masked`: padding does not count. Without, a text's state depends on the longest text beside it.
    """

    def __init__(self, trunk: PreTrainedModel, *, masked: bool) -> None:
        super().__init__(trunk)
        self._masked = masked
        depth: Any = getattr(trunk.config, "num_hidden_layers", 0)
        if depth < 2:
            raise UserError(
                f"the text tower has {depth} layers, and its first two and its last speak for a text",
                where="model.text.layers",
                fix="use 2 or more",
            )

    def forward(self, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
        if self._masked:
            return mean_of_layers(self.states(token_BT, mask_BT), mask_BT)
        read = self.trunk(input_ids=token_BT, attention_mask=mask_BT, output_hidden_states=True)
        return mean_of_layers(read.hidden_states, None)
