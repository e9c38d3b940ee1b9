"""What a run was made with: versions, revision, sizes. Saved with checkpoints and shown at the start."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import fundusfm

PACKAGES = ("torch", "pytorch-lightning", "timm", "transformers", "tokenizers", "numpy")


def made_with() -> dict[str, str]:
    """Versions of what shapes the numbers, and the revision of the code."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "fundusfm": fundusfm.__version__,
        "revision": revision(),
        "python": platform.python_version(),
        **versions,
    }


def revision() -> str:
    """Git revision of the installed code, with `+` if it was changed since; empty outside a checkout."""
    folder = Path(fundusfm.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def where_it_runs(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({platform.node()})"
    return f"CPU, {torch.get_num_threads()} threads ({platform.node()})"


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Trained parameters and all parameters."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
