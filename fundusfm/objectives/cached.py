"""Negatives from the whole batch, memory for one micro-batch: cached features and two passes (GradCache).

First every micro-batch is encoded without a graph. The loss of all rows is computed once and differentiated
with respect to the features. Then each micro-batch is encoded again, with the random numbers of the first
time, and its features are pulled along their gradient: by the chain rule the sums over micro-batches are the
gradients of the big batch, as long as no layer mixes the rows of a batch, as batch normalisation does. The
price is one more forward pass. (Gao et al., arXiv 2101.06983)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Features = dict[str, Tensor]


def differentiate(value: Tensor) -> None:
    """Add the gradients of a piece to those that parameters hold; with several ranks, to this rank's only.

    Called while the module is in its forward pass, when data parallelism does not listen to gradients yet:
    it averages them over ranks in the backward pass that ends the step.
    """
    with torch.autocast(value.device.type, enabled=False):
        torch.autograd.backward(value)


def cached_loss(
    pieces: Sequence[Any],
    encode: Callable[[Any], Features],
    loss_of: Callable[[Features], Tensor],
    reseed: Callable[[int], None],
    parameters: Iterable[nn.Parameter],
    differentiate: Callable[[Tensor], None] = differentiate,
) -> tuple[Tensor, Tensor]:
    """The loss of all pieces together, and what the caller must still differentiate.

    `encode` turns a piece into named tensors of one row an exam, floating ones with a gradient; `loss_of`
    takes these joined over pieces and may use parameters of its own (temperatures); it is collective where
    several ranks share a batch. `reseed(k)` sets the random state of piece k, before both its passes.
    `differentiate` adds the gradients of a piece on this rank; strategies that spread a model have their own.

    All pieces but the last are differentiated here. The term of the last is returned: it also carries the
    gradients of the parameters of `loss_of`, so that one ordinary backward call ends the step and, with
    several ranks, averages the sum of all gradients once. Gradients that parameters hold are added to.
    """
    with torch.no_grad():
        encoded = [_encode(number, piece, encode, reseed) for number, piece in enumerate(pieces)]
    joined = {name: torch.cat([features[name] for features in encoded]) for name in encoded[0]}
    leaves = {name: tensor.requires_grad_() for name, tensor in joined.items() if tensor.is_floating_point()}
    with torch.enable_grad():
        loss = loss_of(joined)
    trained = [p for p in parameters if p.requires_grad]
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, [*leaves.values(), *trained], allow_unused=True)
    of_rows = {name: grad for name, grad in zip(leaves, gradients, strict=False) if grad is not None}
    direct = [(p, g) for p, g in zip(trained, gradients[len(leaves) :], strict=True) if g is not None]
    start, pull = 0, loss
    for number, piece in enumerate(pieces):
        features = _encode(number, piece, encode, reseed)
        stop = start + len(next(iter(features.values())))
        pull = _pull([(features[name], grad[start:stop]) for name, grad in of_rows.items()])
        if number < len(pieces) - 1:
            differentiate(pull)
        start = stop
    return loss.detach(), pull + _pull(direct)


def _encode(
    number: int, piece: Any, encode: Callable[[Any], Features], reseed: Callable[[int], None]
) -> Features:
    reseed(number)
    return encode(piece)


def _pull(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A scalar whose gradient with respect to each tensor is the one given; 0 for none."""
    return sum(((tensor * gradient).sum() for tensor, gradient in pairs), torch.zeros(()))
