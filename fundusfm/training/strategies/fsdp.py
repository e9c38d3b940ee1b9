"""FSDP2: the blocks of the towers are spread over ranks, what lies between them is whole on each.

A block's parameters are fetched when it runs and given back after. The rest (embeddings, norms, heads,
temperatures) stays ordinary parameters, averaged by one call a step: objectives may use those anywhere,
while a spread parameter can only be used by the block it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fundusfm.objectives import cached
from fundusfm.training.pieces import Piece
from fundusfm.training.strategies.portable import Portable, blocks_of


class ShardedBlocks(Portable, DDPStrategy):
    """Every block a unit of FSDP2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._units: list[FSDPModule] = []

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for block in blocks_of(model):
            self._units.append(fully_shard(block, mesh=mesh, reshard_after_forward=True))
        return model

    def _register_ddp_hooks(self) -> None:
        pass  # there is no DDP module

    def differentiate(self, value: Tensor) -> None:
        """The sums over pieces stay on this rank until the backward pass that ends the step."""
        for unit in self._units:
            unit.set_requires_gradient_sync(False)
        cached.differentiate(value)
        for unit in self._units:
            unit.set_requires_gradient_sync(True)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what every rank holds whole. Collective."""
        self.refuse_untouched()
        whole = [p.grad for _, p in self._trained() if p.grad is not None and not isinstance(p, DTensor)]
        flat = torch.cat([gradient.flatten() for gradient in whole])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, mean in zip(whole, torch.split(flat, [one.numel() for one in whole]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def piece(self, name: str, tensor: Tensor) -> Piece:
        """Rows of a spread tensor, as `torch.chunk` deals them."""
        if not isinstance(tensor, DTensor):
            return Piece.whole(name, tensor)
        rows = tensor.shape[0]
        first = min(self.global_rank * -(-rows // self.world_size), rows)
        start = first * (tensor.numel() // rows)
        return Piece(name, tuple(tensor.shape), start, tensor.to_local().detach(), shared=False)


class _ClipsBoth(Precision):
    """Clips by the norm of all gradients together, spread ones and whole ones."""

    def clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        clip_together(self.main_params(optimizer), clip_val)


class FullPrecision(_ClipsBoth):
    """fp32."""


class Autocast(_ClipsBoth, MixedPrecision):
    """bf16 by autocast; parameters and their gradients stay fp32."""


def clip_together(parameters: Iterator[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a common norm of at most `max_norm`; returns what it was. Collective."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    spread = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    square = _sum_of_squares(spread, gradients[0].device)
    dist.all_reduce(square)
    norm = (square + _sum_of_squares(whole, square.device)).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in [*spread, *whole]:
        gradient.mul_(factor)
    return norm


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(one) for one in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
