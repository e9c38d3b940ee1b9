"""Texts of mixed length side by side in as few rows as hold them, so that padding is not computed.

Each text attends to itself alone and keeps its own positions: its states are those that it has in a row of
its own. What is left over at the ends of rows attends to itself and is thrown away.

Legend: B texts, T tokens of the longest text, R rows of L places, P places of all rows (R x L), W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NOBODY = -1


def plan_rows(lengths: Sequence[int], size: int) -> tuple[list[int], list[int], int]:
    """For each text its row and its first place there, and the number of rows of `size` places.

    Longest first, each into the fullest row that still takes it.
    """
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]  # by places left
    num_rows = 0
    for text in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[text]
        left = next((left for left in range(length, size) if open_rows[left]), size)
        if left == size:
            open_rows[size].append(num_rows)
            num_rows += 1
        rows[text], starts[text] = open_rows[left].pop(), size - left
        open_rows[left - length].append(rows[text])
    return rows, starts, num_rows


@dataclass(frozen=True)
class Packed:
    """Texts in rows. `place_BT`: where each token of the padded texts lies among the P places, if anywhere.

    `token_RL` and `position_RL` go into a tower; `mask_R1LL` says who attends to whom.
    """

    token_RL: Tensor
    position_RL: Tensor
    mask_R1LL: Tensor
    place_BT: Tensor
    mask_BT: Tensor

    def first(self, state_RLW: Tensor) -> Tensor:
        """state_BW of the first token of each text."""
        return state_RLW.flatten(0, 1).index_select(0, self.place_BT[:, 0])

    def padded(self, state_RLW: Tensor) -> Tensor:
        """state_BTW of texts in rows of their own, 0 at padding."""
        state_BTW = state_RLW.flatten(0, 1)[self.place_BT]
        return state_BTW.masked_fill(~self.mask_BT[:, :, None], 0)


def pack(token_BT: Tensor, mask_BT: Tensor) -> Packed | None:
    """Padded texts, each with its first token at the left edge, as packed rows; None if that saves no row.

    Waits for the device once: the number of rows depends on the lengths.
    """
    lengths: list[int] = mask_BT.sum(dim=1).tolist()
    size = max(lengths, default=0)
    rows, starts, num_rows = plan_rows(lengths, size)
    if min(lengths, default=0) == 0 or num_rows == len(lengths):
        return None
    first_B = torch.tensor(rows, device=token_BT.device) * size + torch.tensor(starts, device=token_BT.device)
    # A token's place is the first of its text plus the number of tokens before it.
    place_BT = first_B[:, None] + (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    held_P, text_B1 = place_BT[mask_BT], torch.arange(len(lengths), device=token_BT.device)[:, None]
    column_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(token_BT)

    def laid_out(value_BT: Tensor, elsewhere: int) -> Tensor:
        value_P = token_BT.new_full((num_rows * size,), elsewhere)
        return value_P.index_copy(0, held_P, value_BT[mask_BT]).view(num_rows, size)

    owner_RL = laid_out(text_B1.expand_as(token_BT), _NOBODY)
    return Packed(
        token_RL=laid_out(token_BT, 0),
        position_RL=laid_out(column_BT, 0),
        mask_R1LL=(owner_RL[:, None, :] == owner_RL[:, :, None])[:, None],
        place_BT=place_BT,
        mask_BT=mask_BT,
    )
