"""One device, and data parallelism: every rank holds everything."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from fundusfm.training.strategies.portable import Portable


class Alone(Portable, SingleDeviceStrategy):
    """One process on one device."""


class Replicated(Portable, DDPStrategy):
    """Whole copies; gradients are averaged in the backward pass that ends a step."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Refuse what DDP would either pass over or, on another device, complain of a step later."""
        self.refuse_untouched()
