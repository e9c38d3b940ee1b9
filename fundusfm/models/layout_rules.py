"""What a published layout is made of: rules from their names and shapes to ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A published name (whole, as a pattern), our name for it, and how shapes change on the way in.

    Several names: the tensor is cut along its first axis into as many equal parts. None: the method does not
    use it.
    """

    pattern: str
    ours: str | tuple[str, ...]
    reshape: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def leading_axes(count: int) -> Callable[[Tensor], Tensor]:
    """Put axes of length 1 in front."""
    return lambda tensor: tensor.reshape((1,) * count + tensor.shape)


# The vision tower of CLIP as OpenAI's code names it.
CLIP_VIT = [
    Rule(r"visual\.class_embedding", "vision.trunk.cls_token", leading_axes(2)),
    Rule(r"visual\.positional_embedding", "vision.trunk.pos_embed", leading_axes(1)),
    Rule(r"visual\.proj", "vision.proj.weight", lambda tensor: tensor.T),
    Rule(r"visual\.conv1\.weight", "vision.trunk.patch_embed.proj.weight"),
    Rule(r"visual\.ln_pre\.(weight|bias)", r"vision.trunk.norm_pre.\1"),
    Rule(r"visual\.ln_post\.(weight|bias)", r"vision.trunk.norm.\1"),
    Rule(
        r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)",
        r"vision.trunk.blocks.\1.norm\2.\3",
    ),
    Rule(
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)",
        r"vision.trunk.blocks.\1.attn.qkv.\2",
    ),
    Rule(
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
        r"vision.trunk.blocks.\1.attn.proj.\2",
    ),
    Rule(
        r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)",
        r"vision.trunk.blocks.\1.mlp.fc1.\2",
    ),
    Rule(
        r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)",
        r"vision.trunk.blocks.\1.mlp.fc2.\2",
    ),
]
