"""Layer-wise decay of the learning rate: what lies nearer to the input of a tower moves less.

As in the fine-tuning of BEiT and MAE, which RETFound and UrFound took over: of a tower with n blocks the
embeddings learn at decay^(n + 1) of the rate, block k of 0 .. n - 1 at decay^(n - k), and what comes after
the blocks at the whole rate, as does everything outside the trunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fundusfm.errors import UserError

_TRUNK = re.compile(r"^(.*\b(?:vision|text)\.trunk\.)(.+)$")
# timm's vision transformers, transformers' BERT family and CLIP text models
_BLOCK = re.compile(r"^(?:blocks|encoder\.layers?)\.(\d+)\.")
_BEFORE = re.compile(r"^(?:patch_embed|pos_embed|cls_token|reg_token|norm_pre|embeddings)\b")


def layer_of(name: str, num_blocks: int) -> int:
    """Depth of a parameter by its name within a trunk: 0 before the blocks, `num_blocks` + 1 after them."""
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return 0 if _BEFORE.match(name) else num_blocks + 1


def layer_scales(num_blocks: int, decay: float) -> list[float]:
    """Factors of the learning rate by depth, `num_blocks` + 2 of them, the last one 1."""
    return [decay ** (num_blocks + 1 - layer) for layer in range(num_blocks + 2)]


def rate_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Parameter -> factor of its learning rate, for the parameters of towers that have blocks."""
    within = _within_trunks(names)
    num_blocks = _num_blocks(within)
    return {
        name: layer_scales(num_blocks[trunk], decay)[layer_of(own, num_blocks[trunk])]
        for name, (trunk, own) in within.items()
    }


def refuse_other_than_blocks(names: Iterable[str]) -> None:
    """UserError unless there is a tower and every tower is a row of transformer blocks."""
    num_blocks = _num_blocks(_within_trunks(names))
    other = sorted(trunk.removesuffix(".trunk.") for trunk, number in num_blocks.items() if not number)
    if other or not num_blocks:
        told = f"{other[0]!r} is no row of transformer blocks" if other else "there is no tower"
        raise UserError(
            f"rates cannot decay along the blocks of every tower: {told}",
            where="optim.layer_decay",
            fix="set it to 1, or choose a vision transformer",
        )


def _within_trunks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Parameter -> its trunk, and its name within."""
    found = {name: _TRUNK.match(name) for name in names}
    return {name: (match[1], match[2]) for name, match in found.items() if match}


def _num_blocks(within: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    numbers = {trunk: 0 for trunk, _ in within.values()}
    for trunk, own in within.values():
        if block := _BLOCK.match(own):
            numbers[trunk] = max(numbers[trunk], int(block[1]) + 1)
    return numbers
