"""The broker does no I/O and reads no clock: its imports are few and named here."""

from __future__ import annotations

import ast
import pathlib

import pytest

import whitepool_mp.broker

PACKAGE = pathlib.Path(whitepool_mp.broker.__file__).parent
ALLOWED = {
    "__future__",
    "_random",
    "collections",
    "collections.abc",
    "dataclasses",
    "enum",
    "heapq",
    "itertools",
    "math",
    "random",
    "typing",
}
OURS = ("whitepool_mp.broker", "whitepool_mp.policy", "whitepool_mp.records")
FORBIDDEN_CALLS = {"__import__", "compile", "eval", "exec", "input", "open", "print"}

modules = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            found.append(node.module)
    return found


def ours(name: str) -> bool:
    return any(name == own or name.startswith(own + ".") for own in OURS)


def test_the_package_has_modules() -> None:
    assert {"core.py", "events.py", "effects.py"} <= {path.name for path in modules}


@pytest.mark.parametrize("path", modules, ids=lambda path: path.name)
def test_imports_only_itself_the_policy_and_a_few_pure_modules(path: pathlib.Path) -> None:
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    assert [name for name in names if name not in ALLOWED and not ours(name)] == []


@pytest.mark.parametrize("path", modules, ids=lambda path: path.name)
def test_calls_nothing_that_does_io_or_imports_by_stealth(path: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"


@pytest.mark.parametrize("path", modules, ids=lambda path: path.name)
def test_no_jitter_comes_from_the_shared_generator(path: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "random"
        ):
            assert node.attr == "Random", f"line {node.lineno}"
