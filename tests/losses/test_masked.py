"""Losses over what was hidden against UrFound's own numbers and plain means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses import patch_errors, patch_loss, word_errors, word_loss
from fundusfm.models.masked import normalised, patchify
from tests.goldens import load


def _golden(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in load(name)[0].items()}


def test_golden__patches_twice_as_wide_as_the_encoder_sees() -> None:
    golden = _golden("urfound/mim_loss")
    target = patchify(golden["imgs"], 16)
    for name, wanted in {"raw": target, "norm": normalised(target)}.items():
        drawn = golden["pred"].clone().requires_grad_()
        loss = patch_loss(drawn, wanted, golden["mask"].bool())
        loss.backward()
        torch.testing.assert_close(loss, golden[f"loss_{name}"], rtol=1e-6, atol=0)
        torch.testing.assert_close(drawn.grad, golden[f"grad_pred_{name}"], rtol=1e-5, atol=1e-8)


def test_golden__words() -> None:
    golden = _golden("urfound/mlm_loss")
    everywhere = torch.ones_like(golden["labels"], dtype=torch.bool)
    logits = golden["logits"].clone().requires_grad_()
    loss = word_loss(logits.flatten(0, 1), golden["labels"].flatten(), everywhere)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss_reference"], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, golden["grad_logits_reference"], rtol=1e-5, atol=1e-8)
    one_each = everywhere.flatten()[:, None]
    errors, _ = word_errors(golden["logits"].flatten(0, 1).double(), golden["labels"].flatten(), one_each)
    torch.testing.assert_close(errors.view(everywhere.shape), golden["nll_per_token"], rtol=1e-10, atol=0)
    hidden, non_pad = golden["input_ids"] == 3, golden["attention_mask"].bool()
    for counted, name in ((hidden, "loss_hidden_only"), (non_pad, "loss_non_pad")):
        found = word_loss(golden["logits"][counted].double(), golden["labels"][counted], counted)
        torch.testing.assert_close(found, golden[name], rtol=1e-6, atol=0)


def test_rows__sums_of_their_own() -> None:
    """What rows bring to the mean: uneven numbers of words and patches, one row with none."""
    generator = torch.Generator().manual_seed(0)
    counted = torch.rand(4, 6, generator=generator) < 0.5
    counted[2] = False
    logits = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64)
    words = torch.randint(7, (4, 6), generator=generator)
    sums, counts = word_errors(logits[counted], words[counted], counted)
    each = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view(4, 6)
    torch.testing.assert_close(sums, (each * counted).sum(1))
    assert counts.equal(counted.sum(1))
    drawn, target = torch.randn(2, 4, 6, 5, generator=generator, dtype=torch.float64)
    sums, counts = patch_errors(drawn, target, counted)
    torch.testing.assert_close(sums, ((drawn - target).square().mean(-1) * counted).sum(1))
    assert counts.equal(counted.sum(1))


def test_nothing_hidden__no_loss_and_no_gradient() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = word_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(3, 4, dtype=torch.bool))
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
