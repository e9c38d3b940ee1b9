"""Pictures of what a masked model redraws, for people to look at.

Legend: N images, P patches, X numbers in a patch, C H W channels and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from fundusfm.models.masked import patch_scale, patchify, unpatchify

_GREY, _GAP_PX = 0.5, 4


def reconstruction_picture(
    image_NCHW: Tensor,
    drawn_NPX: Tensor,
    hidden_NP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    normalised_target: bool,
) -> Tensor:
    """A picture (3, H', W') in [0, 1], one image a line: itself, what the model saw, what it made of that.

    `image_NCHW`: normalised by `mean` and `std`; hidden patches are grey in the middle and `drawn_NPX` on the
    right, where visible ones are left as they are. A model of a `normalised_target` says nothing of the
    brightness and contrast of a patch: those are the true ones.
    """
    patch_px = image_NCHW.shape[-1] // round(hidden_NP.shape[1] ** 0.5)
    truth_NPX = patchify(image_NCHW.float(), patch_px)
    drawn_NPX = drawn_NPX.float()
    if normalised_target:
        centre_NP1, scale_NP1 = patch_scale(truth_NPX)
        drawn_NPX = drawn_NPX * scale_NP1 + centre_NP1
    hidden_NP1 = hidden_NP[..., None]
    redrawn_NCHW = unpatchify(torch.where(hidden_NP1, drawn_NPX, truth_NPX), patch_px)
    covered_NCHW = unpatchify(hidden_NP1.expand_as(truth_NPX).float(), patch_px)
    shape = (1, 3, 1, 1)
    mean_1C11, std_1C11 = (torch.tensor(v, device=image_NCHW.device).view(shape) for v in (mean, std))
    shown_NCHW, redrawn_NCHW = (
        (one.float() * std_1C11 + mean_1C11).clamp(0, 1) for one in (image_NCHW, redrawn_NCHW)
    )
    seen_NCHW = torch.where(covered_NCHW > 0, _GREY, shown_NCHW)
    lines = torch.stack([shown_NCHW, seen_NCHW, redrawn_NCHW])
    framed = torch.nn.functional.pad(lines, (0, _GAP_PX, 0, _GAP_PX), value=1.0)
    picture: Tensor = rearrange(framed, "k n c h w -> c (n h) (k w)")[:, :-_GAP_PX, :-_GAP_PX]
    return picture
