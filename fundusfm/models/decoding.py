"""Writing with a model that gives the next token: the likeliest one each time, or several beams at once.

A step takes the last token of every row and a state, and gives the log-probability of every next token and
the state after it. Nothing is drawn at random.

Legend: B texts, K beams of a text, R rows (B K, text by text), V vocabulary, T tokens so far, n an n-gram.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class State(Protocol):
    """What a step keeps; `rows` takes those of other rows of the same text."""

    def rows(self, row_R: Tensor) -> State: ...


S = TypeVar("S", bound=State)
Step = Callable[[Tensor, S], tuple[Tensor, S]]


@dataclass(frozen=True)
class Writing:
    """How to write. `begin` stands before every text, `end` after it; they may be one token.

    At most `max_tokens` are written, the end included. `beams`: 1 takes the likeliest token each time.
    `block_ngrams`: no n-gram of this many tokens is written twice; 0 allows all.
    `length_power`: a text's log-probability is divided by this power of its number of tokens, so that long
    texts are not at a disadvantage; 0 compares the sums.
    """

    begin: int
    end: int
    max_tokens: int
    beams: int = 1
    block_ngrams: int = 0
    length_power: float = 0.0


@torch.no_grad()
def write(step: Step[S], state: S, num_texts: int, how: Writing, device: torch.device) -> list[list[int]]:
    """The tokens of each text, without its begin and end. `state` has `how.beams` rows a text."""
    search = _greedy if how.beams == 1 else _beams
    token_BT = search(step, state, num_texts, how, device)
    return [_until(token_T, how.end) for token_T in token_BT.tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    written = tokens[1:]
    return written[: written.index(end)] if end in written else written


def _greedy(step: Step[S], state: S, num_texts: int, how: Writing, device: torch.device) -> Tensor:
    token_BT = torch.full((num_texts, 1), how.begin, device=device)
    ended_B = torch.zeros(num_texts, dtype=torch.bool, device=device)
    for _ in range(how.max_tokens):
        log_BV, state = step(token_BT[:, -1], state)
        token_B = block_repeats(log_BV, token_BT, how.block_ngrams).argmax(dim=-1)
        token_BT = torch.cat([token_BT, torch.where(ended_B, how.end, token_B)[:, None]], dim=1)
        ended_B = ended_B | (token_B == how.end)
        if ended_B.all():
            break
    return token_BT


def _beams(step: Step[S], state: S, num_texts: int, how: Writing, device: torch.device) -> Tensor:
    """Each time the best beams of all continuations stay. A text that has ended competes with the others."""
    num_rows = num_texts * how.beams
    first_R = torch.arange(num_texts, device=device).repeat_interleave(how.beams) * how.beams
    token_RT = torch.full((num_rows, 1), how.begin, device=device)
    score_BK = torch.full((num_texts, how.beams), -torch.inf, device=device)
    score_BK[:, 0] = 0.0  # all beams begin alike: one of them is enough
    length_BK = torch.zeros_like(score_BK)
    ended_BK = torch.zeros_like(score_BK, dtype=torch.bool)
    for _ in range(how.max_tokens):
        log_RV, state = step(token_RT[:, -1], state)
        log_RV = block_repeats(log_RV, token_RT, how.block_ngrams)
        log_BKV = log_RV.view(num_texts, how.beams, -1)
        only_end_V = torch.full_like(log_BKV[0, 0], -torch.inf).index_fill_(0, _index(how.end, device), 0.0)
        sum_BKV = score_BK[..., None] + torch.where(ended_BK[..., None], only_end_V, log_BKV)
        grown_BK = length_BK + ~ended_BK
        fair_BKV = sum_BKV / grown_BK[..., None] ** how.length_power
        chosen_BK = fair_BKV.flatten(1).topk(how.beams, dim=1).indices
        parent_BK, token_BK = chosen_BK // log_RV.shape[1], chosen_BK % log_RV.shape[1]
        row_R = first_R + parent_BK.flatten()
        token_RT = torch.cat([token_RT[row_R], token_BK.flatten()[:, None]], dim=1)
        score_BK, length_BK = sum_BKV.flatten(1).gather(1, chosen_BK), grown_BK.gather(1, parent_BK)
        ended_BK = token_BK == how.end
        state = state.rows(row_R)  # type: ignore[assignment]
        if (ended_BK | score_BK.isneginf()).all():
            break
    best_B = (score_BK / length_BK**how.length_power).argmax(dim=1)
    return token_RT[torch.arange(num_texts, device=device) * how.beams + best_B]


def _index(value: int, device: torch.device) -> Tensor:
    return torch.tensor([value], device=device)


def block_repeats(log_RV: Tensor, token_RT: Tensor, num: int) -> Tensor:
    """`log_RV` with minus infinity for tokens that would complete an n-gram of `num` tokens a second time."""
    if num == 0 or token_RT.shape[1] < num:
        return log_RV
    # Every n-gram so far: the row may now end as one of them began.
    gram_RTn = token_RT.unfold(1, num, 1)
    is_again_RT = (gram_RTn[..., :-1] == token_RT[:, None, -(num - 1) :]).all(dim=-1)
    blocked_RV = torch.zeros_like(log_RV, dtype=torch.int8).scatter_reduce(
        1, gram_RTn[..., -1], is_again_RT.to(torch.int8), reduce="amax"
    )
    return log_RV.masked_fill(blocked_RV.bool(), -torch.inf)
