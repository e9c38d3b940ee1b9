"""UrFound: what is hidden and counted, against its own numbers; what reaches what; the switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.models.words import hide_words, with_end_token
from fundusfm.objectives.base import warmup_cosine
from fundusfm.objectives.urfound import LossOver, UrFound
from fundusfm.recipe.phrases import knowledge_prompt
from fundusfm.recipe.schema import Fidelity, OptimConfig, TextConfig, TextKind
from fundusfm.stream.tokens import load_tokens
from fundusfm.stream.view_prompt import PromptBatch
from tests.goldens import load
from tests.models.bert import BERT_FOLDER, needs_bert
from tests.objectives.tiny_masked import MASK_ID, VOCAB_SIZE, batch_for, masked_recipe

RELEASED = {"fidelity": Fidelity.released, "loss_over": LossOver.all}


def _urfound(**objective: Any) -> UrFound:
    torch.manual_seed(0)
    return UrFound(masked_recipe("urfound", **objective), VOCAB_SIZE).double()


def _batch(count: int = 8) -> PromptBatch:
    batch = batch_for("urfound", count)
    assert isinstance(batch, PromptBatch)
    return batch


def test_golden__hidden_words() -> None:
    """Whole words, the end token among them, with the draws of the published code."""
    arrays, told = load("urfound/token_hiding")
    golden = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mask_BT = golden["attention_mask"].bool()
    starts_BT = mask_BT & ~golden["is_continuation"].bool()
    word_BT = (starts_BT.cumsum(1) - 2).masked_fill(~mask_BT, -1)
    last_B = mask_BT.sum(1) - 1
    word_BT[torch.arange(len(last_B)), last_B] = -1  # as our tokenizers number words
    length = mask_BT.shape[1]
    hidden_BT = hide_words(golden["uniform_draws"], with_end_token(word_BT, mask_BT, length), 0.5)
    found = golden["token_ids"].masked_fill(hidden_BT, told["scalars"]["hidden_id"])
    assert found.equal(golden["hidden_ids"])
    assert (with_end_token(word_BT, mask_BT, length).amax(1) + 1).equal(golden["draws_used"])
    assert not hide_words(golden["uniform_draws"], word_BT, 0.5)[torch.arange(len(last_B)), last_B].any()


def test_end_token__never_in_the_last_column() -> None:
    word_BT = torch.tensor([[-1, 0, 1, -1], [-1, 0, -1, -1]])
    mask_BT = torch.tensor([[True] * 4, [True, True, True, False]])
    found = with_end_token(word_BT, mask_BT, 4)
    assert found.tolist() == [[-1, 0, 1, -1], [-1, 0, 1, -1]]


def test_golden__prompts() -> None:
    """The sentence around a category; which description stands for one is the dictionary's matter."""
    for item in load("urfound/prompts")[1]["items"]:
        facts = item["item"]
        attribute = next(iter(facts["attributes"]), "")
        for category in facts["categories"] or [""]:
            modality = "OCT" if attribute == "OCT" else "CFP"
            word = "" if attribute == "OCT" else attribute
            assert knowledge_prompt("en", modality, category, word) in {p["text"] for p in item["prompts"]}


@needs_bert
def test_golden__token_ids_of_every_prompt() -> None:
    """Descriptions that stand for a category included, with the published vocabulary."""
    arrays, told = load("urfound/prompts")
    facts = told["scalars"]["statistics"]
    tokens = load_tokens(str(BERT_FOLDER), facts["padded_length"])
    assert (tokens.vocab_size, tokens.mask_id) == (facts["vocab_size_tokenizer"], facts["true_mask_id"])
    texts, item_index = [], []
    for number, item in enumerate(told["items"]):
        is_oct = item["item"]["attributes"] == ["OCT"]
        attribute = "" if is_oct else next(iter(item["item"]["attributes"]), "")
        for prompt in item["prompts"]:
            phrase = prompt["text"].partition("shows " if is_oct else "photograph of ")[2]
            texts.append(knowledge_prompt("en", "OCT" if is_oct else "CFP", phrase, attribute))
            item_index.append(number)
    token_BT, mask_BT, _ = tokens.with_words(texts)
    assert token_BT.tolist() == arrays["token_ids"].tolist()
    assert mask_BT.equal(token_BT != 0)
    assert item_index == arrays["item_index"].tolist()
    padded_BT, _, _ = tokens.with_words(texts, padded=True)
    assert padded_BT.shape == (len(texts), facts["padded_length"])
    lengths = dict(zip(texts, mask_BT.sum(1).tolist(), strict=True))
    of_scans = [length for text, length in lengths.items() if "Tomography" in text]
    assert sorted(of_scans) == sorted(facts["oct_tokens"])


def test_golden__schedule() -> None:
    arrays, told = load("urfound/schedules")
    facts = told["scalars"]["pretrain"]
    factor = warmup_cosine(OptimConfig(warmup_steps=facts["warmup_epochs"]), facts["epochs"], first=0)
    for epoch, rate in zip(arrays["pretrain_epoch"], arrays["pretrain_lr"], strict=True):
        assert facts["lr"] * factor(epoch) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_golden__parameters_and_decay_at_the_published_size() -> None:
    """All of the published model but its unused pooler; and the published rule of what decays."""
    facts = load("urfound/schedules")[1]["scalars"]
    sizes = {"decoder_width": 768, "decoder_depth": 4, "decoder_heads": 6}
    recipe = masked_recipe("urfound", {}, **sizes, **RELEASED)
    recipe.data.image_size = 224
    recipe.model.text = TextConfig(layers=6, width=384, heads=6, mlp_width=1536, max_positions=100)
    with torch.device("meta"):
        model = UrFound(recipe, 30000)
    pooler = 384 * 384 + 384
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision.trunk.pos_embed", "decoder.pos_embed"}
    assert sum(p.numel() for p in model.parameters()) == facts["params_total"] - pooler
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == facts["params_trainable"] - pooler
    decayed, spared = (group["params"] for group in model.optimiser_groups())
    assert (len(decayed), len(spared)) == (facts["n_decay"] - 1, facts["n_no_decay"] - 1)


def test_words__a_matter_of_the_sample() -> None:
    urfound, batch = _urfound(), _batch()
    hidden_BT = urfound.hidden_words(batch)
    assert torch.cat([urfound.hidden_words(piece) for piece in batch.pieces(3)]).equal(hidden_BT)
    assert hidden_BT.any()
    assert not hidden_BT[~batch.text_valid_B].any()
    assert not hidden_BT[batch.word_BT < 0].any()
    pairs = hidden_BT[:, 1:11].view(len(hidden_BT), 5, 2)
    whole = (batch.word_BT >= 0)[:, 1:11].view(pairs.shape).all(2)
    assert pairs[whole].all(1).equal(pairs[whole].any(1)), "a piece of a word is hidden without the other"


def test_loss_of_words__scores_where_words_are_hidden_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    urfound, batch = _urfound().eval(), _batch()
    seen: list[int] = []
    urfound.words.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    counts: dict[LossOver, Tensor] = {}
    for over in LossOver:
        monkeypatch.setattr(urfound.config, "loss_over", over)
        counts[over] = urfound.encode(batch)["word_count"]
    hidden_BT, valid_B1 = urfound.hidden_words(batch), batch.text_valid_B[:, None]
    wanted = [hidden_BT, batch.mask_BT & valid_B1, torch.ones_like(hidden_BT) & valid_B1]
    assert seen == [int(counted.sum()) for counted in wanted]
    assert all(counts[over].equal(c.sum(1)) for over, c in zip(LossOver, wanted, strict=True))


def test_image__reaches_the_words_through_visible_patches_alone() -> None:
    """Words feel the visible pixels of their own image, and no hidden one; the encoder learns from words."""
    urfound, batch = _urfound(image_weight=0.0).eval(), _batch(2)
    batch.text_valid_B[:] = True
    batch.images.requires_grad_()
    error_B = urfound.encode(batch)["word_error"]
    (gradient,) = torch.autograd.grad(error_B[0], batch.images, retain_graph=True)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0
    error_B.sum().backward()
    assert urfound.trunk.patch_embed.proj.weight.grad.abs().sum() > 0
    with pytest.raises(AttributeError):
        urfound.decoder  # noqa: B018 - nothing is built for a term that is left out


def test_hidden_words__their_tokens_do_not_leak() -> None:
    """Other words in hidden places change the truth, and not what is read."""
    urfound, batch = _urfound().eval(), _batch()
    hidden_BT = urfound.hidden_words(batch)
    scores: list[Tensor] = []
    urfound.words.register_forward_hook(lambda module, given, out: scores.append(out.detach()))
    urfound.encode(batch)
    batch.token_BT = torch.where(hidden_BT, (batch.token_BT + 1) % VOCAB_SIZE, batch.token_BT)
    urfound.encode(batch)
    assert scores[0].equal(scores[1])


def test_released__its_own_token_length_and_table() -> None:
    urfound, batch = _urfound(**RELEASED).eval(), _batch()
    shown: list[Tensor] = []
    urfound.text.trunk.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append(kwargs["input_ids"]), with_kwargs=True
    )
    batch.text_valid_B[:] = True
    features = urfound.encode(batch)
    assert (features["word_count"] == batch.token_BT.shape[1]).all()
    hidden_BT = urfound.hidden_words(batch)
    assert (shown[0][hidden_BT] == 3).all()
    ends = batch.mask_BT.sum(1) - 1
    assert hidden_BT[torch.arange(len(ends)), ends][::3].any(), "a short text's end token may be hidden"
    assert urfound.config.view_options() == {"scale": 2, "source": "labels", "bare": True, "padded": True}
    corrected = _urfound()
    assert not corrected.decoder.pos_embed.allclose(urfound.decoder.pos_embed)
    assert MASK_ID != 3


@pytest.mark.parametrize("left_out", ["image_weight", "text_weight"])
def test_one_term__the_other_is_not_built(left_out: str) -> None:
    urfound = _urfound(**{left_out: 0.0})
    terms = urfound.loss_terms(_batch())
    assert list(terms) == ["loss_words" if left_out == "image_weight" else "loss_patches"]
    urfound.total_loss(terms).backward()
    assert all(p.grad is not None for p in urfound.parameters() if p.requires_grad)
    assert bool(urfound.pictures(_batch())) is (left_out == "text_weight")


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ({"word_probability": 0.0}, "word_probability"),
        ({"image_weight": 0.0, "text_weight": 0.0}, "image_weight"),
        ({"target_scale": 0}, "target_scale"),
        ({"fidelity": Fidelity.released}, "loss_over"),
    ],
)
def test_config__impossible_values_named(objective: dict[str, Any], key: str) -> None:
    assert list(masked_recipe("urfound", **objective).objective.impossible()) == [key]


def test_clip_text_tower__refused() -> None:
    recipe = masked_recipe("urfound")
    recipe.model.text.kind = TextKind.clip
    with pytest.raises(UserError, match="BERT"):
        UrFound(recipe, VOCAB_SIZE)
