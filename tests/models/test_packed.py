"""Texts that share rows have the states and gradients of texts in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from fundusfm.models.packed import pack, plan_rows
from fundusfm.models.text import TextTower, build_text
from fundusfm.recipe.schema import TextConfig
from tests.models.bert import BERT_FOLDER, needs_bert

VOCAB_SIZE, LENGTHS = 50, (9, 2, 5, 3, 9, 4, 1, 2)
SMALL = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "max_positions": 24, "dropout": 0.0}


def _tower(**config: Any) -> TextTower:
    torch.manual_seed(0)
    return build_text(TextConfig(**{**SMALL, **config}), VOCAB_SIZE)


def _roberta() -> TextTower:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=26, pad_token_id=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    return TextTower(RobertaModel(config, add_pooling_layer=False))


def _texts(padding: int = 0, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    token_BT = torch.randint(5, vocab_size, (len(LENGTHS), 12), generator=generator)
    mask_BT = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    return token_BT.masked_fill(~mask_BT, padding), mask_BT


def _padded(tower: TextTower, token_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
    """All states by transformers itself, one text a row."""
    read = tower.trunk(input_ids=token_BT, attention_mask=mask_BT, output_hidden_states=True)
    return tuple(state.masked_fill(~mask_BT[:, :, None], 0) for state in read.hidden_states)


def _watched(tower: TextTower) -> list[int]:
    """Numbers of the tokens that the trunk will have been given, call by call."""
    counts: list[int] = []

    def count(_: object, __: object, given: dict[str, Any]) -> None:
        counts.append(given["input_ids"].numel())

    tower.trunk.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (7, 7, 7), (4, 4, 1, 1, 1, 1), tuple(range(1, 41))])
def test_plan_rows__every_place_once(lengths: tuple[int, ...]) -> None:
    size = max(lengths)
    rows, starts, num_rows = plan_rows(lengths, size)
    begun = zip(rows, starts, lengths, strict=True)
    taken = [(row, start + n) for row, start, length in begun for n in range(length)]
    assert len(set(taken)) == sum(lengths)
    assert all(0 <= row < num_rows and 0 <= place < size for row, place in taken)
    assert num_rows <= -(-sum(lengths) // size) + 1, "rows are nearly full"


def test_pack__nothing_to_save() -> None:
    token_BT = torch.ones(3, 8, dtype=torch.long)
    assert pack(token_BT, torch.ones(3, 8, dtype=torch.bool)) is None
    mask_BT = torch.arange(8) < torch.tensor([8, 5, 4])[:, None]
    assert pack(token_BT, mask_BT) is None, "no two of them fit into one row"
    assert pack(token_BT[:0], mask_BT[:0]) is None
    mask_BT[1] = False
    assert pack(token_BT, mask_BT) is None, "a text without tokens has no first one"


@pytest.mark.parametrize("tower", [_tower(), _roberta(), _tower(gradient_checkpointing=True)])
def test_equals_padded(tower: TextTower) -> None:
    """States and the gradients of all parameters; a tower that counts positions otherwise as well."""
    tower = tower.double().train()
    texts = _texts(padding=int(tower.trunk.config.pad_token_id or 0))
    weight_BTW = torch.randn(*texts[0].shape, tower.width, dtype=torch.float64)
    results = []
    for states in (tower.states(*texts), _padded(tower, *texts)):
        tower.zero_grad()
        sum((state_BTW * weight_BTW).sum() * (n + 1) for n, state_BTW in enumerate(states)).backward()
        results.append((states, {name: p.grad.clone() for name, p in tower.named_parameters()}))
    assert len(results[0][0]) == 3 and all(grad.any() for grad in results[1][1].values())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    counts = _watched(tower)
    first_BW = tower(*texts)
    torch.testing.assert_close(first_BW, results[1][0][-1][:, 0], rtol=1e-12, atol=1e-12)
    assert counts == [4 * 9], "35 tokens in four rows"


def test_equal_lengths__as_they_are() -> None:
    tower = _tower().eval()
    token_BT = _texts()[0][:, :1].expand(-1, 6).contiguous()
    mask_BT = torch.ones_like(token_BT, dtype=torch.bool)
    assert tower(token_BT, mask_BT).equal(_padded(tower, token_BT, mask_BT)[-1][:, 0])
    for state, wanted in zip(tower.states(token_BT, mask_BT), _padded(tower, token_BT, mask_BT), strict=True):
        assert state.equal(wanted)


def test_autocast__as_near_as_the_padded_states() -> None:
    tower, texts = _tower().train(), _texts()
    exact = _padded(tower, *texts)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        states = [tower.states(*texts)[-1], _padded(tower, *texts)[-1]]
        tower(*texts).sum().backward()
    packed_off, padded_off = ((state - exact).abs().max() for state in states)
    assert 0 < packed_off < 3 * padded_off
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_dropout__drawn_from_the_seed_and_of_the_same_share() -> None:
    tower, texts = _tower(dropout=0.3).train(), _texts()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(tower.states(*texts)[0])
    assert found[0].equal(found[1]) and not found[0].equal(found[2])
    held = found[0][texts[1]]
    assert 0.2 < (held == 0).double().mean() < 0.4


def test_encoder_without_such_masks__padded() -> None:
    tower, texts = _tower().eval(), _texts()
    tower.trunk.set_attn_implementation("eager")
    counts = _watched(tower)
    torch.testing.assert_close(tower(*texts), _padded(tower, *texts)[-1][:, 0])
    assert counts == [texts[0].numel()] * 2


@needs_bert
def test_real_weights__equal_padded() -> None:
    tower = _tower(weights=str(BERT_FOLDER)).double().eval()
    texts = _texts(vocab_size=30000)
    counts = _watched(tower)
    with torch.no_grad():
        torch.testing.assert_close(tower.states(*texts), _padded(tower, *texts), rtol=1e-12, atol=1e-12)
    assert counts == [4 * 9, texts[0].numel()]
