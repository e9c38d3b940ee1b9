"""What a GPU needs of the fused loss, as far as it can be tested without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import contrastive as script
from tests.losses.fused import needs_triton

PROJECT = Path(__file__).parents[2]

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("sum_tiles", {"NUM_MASKS": 0}),
        ("weigh_tiles", {"NUM_MASKS": 0, "IS_PAIRED": True, "IS_SPLIT": False}),
        ("weigh_tiles", {"NUM_MASKS": 2, "IS_PAIRED": False, "IS_SPLIT": True}),
    ],
)
def test_kernels_compile__for_hopper(
    name: str, constants: dict[str, int], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler needs no GPU. Products of 16 bits use its tensor cores, those of 32 bits keep all 32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fundusfm.losses import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name).fn
    constants = constants | {"EM": 64, "EN": 64, "EK": 32}
    types = {"a": dtype, "b": dtype, "ids_a": "i64", "ids_b": "i64", "partner": "i32"}
    types["grad"] = "fp16" if dtype == "bf16" else "fp32"
    numbers = ("num_rows", "num_columns", "width", "stride")
    signature = {n: "i32" if n in numbers else "fp32" for n in kernel.arg_names}
    pointers = {*types, "row_sums", "column_sums", "row_weight", "column_weight", "lost"} & {*signature}
    signature |= {n: "*" + types.get(n, "fp32") for n in pointers} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert ("wgmma" in code) == (dtype == "bf16")
    assert "tf32" not in code


def test_script__at_toy_sizes() -> None:
    command = [sys.executable, "-m", "tests.gpu.contrastive", "--smoke"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right  torch.") == 6
    for way in ("triton", "tiled", "dense", "cuBLAS products"):
        assert sum(way in line and "│" in line for line in done.stdout.splitlines()) == 2, way
    assert "auto " in done.stdout
    assert "goal 60%" in done.stdout


def test_script__without_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().out
