"""Numbers of the published code: `load("ret_clip/forward_tiny_f32")` gives arrays and their description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    description = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}, description


def load_parts(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A golden too large for one file: `name.0.npz`, `name.1.npz`, ...; `key@0`, `key@1`, ... are one array.

    Pixels, all multiples of 1/16, are kept as whole sixteenths in bytes.
    """
    description = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    cut: dict[str, list[np.ndarray]] = {}
    for number in range(len(list(FOLDER.glob(f"{name}.*.npz")))):
        with np.load(FOLDER / f"{name}.{number}.npz") as file:
            for key in file.files:
                cut.setdefault(key.partition("@")[0], []).append(file[key])
    arrays = {key: pieces[0] if len(pieces) == 1 else np.concatenate(pieces) for key, pieces in cut.items()}
    return {k: a.astype(np.float32) / 16 if a.dtype == np.int8 else a for k, a in arrays.items()}, description
