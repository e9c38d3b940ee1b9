"""Beam search against every text there is, greedy writing, and n-grams that never come twice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fundusfm.models import decoding
from fundusfm.models.decoding import Writing, block_repeats, write

BEGIN, END, VOCAB = 0, 1, 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prefixes:
    """The state of a table of random numbers: the text and the tokens so far, as numbers."""

    text_R: Tensor
    code_R: Tensor

    def rows(self, row_R: Tensor) -> Prefixes:
        assert self.text_R[row_R].equal(self.text_R), "a row has changed its text"
        return Prefixes(self.text_R, self.code_R[row_R])


class Table:
    """Log-probabilities drawn for each text and prefix; `seen` has `begin` as 0 like everything before it."""

    def __init__(self, num_texts: int, longest: int, seed: int, end: int = END) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(num_texts, VOCAB ** (longest + 1), VOCAB, generator=generator)
        self.log = logits.double().log_softmax(dim=-1)
        self.num_texts, self.longest, self.end = num_texts, longest, end

    def start(self, beams: int) -> Prefixes:
        text_R = torch.arange(self.num_texts).repeat_interleave(beams)
        return Prefixes(text_R, torch.zeros_like(text_R))

    def step(self, token_R: Tensor, state: Prefixes) -> tuple[Tensor, Prefixes]:
        code_R = state.code_R * VOCAB + token_R
        return self.log[state.text_R, code_R], Prefixes(state.text_R, code_R)

    def score(self, text: int, tokens: tuple[int, ...]) -> float:
        """The log-probability of tokens, an end included where there is one."""
        total, code = 0.0, 0
        for token in tokens:
            total += float(self.log[text, code, token])
            code = code * VOCAB + token
        return total

    def all_texts(self) -> list[tuple[int, ...]]:
        """Everything that ends, or is cut at the limit."""
        others = [token for token in range(VOCAB) if token != self.end]
        ended = [(*t, self.end) for n in range(self.longest) for t in itertools.product(others, repeat=n)]
        return ended + list(itertools.product(others, repeat=self.longest))


def _write(table: Table, **how: float) -> list[list[int]]:
    options = Writing(begin=BEGIN, end=table.end, max_tokens=table.longest, **how)  # type: ignore[arg-type]
    return write(table.step, table.start(options.beams), table.num_texts, options, CPU)


def _repeats(tokens: tuple[int, ...], num: int) -> bool:
    grams = [tokens[i : i + num] for i in range(len(tokens) - num + 1)]
    return len(set(grams)) < len(grams)


@pytest.mark.parametrize("end", [END, BEGIN], ids=["end of its own", "end is begin"])
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_wide_beam__the_best_of_all_texts(power: float, block: int, end: int) -> None:
    table = Table(num_texts=5, longest=4, seed=3, end=end)
    found = _write(table, beams=VOCAB**4, length_power=power, block_ngrams=block)
    for text, tokens in enumerate(found):
        allowed = [t for t in table.all_texts() if not block or not _repeats((BEGIN, *t), block)]
        best = max(allowed, key=lambda t, row=text: table.score(row, t) / len(t) ** power)
        assert tokens == [token for token in best if token != end]


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("beams", [2, 3])
def test_narrow_beam__that_of_a_plain_search(beams: int, power: float) -> None:
    """Lists instead of tensors, one text at a time."""
    table = Table(num_texts=40, longest=5, seed=1)
    plain = []
    for text in range(table.num_texts):
        kept: list[tuple[int, ...]] = [()]
        for _ in range(table.longest):
            grown = [t for t in kept if END in t]
            grown += [(*t, token) for t in kept if END not in t for token in range(VOCAB)]
            kept = sorted(grown, key=lambda t, row=text: -table.score(row, t) / len(t) ** power)[:beams]
        plain.append([token for token in kept[0] if token != END])
    assert _write(table, beams=beams, length_power=power) == plain
    assert _write(table, beams=1) != plain, "a dead test"


def test_greedy__the_likeliest_token_each_time() -> None:
    table = Table(num_texts=16, longest=6, seed=2)
    assert _write(table, beams=1) == _plain_greedy(table)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_greedy__a_single_beam(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    table = Table(num_texts=16, longest=6, seed=2)
    greedy = _write(table, beams=1, block_ngrams=block)
    monkeypatch.setattr(decoding, "_greedy", decoding._beams)
    assert _write(table, beams=1, block_ngrams=block) == greedy


def _plain_greedy(table: Table) -> list[list[int]]:
    texts = []
    for text in range(table.num_texts):
        tokens: list[int] = []
        while len(tokens) < table.longest and END not in tokens:
            tokens.append(
                max(range(VOCAB), key=lambda t, p=tokens, row=text: table.score(row, (*p, t)))  # type: ignore[misc]
            )
        texts.append([token for token in tokens if token != END])
    return texts


@pytest.mark.parametrize("num", [2, 3, 4])
def test_block_repeats__by_hand(num: int) -> None:
    generator = torch.Generator().manual_seed(0)
    token_RT = torch.randint(3, (64, 9), generator=generator)
    blocked_RV = block_repeats(torch.zeros(64, 3), token_RT, num).isneginf()
    assert blocked_RV.any() and not blocked_RV.all()
    for row, tokens in enumerate(token_RT.tolist()):
        grams = {tuple(tokens[i : i + num]) for i in range(len(tokens) - num + 1)}
        for token in range(3):
            assert bool(blocked_RV[row, token]) is ((*tokens[1 - num :], token) in grams)


def test_block_repeats__nothing_to_repeat() -> None:
    log_RV = torch.randn(2, 5)
    assert block_repeats(log_RV, torch.tensor([[1, 2], [3, 3]]), 3).equal(log_RV)
    assert block_repeats(log_RV, torch.tensor([[1, 1, 1, 1]] * 2), 0).equal(log_RV)


@pytest.mark.parametrize("beams", [1, 3])
def test_no_trigram_comes_twice(beams: int) -> None:
    """A model that would say the same for ever."""
    log_V = torch.tensor([-9.0, -8.0, -0.1, -3.0]).log_softmax(dim=0)

    class Nothing:
        def rows(self, row_R: Tensor) -> Nothing:
            return self

    def step(token_R: Tensor, state: Nothing) -> tuple[Tensor, Nothing]:
        return log_V.expand(len(token_R), -1), state

    options = {"begin": BEGIN, "end": END, "max_tokens": 12, "beams": beams}
    free = write(step, Nothing(), 2, Writing(**options), CPU)  # type: ignore[arg-type]
    blocked = write(step, Nothing(), 2, Writing(**options, block_ngrams=3), CPU)  # type: ignore[arg-type]
    assert _repeats(tuple(free[0]), 3)
    assert not _repeats(tuple(blocked[0]), 3)
    assert blocked[0] == blocked[1]
    assert len(blocked[0]) > 4
