"""Features of earlier batches, without gradient: a window of the newest rows.

Legend: M rows the bank can hold, n new ones, D shared width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FeatureBank(nn.Module):
    """The last M pairs of rows that were pushed.

    Its content is no weight: it is not in the state dict, but in `content`, for checkpoints.
    """

    image_MD: Tensor
    text_MD: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        for name in ("image_MD", "text_MD"):
            self.register_buffer(name, torch.zeros(size, width), persistent=False)
        self.num_pushed = 0

    def rows(self) -> tuple[Tensor, Tensor]:
        """Images and texts that are there."""
        filled = min(self.num_pushed, len(self.image_MD))
        return self.image_MD[:filled], self.text_MD[:filled]

    def push(self, image_nD: Tensor, text_nD: Tensor) -> None:
        """New rows in place of the oldest; of more than the bank can hold the last."""
        size = len(self.image_MD)
        start = self.num_pushed + max(0, len(image_nD) - size)
        self.num_pushed += len(image_nD)
        place = torch.arange(start, self.num_pushed, device=self.image_MD.device) % size
        for bank_MD, rows_nD in ((self.image_MD, image_nD), (self.text_MD, text_nD)):
            bank_MD[place] = rows_nD[len(rows_nD) - len(place) :].to(bank_MD.dtype)

    def content(self) -> dict[str, Any]:
        """What must be kept to go on as if nothing had happened."""
        return {"image": self.image_MD.cpu(), "text": self.text_MD.cpu(), "num_pushed": self.num_pushed}

    def restore(self, content: dict[str, Any]) -> None:
        """Back to what `content` gave."""
        self.image_MD.copy_(content["image"])
        self.text_MD.copy_(content["text"])
        self.num_pushed = content["num_pushed"]
