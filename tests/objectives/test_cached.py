"""Micro-batches give the numbers of the big batch: with dropout, under autocast, over optimiser steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fundusfm.objectives.cached import Features, cached_loss
from fundusfm.objectives.ret_clip import RetClip
from fundusfm.stream.views import PatientPairBatch
from tests.losses.test_matrix import Towers
from tests.objectives.tiny import random_batch, tiny_ret_clip


def _loss_of(model: RetClip, features: Features) -> Tensor:
    return model.total_loss(model.terms_of(features))


def _cached(model: RetClip, batch: PatientPairBatch, size: int) -> tuple[Tensor, Tensor]:
    return cached_loss(
        batch.pieces(size), model.encode, lambda f: _loss_of(model, f), lambda k: None, model.parameters()
    )


def _four_steps(size: int | None) -> tuple[list[float], dict[str, Tensor]]:
    model = tiny_ret_clip().double().train()
    optimiser = torch.optim.AdamW(model.optimiser_groups(), lr=5e-3)
    losses = []
    for step in range(4):
        batch = random_batch(10, seed=step)
        batch.images = batch.images.double()
        optimiser.zero_grad()
        if size is None:
            loss = remainder = _loss_of(model, model.encode(batch))
        else:
            loss, remainder = _cached(model, batch, size)
        remainder.backward()
        optimiser.step()
        with torch.no_grad():
            model.after_step()
        losses.append(float(loss))
    return losses, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_four_optimiser_steps__those_of_the_big_batch(size: int) -> None:
    losses, parameters = _four_steps(size)
    wanted_losses, wanted = _four_steps(None)
    assert losses == pytest.approx(wanted_losses, rel=1e-10)
    for name, value in wanted.items():
        # Adam divides by the root of what may be rounding errors of 1e-17.
        torch.testing.assert_close(parameters[name], value, rtol=1e-7, atol=1e-8, msg=name)


def test_dropout__both_passes_draw_alike() -> None:
    towers = Towers(torch.float64, dropout=0.5).train()
    generator = torch.Generator().manual_seed(0)
    pieces = [
        tuple(torch.randn(3, width, generator=generator, dtype=torch.float64) for width in (7, 4))
        for _ in range(3)
    ]

    def loss_of(rows: Features) -> Tensor:
        return (towers.log_scale.exp() * rows["a"] @ rows["b"].T).logsumexp(1).square().sum()

    encoded = []
    for number, piece in enumerate(pieces):
        torch.manual_seed(number)
        encoded.append(towers.encode(piece))
    loss_of({name: torch.cat([rows[name] for rows in encoded]) for name in "ab"}).backward()
    wanted = {n: p.grad for n, p in towers.named_parameters()}
    towers.zero_grad()
    _, last = cached_loss(pieces, towers.encode, loss_of, torch.manual_seed, towers.parameters())
    last.backward()
    for name, parameter in towers.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-12, atol=1e-12)


def test_autocast__no_gradient_is_lost() -> None:
    """Autocast may remember casts of weights; one made without a graph would swallow the gradient."""
    gradients = []
    for size in (None, 3):
        model, batch = tiny_ret_clip().train(), random_batch(6)
        with torch.autocast("cpu", torch.bfloat16):
            if size is None:
                remainder = _loss_of(model, model.encode(batch))
            else:
                _, remainder = _cached(model, batch, size)
        remainder.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        error = (gradients[1][name] - wanted).norm()
        assert error <= 0.4 * wanted.norm() + 1e-4, name  # bfloat16 rounds batches of other sizes otherwise


def test_gradients_that_are_there_are_added_to() -> None:
    model, batch = tiny_ret_clip().train(), random_batch(4)
    _cached(model, batch, 2)[1].backward()
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    _cached(model, batch, 2)[1].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])
