"""What the published code computes on the way to its losses: logits, targets, each direction by itself.

The core never holds them whole; here it is asked for them piece by piece.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses import Diagonal, SameGroup, contrastive_loss
from fundusfm.losses.columns import Columns
from fundusfm.losses.ranks import Ranks
from fundusfm.losses.targets import Sides, Target
from fundusfm.losses.tiles import Logits
from tests.goldens import load

CLAMPED = 4.6052  # of FLAIR's and KeepFIT's log temperature


def _directions(a: Tensor, b: Tensor, scale: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the rows, and of the columns: the loss is half of both."""
    none = torch.zeros(len(a))
    rows = 2 * contrastive_loss(a, b, scale, target=target, weight_b_B=none)
    return rows, 2 * contrastive_loss(a, b, scale, target=target, weight_a_B=none)


def _logits(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return next(Logits(float(scale), None).tiles(a, b))[-1].clone()


def _target(target: Target, number: int) -> Tensor:
    """Every row's share of each column."""
    columns = Columns((number,), Ranks(1, 0, None), torch.device("cpu"))
    positives = target.on(Sides(None, None, columns, columns))
    weight_NN = positives.rows(torch.eye(number), columns.blocks()[0][1])
    return weight_NN / positives.row_mass(torch.float32)[:, None]


def _close(found: Tensor, wanted: np.ndarray, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", ["seed0", "allsame", "clamp_high"])
def test_golden__flair(case: str) -> None:
    arrays, _ = load(f"flair/softtarget_loss_{case}")
    text, image = (torch.from_numpy(arrays[f"{name}_emb"]) for name in ("txt", "img"))
    scale = torch.from_numpy(arrays["logit_scale_param"]).clamp(0, CLAMPED).exp().reshape(1)
    target = SameGroup(torch.from_numpy(arrays["category_id"]))
    _close(_logits(text, image, scale), arrays["logits_per_text"])
    _close(_target(target, len(text)), arrays["target"])
    of_texts, of_images = _directions(text, image, scale, target)
    _close(of_texts, arrays["loss_text_rows"])
    _close(of_images, arrays["loss_image_rows"])
    _close(contrastive_loss(text, image, scale, target=target), arrays["loss"])


@pytest.mark.parametrize(("side", "prefix"), [("public", ""), ("expert", "kd_")])
def test_golden__keepfit(side: str, prefix: str) -> None:
    arrays, _ = load("keepfit/objective_seed0")
    text, image = (torch.from_numpy(arrays[f"{prefix}{name}_emb"]) for name in ("txt", "img"))
    scale = torch.from_numpy(arrays["logit_scale_param"]).clamp(0, CLAMPED).exp().reshape(1)
    target = SameGroup(torch.from_numpy(arrays[f"{prefix}category_id"]))
    _close(_logits(text, image, scale), arrays[f"logits_{side}"])
    for same in (target,) if side == "public" else (target, Diagonal()):
        _close(_target(same, len(text)), arrays[f"target_{side}"])
        of_texts, of_images = _directions(text, image, scale, same)
        _close(of_texts, arrays[f"loss_{side}_text_rows"])
        _close(of_images, arrays[f"loss_{side}_image_rows"])


@pytest.mark.parametrize("term", ["image_image", "image_text"])
def test_golden__eyeclip(term: str) -> None:
    arrays, _ = load(f"eyeclip/{term}_contrastive_seed0")
    first, second = (F.normalize(torch.from_numpy(arrays[f"feat_{n}"]), dim=-1) for n in (1, 2))
    scale = torch.from_numpy(arrays["log_scale"]).exp().reshape(1)
    _close(_logits(first, second, scale), arrays["logits_1"])
    _close(_logits(second, first, scale), arrays["logits_2"])
    of_first, of_second = _directions(first, second, scale, Diagonal())
    _close(of_first, arrays["loss_dir1"], atol=1e-6)
    _close(of_second, arrays["loss_dir2"], atol=1e-6)
