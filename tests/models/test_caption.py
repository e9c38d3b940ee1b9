"""The writer beside torch's own transformer, its words one by one, and the norm of the published code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fundusfm.models.caption import Attention, Captioner, CaptionSizes, UnbiasedNorm, waves

SIZES = CaptionSizes(layers=2, width=16, heads=4, mlp_width=24, dropout=0.1, patch_dropout=0.1)
FEATURES, VOCAB = 12, 30


def _captioner(**changes: object) -> Captioner:
    torch.manual_seed(0)
    sizes = CaptionSizes(**{**vars(SIZES), **changes})  # type: ignore[arg-type]
    return Captioner(FEATURES, VOCAB, sizes).double().eval()


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    patch_BPF = torch.randn(3, 5, FEATURES, generator=generator, dtype=torch.float64)
    return patch_BPF, torch.randint(VOCAB, (3, 7), generator=generator)


def _fill(theirs: nn.MultiheadAttention, ours: Attention) -> None:
    three = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in three]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in three]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


@torch.no_grad()
def _torchs(ours: Captioner, patch_BPF: Tensor, token_BT: Tensor) -> Tensor:
    """The same numbers through torch's layers with the norm first."""
    options = {"activation": "relu", "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-6}
    shape = (SIZES.width, SIZES.heads, SIZES.mlp_width, 0.0)
    x_BPW = ours.read(patch_BPF)
    x_BPW = x_BPW + waves(x_BPW, 0)
    for own in ours.encoder:
        layer = nn.TransformerEncoderLayer(*shape, **options).double().train()  # type: ignore[arg-type]
        _fill(layer.self_attn, own.attention)
        pairs = zip(
            (layer.linear1, layer.linear2, layer.norm1, layer.norm2),
            (own.mlp[0], own.mlp[3], *own.norms),
            strict=True,
        )
        for part, its in pairs:
            part.load_state_dict(its.state_dict())
        x_BPW = layer(x_BPW)
    memory_BPW = ours.encoder_norm(x_BPW)
    x_BTW = ours.embed(token_BT) * SIZES.width**0.5
    x_BTW = x_BTW + waves(x_BTW, 0)
    causal_TT = nn.Transformer.generate_square_subsequent_mask(token_BT.shape[1], dtype=torch.float64)
    for own in ours.decoder:
        layer = nn.TransformerDecoderLayer(*shape, **options).double().train()  # type: ignore[arg-type]
        _fill(layer.self_attn, own.words)
        _fill(layer.multihead_attn, own.patches)
        pairs = zip(
            (layer.linear1, layer.linear2, layer.norm1, layer.norm2, layer.norm3),
            (own.mlp[0], own.mlp[3], *own.norms),
            strict=True,
        )
        for part, its in pairs:
            part.load_state_dict(its.state_dict())
        x_BTW = layer(x_BTW, memory_BPW, tgt_mask=causal_TT)
    return ours.output(ours.decoder_norm(x_BTW))


def test_states__those_of_torchs_transformer() -> None:
    captioner, (patch_BPF, token_BT) = _captioner(), _inputs()
    with torch.no_grad():
        for norm in [m for m in captioner.modules() if isinstance(m, nn.LayerNorm)]:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    found = captioner.output(captioner.states(token_BT, captioner.encode(patch_BPF)))
    torch.testing.assert_close(found, _torchs(captioner, patch_BPF, token_BT), rtol=1e-10, atol=1e-12)


def test_states__no_word_knows_a_later_one() -> None:
    captioner, (patch_BPF, token_BT) = _captioner(), _inputs()
    patches = captioner.encode(patch_BPF)
    whole_BTW = captioner.states(token_BT, patches)
    other_BT = token_BT.clone()
    other_BT[:, 4:] = (other_BT[:, 4:] + 1) % VOCAB
    changed_BTW = captioner.states(other_BT, patches)
    torch.testing.assert_close(changed_BTW[:, :4], whole_BTW[:, :4])
    assert (changed_BTW[:, 4:] - whole_BTW[:, 4:]).abs().min(dim=-1).values.max() > 1e-3


@pytest.mark.parametrize("unbiased", [False, True])
def test_step__word_by_word_as_in_training(unbiased: bool) -> None:
    """With two rows an image that change places half-way, as beams do."""
    captioner, (patch_BPF, token_BT) = _captioner(unbiased_norm=unbiased), _inputs()
    token_RT = torch.stack([token_BT, token_BT.flip(1)], dim=1).flatten(0, 1)
    whole_BTW = captioner.states(token_RT, captioner.encode(patch_BPF.repeat_interleave(2, 0)))
    wanted_RTV = captioner.output(whole_BTW).float().log_softmax(dim=-1)
    state, order_R = captioner.begin(patch_BPF, 2), torch.arange(6)
    for place in range(token_RT.shape[1]):
        if place == 3:
            swapped_R = torch.tensor([1, 0, 3, 2, 4, 4])
            state, order_R = state.rows(swapped_R), order_R[swapped_R]
        log_RV, state = captioner.step(token_RT[order_R, place], state)
        torch.testing.assert_close(log_RV, wanted_RTV[order_R, place])


def test_patches__their_places_are_told_or_not() -> None:
    patch_BPF, token_BT = _inputs()
    for told in (False, True):
        captioner = _captioner(place_patches=told)
        one, other = (captioner.states(token_BT, captioner.encode(p)) for p in (patch_BPF, patch_BPF.flip(1)))
        assert torch.allclose(one, other, atol=1e-10) is not told


def test_unbiased_norm__by_numpy() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    norm = UnbiasedNorm(6, eps=0.1).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    raw = x.numpy()
    wanted = (raw - raw.mean(1, keepdims=True)) / (raw.std(1, ddof=1, keepdims=True) + 0.1)
    wanted = wanted * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    torch.testing.assert_close(norm(x).detach(), torch.from_numpy(wanted))


def test_waves__by_the_formula() -> None:
    found = waves(torch.zeros(1, 3, 6, dtype=torch.float64), 5)
    for row, place in enumerate((5, 6, 7)):
        for pair in range(3):
            angle = torch.tensor(place / 10000 ** (2 * pair / 6), dtype=torch.float64)
            torch.testing.assert_close(found[row, 2 * pair], angle.sin())
            torch.testing.assert_close(found[row, 2 * pair + 1], angle.cos())
