"""Weights from files into modules: strict about every key, and nothing in a file is ever executed."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.models.positions import resize_positions

_SHOWN = 6
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep their weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle of nothing else (wrapped by a checkpoint or not)."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Masked autoencoders save their command line with the weights: a plain record, which runs nothing.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _tensors_of(content)
    except OSError as error:
        raise UserError(f"the weight file cannot be opened: {error}", where=str(path)) from error
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        # What torch writes of a pickle that it will not open is long and advises to open it unsafely.
        is_foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it is no weight file, or holds more than tensors" if is_foreign else error
        raise UserError(
            f"the weight file cannot be read: {reason}",
            where=str(path),
            fix="give a safetensors file, or a pickle that holds tensors only",
        ) from error


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """The names and tensors that a file holds, bare or as a checkpoint's weights; ValueError if none."""
    wrappers = [key for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
    state = content[wrappers[0]] if wrappers else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds no mapping of names to tensors")
    return dict(state)


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: Path,
    *,
    may_lack: Callable[[str], bool] = lambda name: False,
    aligned: bool = True,
) -> list[str]:
    """Load `state` into `module`, position tables moved to its grid; UserError unless every key fits.

    `may_lack`: which names a file may lack altogether; those that it does are returned and keep their start.
    `aligned`: how tables are moved, see `resize_positions`.
    """
    own = module.state_dict()
    state = {name: _on_grid(name, tensor, own, aligned) for name, tensor in state.items()}
    missing = [k for k in own if k not in state]
    fresh = [k for k in missing if may_lack(k)]
    spare = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own if _differs(k, state, own)
    ]
    lacking = [k for k in missing if k not in fresh]
    faults = {"missing": lacking, "not known": spare, "of another shape": shapes}
    told = [f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])})" for what, keys in faults.items() if keys]
    if told:
        raise UserError(
            f"the weights do not fit the model: {'; '.join(told)}",
            where=str(where),
            fix="set the sizes under `model` to those of the file",
        )
    module.load_state_dict({**{name: own[name] for name in fresh}, **state})
    return fresh


def _differs(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return key in state and state[key].shape != own[key].shape


def _on_grid(name: str, tensor: Tensor, own: Mapping[str, Tensor], aligned: bool) -> Tensor:
    """A position table (1, P, D) resized to the module's number of positions; anything else as it is."""
    is_table = name.endswith("pos_embed") and name in own and tensor.ndim == own[name].ndim == 3
    if not is_table or tensor.shape[1] == own[name].shape[1]:
        return tensor
    return resize_positions(tensor[0], own[name].shape[1] - 1, aligned=aligned)[None]
