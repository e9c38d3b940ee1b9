"""KeepFIT-FFA: the loss by a plain formula, what is counted, the published defects, writing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.objectives.caption import Caption, CaptionConfig
from fundusfm.recipe.schema import Fidelity, SourceConfig
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.loader import World
from fundusfm.stream.tokens import load_tokens
from fundusfm.stream.view_prompt import PromptBatch, TextSource
from tests.conftest import Cohort
from tests.objectives.tiny_caption import BEGIN, CONVNEXT, END, LONGEST, VIT, caption_batch, tiny_caption

BOTH = list(Fidelity)


def _loss(model: Caption, batch: PromptBatch) -> float:
    return float(model.loss_terms(batch)["loss_words"].detach())


def _plain_loss(model: Caption, batch: PromptBatch) -> float:
    """Exam by exam, token by token, without padding."""
    total, told = 0.0, 0
    for row in range(len(batch.keys)):
        if not batch.text_valid_B[row]:
            continue
        tokens = batch.token_BT[row, batch.mask_BT[row]].tolist()
        if model.released:
            tokens = [0, *tokens[1:-1], 0]
        patches = model.captioner.encode(model.vision(batch.images[row : row + 1]))
        logits_TV = model.captioner.output(model.captioner.states(torch.tensor([tokens[:-1]]), patches))[0]
        log_TV = F.log_softmax(logits_TV, dim=-1)
        is_cut = len(tokens) == LONGEST
        for place, token in enumerate(tokens[1 : -1 if is_cut else None]):
            total -= float(log_TV[place, token].detach())
            told += 1
    return total / told


@pytest.mark.parametrize("vision", [VIT, CONVNEXT], ids=["vit", "convnext"])
@pytest.mark.parametrize("fidelity", BOTH)
def test_loss__the_mean_over_tokens(fidelity: Fidelity, vision: tuple[str, dict[str, object]]) -> None:
    model, batch = tiny_caption(fidelity, vision).eval(), caption_batch(9)
    assert (batch.mask_BT.sum(dim=1) == LONGEST).any(), "no report is cut"
    assert _loss(model, batch) == pytest.approx(_plain_loss(model, batch), rel=1e-5)


@pytest.mark.parametrize("fidelity", BOTH)
def test_loss__what_is_masked_does_not_matter(fidelity: Fidelity) -> None:
    model, batch = tiny_caption(fidelity).eval(), caption_batch(6)
    wanted = _loss(model, batch)
    others = torch.where(batch.mask_BT & batch.text_valid_B[:, None], batch.token_BT, 17)
    assert _loss(model, replace(batch, token_BT=others)) == wanted
    image_NCHW = batch.images.clone()
    image_NCHW[~batch.text_valid_B] += 1
    assert _loss(model, replace(batch, images=image_NCHW)) == pytest.approx(wanted, rel=1e-6)
    image_NCHW[0] += torch.randn(3, 32, 32)
    assert _loss(model, replace(batch, images=image_NCHW)) != pytest.approx(wanted, rel=1e-6)


def test_loss__a_batch_without_any_report() -> None:
    model, batch = tiny_caption(), caption_batch(4)
    batch.text_valid_B[:] = False
    loss = model.loss_terms(batch)["loss_words"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_teacher_forcing__the_end_is_told_unless_the_report_was_cut() -> None:
    batch = caption_batch(9, lacking=False)
    given_BT, told_BT, counts_BT = tiny_caption().teacher_forcing(batch)
    is_end_BT = (told_BT == END) & counts_BT
    is_cut_B = batch.mask_BT[:, -1]
    assert is_end_BT.any(dim=1).equal(~is_cut_B)
    assert counts_BT.sum(dim=1).equal(batch.mask_BT.sum(dim=1) - 1 - is_cut_B.long())
    assert given_BT[:, 1:].equal(told_BT[:, :-1])
    shorter = replace(batch, **{k: getattr(batch, k)[:, :-1] for k in ("token_BT", "mask_BT", "word_BT")})
    assert tiny_caption().teacher_forcing(shorter)[2].sum() == shorter.mask_BT[:, 1:].sum()


def test_released__begin_end_and_padding_are_one_token() -> None:
    batch = caption_batch(6)
    given_BT, told_BT, _ = tiny_caption(Fidelity.released).teacher_forcing(batch)
    seen = torch.cat([given_BT[:, :1], told_BT], dim=1)
    words_BT = batch.mask_BT & (batch.token_BT != BEGIN) & (batch.token_BT != END)
    assert seen.equal(torch.where(words_BT, batch.token_BT, 0))


@pytest.mark.parametrize("fidelity", BOTH)
def test_write_reports__ends_where_it_must(fidelity: Fidelity) -> None:
    model = tiny_caption(fidelity, beams=2, block_ngrams=0).eval()
    end = 0 if fidelity is Fidelity.released else END
    image_NCHW = caption_batch(5).images
    free = model.write_reports(image_NCHW, BEGIN, END)
    assert all(len(report) <= LONGEST - 1 for report in free)
    with torch.no_grad():
        model.captioner.output.bias[end] = 99
    assert model.write_reports(image_NCHW, BEGIN, END) == [[]] * 5
    with torch.no_grad():
        model.captioner.output.bias[end] = -99
    assert [len(report) for report in model.write_reports(image_NCHW, BEGIN, END)] == [LONGEST - 1] * 5


@pytest.mark.parametrize(
    ("beams", "fidelity"), [(1, Fidelity.released), (3, Fidelity.released), (3, Fidelity.corrected)]
)
def test_write_reports__blocking_works_but_for_released_beams(beams: int, fidelity: Fidelity) -> None:
    model = tiny_caption(fidelity, beams=beams, block_ngrams=2).eval()
    with torch.no_grad():
        model.captioner.output.bias[7] = 50  # it would say this word for ever
        model.captioner.output.bias[[0, END]] = -50
    report = model.write_reports(caption_batch(1).images, BEGIN, END)[0]
    pairs = list(itertools.pairwise(report))
    assert (len(set(pairs)) < len(pairs)) is (beams > 1 and fidelity is Fidelity.released)


def test_learns_and_writes_what_it_learned() -> None:
    """Four images, four reports: written back word for word by both searches."""
    model, batch = tiny_caption(layers=1, width=32), caption_batch(4, lacking=False)
    optimiser = torch.optim.AdamW(model.optimiser_groups())
    losses = []
    for _ in range(120):
        optimiser.zero_grad()
        loss = model.loss_terms(batch)["loss_words"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 2 < losses[0]
    model.eval()
    wanted = [t[(t > 4)].tolist() for t in batch.token_BT]
    for beams in (1, 3):
        model.config.beams = beams
        found = model.write_reports(batch.images, BEGIN, END)
        is_cut = batch.mask_BT[:, -1].tolist()
        assert [f[: len(w)] if cut else f for f, w, cut in zip(found, wanted, is_cut, strict=True)] == wanted


def test_probe_features__the_mean_of_the_patches() -> None:
    model, image_NCHW = tiny_caption(vision=CONVNEXT).eval(), torch.randn(2, 3, 32, 32)
    grid_NFHW: Tensor = model.vision.trunk.forward_features(image_NCHW)  # type: ignore[operator]
    torch.testing.assert_close(model.probe_features(image_NCHW), grid_NFHW.mean(dim=(2, 3)))


def test_optimiser_groups__the_trunk_learns_at_its_own_rate() -> None:
    model = tiny_caption(trunk_rate=0.25)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    seen = [names[id(p)] for group in model.optimiser_groups() for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in model.optimiser_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == pytest.approx(5e-3 * (0.25 if name.startswith("vision.") else 1))
            assert (group["weight_decay"] == 0) is model.no_decay(name, parameter)


@pytest.mark.parametrize("fidelity", BOTH)
def test_gradients__values_are_cut_in_released_only(
    fidelity: Fidelity, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, norms = tiny_caption(fidelity), []
    monkeypatch.setattr(
        model, "clip_gradients", lambda _, gradient_clip_val, **__: norms.append(gradient_clip_val)
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    assert model.cuts_gradients is (fidelity is Fidelity.released)
    model.configure_gradient_clipping(torch.optim.SGD(model.parameters(), lr=1.0), 2.0, None)
    assert norms == [2.0]
    cut = -0.1 if fidelity is Fidelity.released else -3.0
    assert all(p.grad is not None and p.grad.eq(cut).all() for p in model.parameters())


def test_config__view_and_refusals() -> None:
    assert CaptionConfig().view_options() == {"source": TextSource.texts}
    assert CaptionConfig().impossible() == {}
    wrong = CaptionConfig(width=30, heads=8, block_ngrams=1, trunk_rate=0.0, length_power=-1.0)
    assert wrong.impossible().keys() == {"width", "block_ngrams", "trunk_rate", "length_power"}
    assert CaptionConfig(layers=0, dropout=1.0, heads=0).impossible().keys() == {"layers", "dropout", "heads"}


def test_stream__an_exam_without_a_report_is_masked_and_not_dropped(synth_cohort: Cohort) -> None:
    recipe = tiny_caption().recipe
    recipe.data.sources = [SourceConfig(str(synth_cohort.shards))]
    recipe.data.tokenizer, recipe.data.context_length = str(synth_cohort.tokenizer), 64
    recipe.data.global_batch_size, recipe.data.languages = 32, ["en"]
    tokens = load_tokens(recipe.data.tokenizer, recipe.data.context_length)
    stream = Stream(recipe, Caption.view, tokens)
    batch = stream.on_after_batch_transfer(stream.train_stream(World())[0], 0)
    assert len(batch.images) == len(batch.keys) == 32
    assert 0 < batch.text_valid_B.sum() < 32
    model = Caption(recipe, tokens.vocab_size)
    features = model.encode(batch)
    assert (features["num_told"] > 0).equal(batch.text_valid_B)
    assert 3 < _loss(model, batch) < 12
