"""The contrastive loss against the published code, a dense formula and several real processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fundusfm.losses import Diagonal, SameGroup, SameId, contrastive_loss, sigmoid_loss
from tests.distributed.ranks import run_ranks
from tests.goldens import load

TERMS = ("patient", "left", "right")


def dense_loss(a_ND: Tensor, b_ND: Tensor, scale: Tensor, valid_a_N: Tensor, valid_b_N: Tensor) -> Tensor:
    """The definition, written with whole matrices and plain autograd."""
    logits_NN = scale * a_ND @ b_ND.T
    pair_N = valid_a_N & valid_b_N
    if not pair_N.any():
        return 0.0 * logits_NN.sum()
    rows = -logits_NN.masked_fill(~valid_b_N, -torch.inf).log_softmax(1).diagonal()[pair_N].mean()
    columns = -logits_NN.masked_fill(~valid_a_N[:, None], -torch.inf).log_softmax(0).diagonal()[pair_N].mean()
    return (rows + columns) / 2


@pytest.mark.parametrize(
    "case", ["tripartite_b8_d16_seed0_f32", "tripartite_b8_d16_seed0_f64", "tripartite_duplicate_row_f64"]
)
def test_goldens__loss_and_gradients(case: str) -> None:
    arrays, description = load(f"ret_clip/{case}")
    rtol = description["suggested_rtol"]
    inputs = {
        k: torch.from_numpy(v).requires_grad_()
        for k, v in arrays.items()
        if k.startswith(("in_", "log_scale"))
    }
    total = torch.zeros((), dtype=inputs["log_scale"].dtype)
    for i, term in enumerate(TERMS):
        image, text = (F.normalize(inputs[f"in_{term}_{side}"], dim=-1) for side in ("image", "text"))
        loss = contrastive_loss(image, text, inputs["log_scale"][i].exp())
        np.testing.assert_allclose(loss.item(), arrays[f"{term}_loss"], rtol=rtol)
        total = total + loss
    np.testing.assert_allclose(total.item(), arrays["total_loss"], rtol=rtol)
    total.backward()
    atol = 1e-4 if rtol > 1e-6 else 1e-12
    for name, tensor in inputs.items():
        golden = arrays[f"grad_{name.removeprefix('in_')}"]
        np.testing.assert_allclose(tensor.grad, golden, rtol=rtol, atol=atol, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_rows=st.integers(1, 9),
    width=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1.0, 14.3, 100.0]),
)
def test_equals_dense_formula__any_validity(
    data: st.DataObject, num_rows: int, width: int, scale: float
) -> None:
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    valid = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
        for _ in range(2)
    ]
    rows = [torch.randn(num_rows, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    found, wanted = [], []
    for function, out in ((_ours, found), (dense_loss, wanted)):
        a, b = (r.clone().requires_grad_() for r in rows)
        s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        loss = function(F.normalize(a, dim=-1), F.normalize(b, dim=-1), s, *valid)
        loss.backward()
        out += [loss.detach(), a.grad, b.grad, s.grad]
    for ours, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torch.nan_to_num(dense), rtol=1e-9, atol=1e-10)


def _ours(a: Tensor, b: Tensor, scale: Tensor, valid_a: Tensor, valid_b: Tensor) -> Tensor:
    return contrastive_loss(a, b, scale, valid_a_B=valid_a, valid_b_B=valid_b)


def _loss_of_rank(
    rank: int, world_size: int, rows: dict[str, Tensor], group: str | None
) -> dict[str, Tensor]:
    share = {k: v.chunk(world_size)[rank] for k, v in rows.items() if k != "scale"}
    a, b = (share[k].clone().requires_grad_() for k in ("a", "b"))
    scale = rows["scale"].clone().requires_grad_()
    loss = contrastive_loss(
        F.normalize(a, dim=-1),
        F.normalize(b, dim=-1),
        scale,
        valid_a_B=share["valid_a"],
        valid_b_B=share["valid_b"],
        group=group,
    )
    loss.backward()
    # What data-parallel training does to parameter gradients: the mean over ranks.
    return {
        "loss": loss.detach(),
        "a": a.grad / world_size,
        "b": b.grad / world_size,
        "scale": scale.grad / world_size,
    }


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_big_batch(world_size: int) -> None:
    generator = torch.Generator().manual_seed(world_size)
    rows = {k: torch.randn(12, 5, generator=generator, dtype=torch.float64) for k in ("a", "b")}
    rows |= {k: torch.rand(12, generator=generator) > 0.3 for k in ("valid_a", "valid_b")}
    rows["scale"] = torch.tensor([14.3], dtype=torch.float64)
    answers = run_ranks(world_size, _loss_of_rank, world_size, rows, None)

    a, b = (rows[k].clone().requires_grad_() for k in ("a", "b"))
    scale = rows["scale"].clone().requires_grad_()
    normed = (F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    loss = dense_loss(*normed, scale, rows["valid_a"], rows["valid_b"])
    loss.backward()
    for answer in answers:
        torch.testing.assert_close(answer["loss"], loss.detach(), rtol=1e-12, atol=0)
    for side, wanted in (("a", a.grad), ("b", b.grad)):
        torch.testing.assert_close(
            torch.cat([answer[side] for answer in answers]), wanted, rtol=1e-10, atol=1e-13
        )
    torch.testing.assert_close(sum(answer["scale"] for answer in answers), scale.grad, rtol=1e-10, atol=1e-13)


def _golden_of_rank(rank: int, arrays: dict[str, np.ndarray], group: str | None) -> dict[str, np.ndarray]:
    share = slice(rank * 8, rank * 8 + 8)
    inputs = {
        k: torch.from_numpy(v[share]).requires_grad_() for k, v in arrays.items() if k.startswith("in_")
    }
    log_scale = torch.from_numpy(arrays["log_scale"]).requires_grad_()
    total = sum(
        contrastive_loss(
            *(F.normalize(inputs[f"in_{term}_{side}"], dim=-1) for side in ("image", "text")),
            log_scale[i].exp(),
            group=group,
        )
        for i, term in enumerate(TERMS)
    )
    total.backward()
    grads = {k.removeprefix("in_"): v.grad.numpy() / 2 for k, v in inputs.items()}
    return {"total": total.detach().numpy(), "log_scale": log_scale.grad.numpy() / 2, **grads}


@pytest.mark.parametrize(("group", "kind"), [("rank", "ddp"), (None, "global")])
def test_two_ranks__released_keeps_to_its_rows_and_corrected_sees_all(group: str | None, kind: str) -> None:
    arrays, _ = load("ret_clip/tripartite_2rank_local_f64")
    answers = run_ranks(2, _golden_of_rank, arrays, group)
    for rank, answer in enumerate(answers):
        golden = arrays["total_loss_if_global_batch" if group is None else f"total_loss_rank{rank}"]
        np.testing.assert_allclose(answer["total"], golden, rtol=1e-12)
    mean_scale = sum(a["log_scale"] for a in answers)
    golden_scale = arrays["global_grad_log_scale" if group is None else "ddp_mean_grad_log_scale"]
    np.testing.assert_allclose(mean_scale, golden_scale, rtol=1e-9)
    for name in (f"{term}_{side}" for term in TERMS for side in ("image", "text")):
        found = np.concatenate([answer[name] for answer in answers])
        np.testing.assert_allclose(found, arrays[f"{kind}_grad_{name}"], rtol=1e-9, atol=1e-14, err_msg=name)


def test_bfloat16_features__float32_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(64, 32, generator=generator), dim=-1).bfloat16() for _ in range(2))
    loss = contrastive_loss(a, b, torch.tensor([100.0]))
    every = torch.ones(64, dtype=torch.bool)
    wanted = dense_loss(a.double(), b.double(), torch.tensor([100.0]).double(), every, every)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["seed0", "allsame", "clamp_high"])
def test_flair_golden__equal_categories(case: str) -> None:
    arrays, _ = load(f"flair/softtarget_loss_{case}")
    image, text, log_scale = (
        torch.from_numpy(np.array(arrays[k])).requires_grad_()
        for k in ("img_emb", "txt_emb", "logit_scale_after_clamp")
    )
    groups = SameGroup(torch.from_numpy(arrays["category_id"]))
    loss = contrastive_loss(text, image, log_scale.exp(), target=groups)
    loss.backward()
    np.testing.assert_allclose(loss.item(), arrays["loss_f64"], rtol=2e-6)
    for tensor, name in ((image, "img"), (text, "txt"), (log_scale, "logit_scale")):
        np.testing.assert_allclose(tensor.grad, arrays[f"grad_{name}"], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", ["image_image", "image_text"])
def test_eyeclip_golden(case: str) -> None:
    arrays, _ = load(f"eyeclip/{case}_contrastive_seed0")
    first, second, log_scale = (
        torch.from_numpy(np.array(arrays[k])).requires_grad_() for k in ("feat_1", "feat_2", "log_scale")
    )
    loss = contrastive_loss(F.normalize(first, dim=-1), F.normalize(second, dim=-1), log_scale.exp())
    loss.backward()
    # Logits of positives are computed apart from the sums and rounded apart: 1e-6, whatever the loss.
    np.testing.assert_allclose(loss.item(), arrays["loss"], rtol=1e-5, atol=2e-6)
    for tensor, name in ((first, "1"), (second, "2"), (log_scale, "logit_scale")):
        np.testing.assert_allclose(tensor.grad, arrays[f"grad_{name}"], rtol=1e-4, atol=1e-6, err_msg=name)


def test_coep_golden__diagonal_and_identical_partners() -> None:
    arrays, description = load("octcube/coep_pair_loss")
    ids = torch.from_numpy(arrays["label_matrix_dup"]).argmax(1)
    cases = (
        ("enface_features", Diagonal(), "loss", "grad_oct", "grad_enface"),
        ("enface_features_dup", SameGroup(ids), "loss_dup_soft_labels", "grad_oct_dup", "grad_enface_dup"),
        ("enface_features_dup", Diagonal(), "loss_dup_plain", None, None),
    )
    for side, target, name, *gradients in cases:
        oct_BD, enface_BD = (torch.from_numpy(arrays[k]).requires_grad_() for k in ("oct_features", side))
        scale = torch.tensor(description["scalars"]["scale"], dtype=oct_BD.dtype)
        loss = contrastive_loss(oct_BD, enface_BD, scale, target=target)
        np.testing.assert_allclose(loss.item(), arrays[name], rtol=2e-6)
        loss.backward()
        for tensor, golden in zip((oct_BD, enface_BD), gradients, strict=True):
            if golden:
                np.testing.assert_allclose(tensor.grad, arrays[golden], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_peer__open_clip_with_gathered_gradients(world_size: int) -> None:
    """Loss and gradients of all features, which the peer too leaves multiplied by the number of ranks."""
    for ours, theirs in run_ranks(world_size, _beside_open_clip, world_size):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


def _beside_open_clip(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    from open_clip.loss import ClipLoss, SigLipLoss

    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    peer = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    pairwise = SigLipLoss(rank=rank, world_size=world_size)
    answers = []
    for is_ours in (True, False):
        answer = {}
        for name in ("clip", "siglip"):
            a, b = (r.clone().requires_grad_() for r in rows)
            scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (14.3, -3.0))
            unit = (F.normalize(a, dim=-1), F.normalize(b, dim=-1))
            if name == "clip":
                loss = contrastive_loss(*unit, scale) if is_ours else peer(*unit, scale)
            else:
                loss = sigmoid_loss(*unit, scale, bias) if is_ours else pairwise(*unit, scale, bias)
            loss.backward()
            answer |= {f"{name} a": a.grad, f"{name} b": b.grad}
            local = loss.detach().clone()
            dist.all_reduce(local)
            answer[f"{name} loss"] = local / world_size
        answers.append(answer)
    return answers


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(2, 6),
    low=st.sampled_from([-1.0, -0.9, 0.0]),
    precision=st.sampled_from([(torch.float32, 100.0, 2e-5), (torch.float64, 3000.0, 1e-11)]),
    valid=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_rows_far_from_every_column__nothing_vanishes(
    seed: int, num_rows: int, low: float, precision: tuple[torch.dtype, float, float], valid: list[bool]
) -> None:
    """All cosines near `low`: with one shift for all logits every exponential of a row would be zero."""
    dtype, scale, bound = precision
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[low, (1 - low**2) ** 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    noise = torch.randn(2, num_rows, 3, generator=generator, dtype=dtype) * 0.02
    rows = F.normalize(centres[:, None] + noise, dim=-1)
    every, some = torch.ones(num_rows, dtype=torch.bool), torch.tensor(valid[:num_rows])
    found, wanted = [], []
    for function, out, kind in ((_ours, found, dtype), (dense_loss, wanted, torch.float64)):
        a, b = (side.to(kind).clone().requires_grad_() for side in rows)
        loss = function(a, b, torch.tensor(scale, dtype=kind), every, some)
        loss.backward()
        out += [loss.detach(), a.grad, b.grad]
    for ours, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), torch.nan_to_num(dense), rtol=0, atol=bound * scale)


def test_loss_of_nobody__zero_with_zero_gradients() -> None:
    nobody = torch.zeros(4, dtype=torch.bool)
    a, b = (F.normalize(torch.randn(4, 3), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor([10.0], requires_grad=True)
    for loss in (
        contrastive_loss(a, b, scale, valid_a_B=nobody),
        contrastive_loss(a, b, scale, valid_b_B=nobody),
        contrastive_loss(a, b, scale, target=SameGroup(torch.full((4,), -1))),
        contrastive_loss(a[:0], b[:0], scale),
        sigmoid_loss(a, b, scale, scale.detach(), valid_a_B=nobody),
    ):
        gradients = torch.autograd.grad(loss, (a, b, scale), allow_unused=True)
        assert loss.item() == 0
        assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("backend", ["dense", "tiled", "ring"])
def test_masked_pair__no_longer_a_candidate(backend: str) -> None:
    """Two reports of one text: without the mask they are each other's negatives."""
    generator = torch.Generator().manual_seed(0)
    b = F.normalize(torch.randn(5, 4, generator=generator), dim=-1)
    b[3] = b[1]
    a = F.normalize(b + 0.3 * torch.randn(5, 4, generator=generator), dim=-1)
    report = torch.tensor([0, 1, 2, 1, 4])
    scale = torch.tensor(20.0)
    plain = contrastive_loss(a, b, scale, backend=backend)
    masked = contrastive_loss(a, b, scale, mask=SameId(report), backend=backend)
    assert masked < plain


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features__gradients_within_their_rounding(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(300, 48, generator=generator), dim=-1).to(dtype) for _ in range(2)]
    every = torch.ones(300, dtype=torch.bool)
    half = [r.clone().requires_grad_() for r in rows]
    contrastive_loss(*half, torch.tensor(scale)).backward()
    full = [r.double().requires_grad_() for r in rows]
    dense_loss(*full, torch.tensor(scale, dtype=torch.float64), every, every).backward()
    for ours, truth in zip(half, full, strict=True):
        error = (ours.grad.double() - truth.grad).norm() / truth.grad.norm()
        assert error < (2e-3 if dtype == torch.bfloat16 else 3e-4), error
