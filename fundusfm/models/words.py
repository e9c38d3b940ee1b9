"""Hidden words: which, what a text tower reads in their place, and scores of the vocabulary where they were.

Legend: B texts, T tokens, F width of the text tower, H places that are scored, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.models.text import TextTower


def hide_words(draw_BT: Tensor, word_BT: Tensor, probability: float) -> Tensor:
    """Which tokens (B, T) are hidden: all pieces of a word or none.

    `draw_BT`: a number in [0, 1) for each word of a text, in its order; hidden below `probability`.
    `word_BT`: the word that a token is a piece of, -1 for tokens that are never hidden.
    """
    draw_of_word_BT = draw_BT.gather(1, word_BT.clamp(min=0))
    return (word_BT >= 0) & (draw_of_word_BT < probability)


def with_end_token(word_BT: Tensor, mask_BT: Tensor, length: int) -> Tensor:
    """The last token of each text made a word of its own, but for one in the last of `length` places.

    As UrFound's code does, which may hide the end token, but stops before the last column.
    """
    last_B1 = mask_BT.sum(dim=1, keepdim=True) - 1
    next_word_B1 = word_BT.amax(dim=1, keepdim=True) + 1
    own_B1 = next_word_B1.where((last_B1 < length - 1) & (last_B1 > 0), -1)
    return word_BT.scatter(1, last_B1.clamp(min=0), own_B1)


def read_with(tower: TextTower, token_BT: Tensor, mask_BT: Tensor, image_BF: Tensor) -> Tensor:
    """States (B, T, F) of a text whose every embedding has the same vector of its image added to it."""

    def add_image(module: nn.Module, arguments: Any, embedded_BTF: Tensor) -> Tensor:
        return embedded_BTF + image_BF[:, None].to(embedded_BTF)

    # After the norm and dropout of the embedding layer, where the tower takes no input of its own.
    embeddings: Any = tower.trunk.embeddings
    hook = embeddings.register_forward_hook(add_image)
    try:
        state_BTF: Tensor = tower.trunk(input_ids=token_BT, attention_mask=mask_BT).last_hidden_state
    finally:
        hook.remove()
    return state_BTF


class WordScores(nn.Module):
    """state_HF -> logits_HV, as BERT's head for hidden words; its matrix is not the table of words."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.scores = nn.Linear(width, vocab_size)
        for layer in (self.dense, self.scores):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, state_HF: Tensor) -> Tensor:
        logits_HV: Tensor = self.scores(self.norm(F.gelu(self.dense(state_HF))))
        return logits_HV
