"""What can be wrong with the ids, labels and weights of a rank's rows, in words; an empty text for nothing.

Legend: B rows as the caller gave them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shape_fault(name: str, a: Tensor, shape_a: tuple[int, ...], b: Tensor, shape_b: tuple[int, ...]) -> str:
    for side, found, wanted in (("a", a, shape_a), ("b", b, shape_b)):
        if tuple(found.shape) != wanted:
            return f"the {name} of side {side} have shape {tuple(found.shape)}, not {wanted}"
    return ""


def ids_fault(name: str, a_B: Tensor, num_a: int, b_B: Tensor, num_b: int) -> str:
    """Of one id a row; of no rows at all any type will do, such as that of an empty list."""
    for side, ids_B in (("a", a_B), ("b", b_B)):
        if ids_B.numel() and (ids_B.is_floating_point() or ids_B.is_complex()):
            return f"the {name} of side {side} are {ids_B.dtype}, not integers"
    return shape_fault(name, a_B, (num_a,), b_B, (num_b,))


def are_unusable(weights: Tensor) -> bool:
    """Whether some are negative or not finite."""
    return not bool((torch.isfinite(weights) & (weights >= 0)).all())
