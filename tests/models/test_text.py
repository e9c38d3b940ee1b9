"""Text towers: a BERT of given sizes, or one from a transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, CLIPTextConfig, CLIPTextModel, RobertaConfig, RobertaModel

from fundusfm.errors import UserError
from fundusfm.models.text import TextTower, build_text
from fundusfm.recipe.schema import TextConfig, TextKind
from tests.models.bert import BERT_FOLDER, needs_bert

SMALL = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "max_positions": 24, "dropout": 0.0}
VOCAB_SIZE = 50


def _tower(vocab_size: int = VOCAB_SIZE, **config: Any) -> TextTower:
    torch.manual_seed(0)
    return build_text(TextConfig(**{**SMALL, **config}), vocab_size)


def _tokens(num_padded: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    token_BT = torch.randint(5, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(1))
    token_BT[1, 6:] = 0
    token_BT = torch.nn.functional.pad(token_BT, (0, num_padded))
    return token_BT, token_BT != 0


def test_equals_transformers_bert() -> None:
    tower = _tower().eval()
    reference = BertModel(tower.trunk.config, add_pooling_layer=False).eval()
    reference.load_state_dict(tower.trunk.state_dict())
    token_BT, mask_BT = _tokens()
    wanted = reference(input_ids=token_BT, attention_mask=mask_BT.long()).last_hidden_state[:, 0]
    torch.testing.assert_close(tower(token_BT, mask_BT), wanted, rtol=1e-5, atol=1e-6)
    assert not any("pooler" in name for name in tower.state_dict())


def test_equals_transformers_clip() -> None:
    """Pooled as transformers does it, at the first end token, here the token 49."""
    tower = _tower(kind=TextKind.clip).eval()
    config = tower.trunk.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (2, 4, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB_SIZE, 24)
    config.eos_token_id = VOCAB_SIZE - 1
    reference = CLIPTextModel(config).eval()
    reference.load_state_dict(tower.trunk.state_dict())
    token_BT, mask_BT = _tokens()
    token_BT = token_BT.clamp(max=VOCAB_SIZE - 2)
    token_BT[torch.arange(3), mask_BT.sum(1) - 1] = VOCAB_SIZE - 1
    wanted = reference(input_ids=token_BT, attention_mask=mask_BT.long()).pooler_output
    torch.testing.assert_close(tower(token_BT, mask_BT), wanted, rtol=1e-5, atol=1e-6)
    assert _tower(kind=TextKind.clip, dropout=0.3).trunk.config.attention_dropout == 0.3


def test_clip__padding_on_either_side_is_not_read() -> None:
    tower = _tower(kind=TextKind.clip).eval()
    token_BT, mask_BT = _tokens()
    wanted = tower(token_BT, mask_BT)
    torch.testing.assert_close(tower(*_tokens(8)), wanted, rtol=1e-5, atol=1e-6)
    other_BT = torch.where(mask_BT, token_BT, 7)
    torch.testing.assert_close(tower(other_BT, mask_BT), wanted, rtol=1e-5, atol=1e-6)
    last_BT = token_BT.clone()
    last_BT[1, 5] = 9
    assert not torch.isclose(tower(last_BT, mask_BT)[1], wanted[1]).all(), "the sixth token of six speaks"


def test_clip__weights_from_a_folder(tmp_path: Path) -> None:
    saved = _tower(kind=TextKind.clip).eval()
    saved.trunk.save_pretrained(tmp_path)
    tower = _tower(kind=TextKind.clip, weights=str(tmp_path), width=8, heads=2).eval()
    assert tower(*_tokens()).equal(saved(*_tokens()))
    assert tower.max_tokens == 24
    (tmp_path / "model.safetensors").unlink()
    smaller = CLIPTextModel(CLIPTextConfig(**{**saved.trunk.config.to_dict(), "num_hidden_layers": 1}))
    smaller.save_pretrained(tmp_path / "smaller")
    (tmp_path / "smaller" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="16 weights are missing"):
        _tower(kind=TextKind.clip, weights=str(tmp_path))


@pytest.mark.parametrize("kind", list(TextKind))
def test_weights_of_the_other_kind__refused(tmp_path: Path, kind: TextKind) -> None:
    other = TextKind.bert if kind is TextKind.clip else TextKind.clip
    _tower(kind=other).trunk.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"set model.text.kind to {other.value}"):
        _tower(kind=kind, weights=str(tmp_path))


def test_sizes_are_those_of_the_recipe() -> None:
    config = _tower().trunk.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB_SIZE, 32, 2)
    assert (config.num_attention_heads, config.intermediate_size, config.max_position_embeddings) == (
        4,
        64,
        24,
    )
    with_dropout = _tower(dropout=0.3).trunk.config
    assert (with_dropout.hidden_dropout_prob, with_dropout.attention_probs_dropout_prob) == (0.3, 0.3)


def test_padding_changes_nothing() -> None:
    tower = _tower().eval()
    torch.testing.assert_close(tower(*_tokens(8)), tower(*_tokens()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(TextKind))
def test_gradient_checkpointing__the_same_gradients(kind: TextKind) -> None:
    grads = []
    for checkpointing in (False, True):
        tower = _tower(kind=kind, gradient_checkpointing=checkpointing).train()
        marks = [getattr(m, "gradient_checkpointing", False) for m in tower.modules()]
        assert any(marks) is checkpointing
        tower(*_tokens()).square().sum().backward()
        grads.append({name: p.grad for name, p in tower.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_weights__from_a_folder(tmp_path: Path) -> None:
    saved = _tower().eval()
    saved.trunk.save_pretrained(tmp_path)
    tower = _tower(weights=str(tmp_path), width=8, heads=2).eval()
    assert tower.width == 32, "the folder brings its own sizes"
    assert all(module.training for module in _tower(weights=str(tmp_path)).modules())
    assert tower(*_tokens()).equal(saved(*_tokens()))


def test_vocabulary_larger_than_the_tower__refused(tmp_path: Path) -> None:
    _tower().trunk.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"51 tokens.*only {VOCAB_SIZE}"):
        _tower(vocab_size=51, weights=str(tmp_path))


@pytest.mark.parametrize("fault", ["absent", "no weights", "no BERT"])
def test_unusable_folder__refused(tmp_path: Path, fault: str) -> None:
    if fault != "absent":
        config = {"model_type": "bert" if fault == "no weights" else "no_such_model", "hidden_size": 32}
        (tmp_path / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "absent" if fault == "absent" else tmp_path
    with pytest.raises(UserError, match="cannot load the text tower"):
        _tower(weights=str(folder))


def test_max_tokens__counts_rows_that_stand_for_positions() -> None:
    assert _tower().max_tokens == 24
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=26, pad_token_id=1, **sizes))
    assert TextTower(roberta).max_tokens == 24  # the first two rows are padding's


@needs_bert
def test_real_weights__near_texts_are_near() -> None:
    from fundusfm.stream.tokens import load_tokens

    assert BERT_FOLDER is not None
    tokens = load_tokens(str(BERT_FOLDER), 32)
    tower = _tower(vocab_size=tokens.vocab_size, weights=str(BERT_FOLDER)).eval()
    texts = ["severe bleeding in the left eye", "heavy haemorrhage of the left eye", "the stock market fell"]
    with torch.no_grad():
        unit_BW = torch.nn.functional.normalize(tower(*tokens(texts)), dim=-1)
    cosine_BB = unit_BW @ unit_BW.T
    assert cosine_BB[0, 1] > cosine_BB[0, 2] + 0.1
