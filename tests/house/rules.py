"""The rules of the house as functions of a source tree: each returns the places that break it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAX_FUNCTION_LINES, MAX_FILE_LINES = 50, 400
PACKAGE = "fundusfm"
PARTS = ("losses", "models")
CHAIN = ("shards", "stream", "objectives", "training", "evaluation", "export")
FOR_ALL = ("errors", "recipe")
OPEN_TO_ALL = ("cli", "__main__")


def long_files(root: Path) -> list[str]:
    """Files of more than 400 lines."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(root)}
    return [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]


def long_functions(root: Path) -> list[str]:
    """Functions and methods of more than 50 lines, docstring included."""
    found = []
    for path, node in _nodes(root):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    return found


def prints(root: Path) -> list[str]:
    """Calls of the built-in print."""
    return [
        f"{path}:{node.lineno}"
        for path, node in _nodes(root)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def wrong_imports(package: Path) -> list[str]:
    """Imports that climb against the flow of data; `package` is the folder of the package itself."""
    found = []
    for path in python_files(package):
        room = path.relative_to(package).with_suffix("").parts[0]
        if room in OPEN_TO_ALL:
            continue
        allowed = allowed_rooms(room)
        for line, other in _imported_rooms(path, package):
            if other not in allowed:
                found.append(f"{path}:{line}: {room} imports {other}")
    return found


def allowed_rooms(room: str) -> set[str]:
    """The rooms that `room` may import from. An unknown room may import nothing but errors and recipe."""
    if room == "errors":
        return {room}
    if room == "recipe":
        return {"errors", room}
    if room in PARTS:
        return {*FOR_ALL, *PARTS}
    if room not in CHAIN:
        return {*FOR_ALL, room}
    above = CHAIN[: CHAIN.index(room) + 1]
    return {*FOR_ALL, *above, *(PARTS if "objectives" in above else ())}


def python_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def _nodes(root: Path) -> Iterator[tuple[Path, ast.AST]]:
    for path in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


def _imported_rooms(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import from the package, at any depth of the file; relative ones as absolute."""
    home = [PACKAGE, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(home[: len(home) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            words = name.split(".")
            if words[0] == PACKAGE and len(words) > 1 and words[1] != "__version__":
                yield node.lineno, words[1]
