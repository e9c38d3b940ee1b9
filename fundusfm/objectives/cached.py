"""Negatives from the whole batch, memory for one micro-batch: cached features and two passes (GradCache).

First every micro-batch but the last is encoded without a graph, the last with one. The loss of all rows is
computed once and differentiated with respect to the features. Then the features of the last are pulled along
their gradient, and each other micro-batch is encoded again, with the random numbers of the first time, and
pulled likewise: by the chain rule the sums over micro-batches are the gradients of the big batch, as long as
no layer mixes the rows of a batch, as batch normalisation does. The price is one more forward pass of all
micro-batches but one. (Gao et al., arXiv 2101.06983, who encode the last twice, too.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
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

    All pieces but one are differentiated here. The term of that one is returned: it also carries the
    gradients of the parameters of `loss_of`, so that one ordinary backward call ends the step and, with
    several ranks, averages the sum of all gradients once. Gradients that parameters hold are added to.
    """
    last = len(pieces) - 1
    with torch.no_grad():
        encoded = [_encode(number, piece, encode, reseed) for number, piece in enumerate(pieces[:last])]
    with_graph = _encode(last, pieces[last], encode, reseed)
    encoded.append({name: tensor.detach() for name, tensor in with_graph.items()})
    starts = [0, *accumulate(len(next(iter(features.values()))) for features in encoded)]
    loss, of_rows, direct = _differentiate_loss(encoded, loss_of, parameters)
    pull = loss
    for done, number in enumerate((last, *range(last))):
        features = with_graph if number == last else _encode(number, pieces[number], encode, reseed)
        rows = slice(starts[number], starts[number + 1])
        pull = _pull([(features[name], gradient[rows]) for name, gradient in of_rows.items()])
        if done < last:
            differentiate(pull)
    return loss.detach(), pull + sum(_Given.apply(p, gradient) for p, gradient in direct)


def _differentiate_loss(
    encoded: Sequence[Features], loss_of: Callable[[Features], Tensor], parameters: Iterable[nn.Parameter]
) -> tuple[Tensor, Features, Sequence[tuple[Tensor, Tensor]]]:
    """The loss of all rows, its gradients by name of feature, and those of the parameters of `loss_of`."""
    joined = {name: torch.cat([features[name] for features in encoded]) for name in encoded[0]}
    leaves = {name: tensor.requires_grad_() for name, tensor in joined.items() if tensor.is_floating_point()}
    with torch.enable_grad():
        loss = loss_of(joined)
    trained = [p for p in parameters if p.requires_grad]
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, [*leaves.values(), *trained], allow_unused=True)
    of_rows = {name: grad for name, grad in zip(leaves, gradients, strict=False) if grad is not None}
    direct = [(p, g) for p, g in zip(trained, gradients[len(leaves) :], strict=True) if g is not None]
    return loss, of_rows, direct


def _encode(
    number: int, piece: Any, encode: Callable[[Any], Features], reseed: Callable[[int], None]
) -> Features:
    reseed(number)
    return encode(piece)


class _Given(torch.autograd.Function):
    """0, whose gradient with respect to a parameter is the one given; the values of the parameter, which a
    strategy may have taken away by now, are not looked at."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None


def _pull(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A scalar whose gradient with respect to each tensor is the one given; 0 for none."""
    return sum(((tensor * gradient).sum() for tensor, gradient in pairs), torch.zeros(()))
