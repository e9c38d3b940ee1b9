"""The patches of an image by any timm trunk: a CNN's last grid, or a transformer's patch tokens.

Legend: N images, C H W channels and pixels, P patches, F trunk width.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from fundusfm.errors import UserError

# What a trunk only needs to pool and classify.
_HEAD_PARTS = ("head", "head_drop", "fc_norm", "norm_head", "attn_pool", "global_pool")


class PatchTrunk(nn.Module):
    """image_NCHW -> patch_NPF, row by row of the grid. The trunk's own head is not used."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = int(trunk.num_features)  # type: ignore[arg-type]

    @property
    def head(self) -> list[nn.Module]:
        """The parts of the trunk's own head, which no gradient ever reaches."""
        return [part for name, part in self.trunk.named_children() if name in _HEAD_PARTS]

    def forward(self, image_NCHW: Tensor) -> Tensor:
        feature: Tensor = self.trunk.forward_features(image_NCHW)  # type: ignore[operator]
        if feature.ndim == 3:
            return feature[:, int(getattr(self.trunk, "num_prefix_tokens", 0)) :]
        if feature.ndim != 4:
            raise UserError(
                f"the vision tower gives features of {feature.ndim} axes, and no patches",
                where="model.vision.name",
                fix="choose a convolutional network or a vision transformer of timm",
            )
        axes = "n h w f" if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC" else "n f h w"
        return rearrange(feature, f"{axes} -> n (h w) f")
