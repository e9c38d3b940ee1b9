"""The house keeps its rules, and each rule notices when it is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.rules import allowed_rooms, long_files, long_functions, prints, wrong_imports

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "fundusfm"
CODE = (PACKAGE, PROJECT / "tests")


def plant(root: Path, name: str, text: str) -> Path:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", [long_files, long_functions])
@pytest.mark.parametrize("root", CODE, ids=lambda root: root.name)
def test_sizes(rule: Callable[[Path], list[str]], root: Path) -> None:
    assert rule(root) == []


def test_imports_follow_the_data() -> None:
    assert wrong_imports(PACKAGE) == []


def test_library_does_not_print() -> None:
    assert prints(PACKAGE) == []


@pytest.mark.parametrize(("lines", "broken"), [(400, False), (401, True)])
def test_long_files__at_the_limit(tmp_path: Path, lines: int, broken: bool) -> None:
    assert bool(long_files(plant(tmp_path, "a/b.py", "x = 1\n" * lines))) is broken


@pytest.mark.parametrize(("lines", "broken"), [(50, False), (51, True)])
@pytest.mark.parametrize("head", ["def f():\n", "async def f():\n", "class A:\n  def f(self):\n"])
def test_long_functions__at_the_limit(tmp_path: Path, head: str, lines: int, broken: bool) -> None:
    code = head + "    x = 1\n" * (lines - 1)
    assert bool(long_functions(plant(tmp_path, "b.py", code))) is broken


def test_prints__planted(tmp_path: Path) -> None:
    assert prints(plant(tmp_path, "a.py", "def f():\n    print('x')\n"))
    assert not prints(plant(tmp_path / "other", "a.py", "def f(c):\n    c.print('x')\n"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("shards/a.py", "from fundusfm.stream.order import x"),
        ("shards/a.py", "import fundusfm.training.fit"),
        ("shards/synth/a.py", "from ...stream import order"),
        ("shards/a.py", "from fundusfm import stream"),
        ("shards/a.py", "from .. import stream"),
        ("stream/a.py", "def f():\n    from fundusfm.objectives import x"),
        ("stream/a.py", "from fundusfm.losses import contrastive_loss"),
        ("losses/a.py", "from fundusfm.shards.exam import Exam"),
        ("models/a.py", "from fundusfm.objectives.base import Objective"),
        ("recipe/a.py", "from fundusfm.shards.index import write_atomically"),
        ("errors.py", "from fundusfm.recipe.schema import Recipe"),
        ("training/a.py", "from fundusfm.evaluation import x"),
        ("evaluation/a.py", "from fundusfm.cli import main"),
        ("newroom/a.py", "from fundusfm.shards import x"),
    ],
)
def test_wrong_imports__planted(tmp_path: Path, file: str, line: str) -> None:
    assert wrong_imports(plant(tmp_path, file, line + "\n"))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cli.py", "from fundusfm.training.fit import pretrain"),
        ("stream/a.py", "from fundusfm.shards.exam import Exam\nfrom fundusfm.errors import UserError"),
        ("objectives/a.py", "from fundusfm.losses import x\nfrom fundusfm.models import y"),
        ("losses/a.py", "from fundusfm.models import y\nimport torch"),
        ("training/a.py", "from fundusfm.recipe.schema import Recipe\nfrom . import fit"),
        ("evaluation/a.py", "from fundusfm import __version__"),
        ("recipe/a.py", "from .schema import Recipe"),
    ],
)
def test_wrong_imports__allowed(tmp_path: Path, file: str, line: str) -> None:
    assert not wrong_imports(plant(tmp_path, file, line + "\n"))


def test_every_room_is_known() -> None:
    """A new room must take its place in the chain before it can import anything."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert all({"errors", "recipe"} <= allowed_rooms(room) for room in rooms - {"recipe"})
    assert rooms <= {"recipe", "losses", "models", *allowed_rooms("export")}
