"""Weight files: read without running anything, loaded only if every key fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fundusfm.errors import UserError
from fundusfm.models.weights import load_strictly, read_weights

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("form", ["flat", "wrapped", "safetensors"])
def test_read__every_form(tmp_path: Path, form: str) -> None:
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(STATE, file)
    else:
        torch.save(STATE if form == "flat" else {"epoch": 3, "state_dict": STATE}, file)
    found = read_weights(file)
    assert found.keys() == STATE.keys()
    assert all(found[name].equal(STATE[name]) for name in STATE)


class _Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code__refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "more": _Trap(tmp_path / "sprung")}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half an archive"])
def test_damaged__one_message(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="the weight file cannot be"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_absent__one_message(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {"weight": 3}, {"state_dict": 5}])
def test_no_mapping_of_tensors__one_message(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "w.pt")


def test_strict__all_faults_in_one_message(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError) as refused:
        load_strictly(module, {"weight": torch.ones(4, 4), "spare": torch.ones(1)}, tmp_path / "w.pt")
    for part in ("1 missing (bias)", "1 not known (spare)", "weight (4, 4) for (2, 3)", "w.pt"):
        assert part in str(refused.value)
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())


def test_strict__loads(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    load_strictly(module, STATE, tmp_path)
    assert module.weight.equal(STATE["weight"])
    assert module.bias.equal(STATE["bias"])
