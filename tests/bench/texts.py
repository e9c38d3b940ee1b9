"""Texts in shared rows beside padded texts: time and tokens of the text tower, forward and backward.

    python tests/bench/texts.py [--quick]

One thread, float32, dropout as in training. The variants take turns; times are processor seconds of the best
round, so another job on the machine does not decide. `mixed`: lengths like those of reports (log-normal, cut
at the context), `alike`: all within a tenth of the context, the case in which packing has nothing to gain.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fundusfm.models.text import TextTower, build_text
from fundusfm.recipe.schema import TextConfig

VOCAB_SIZE, CONTEXT = 21128, 100


def texts(kind: str, num_texts: int) -> tuple[Tensor, Tensor]:
    """token_BT and mask_BT, padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    if kind == "mixed":
        length_B = (torch.randn(num_texts, generator=generator) * 0.5 + 3.6).exp()
    else:
        length_B = CONTEXT - 10 * torch.rand(num_texts, generator=generator)
    length_B = length_B.round().clamp(3, CONTEXT).long()
    token_BT = torch.randint(5, VOCAB_SIZE, (num_texts, int(length_B.max())), generator=generator)
    mask_BT = torch.arange(token_BT.shape[1]) < length_B[:, None]
    return token_BT.masked_fill(~mask_BT, 0), mask_BT


def padded(tower: TextTower, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The first token's state by transformers itself."""
    state_BTW: Tensor = tower.trunk(input_ids=token_BT, attention_mask=mask_BT).last_hidden_state
    return state_BTW[:, 0]


def cpu_s(read: Callable[[], Tensor]) -> float:
    """Processor seconds of one forward and backward pass."""
    begin_s = time.process_time()
    read().sum().backward()
    return time.process_time() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    num_texts, rounds = (32, 2) if quick else (128, 3)
    tower = build_text(TextConfig(layers=4, width=384, heads=6, mlp_width=1536), VOCAB_SIZE).train()
    counts: list[int] = []
    tower.trunk.register_forward_pre_hook(
        lambda _, __, given: counts.append(given["input_ids"].numel()), with_kwargs=True
    )
    table = Table("lengths", "real tokens", "variant", "tokens computed", "CPU ms", "of padded")
    for kind in ("mixed", "alike"):
        token_BT, mask_BT = texts(kind, num_texts)
        ways = {
            "padded": lambda t=token_BT, m=mask_BT: padded(tower, t, m),
            "packed": lambda t=token_BT, m=mask_BT: tower(t, m),
        }
        turns = [{way: cpu_s(read) for way, read in ways.items()} for _ in range(rounds)]
        best = {way: min(turn[way] for turn in turns) for way in ways}
        for way, read in ways.items():
            counts.clear()
            read()
            share = best[way] / best["padded"]
            cells = (f"{mask_BT.sum():,}", way, f"{counts[0]:,}", f"{1000 * best[way]:,.0f}", f"{share:.2f}")
            table.add_row(kind, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
