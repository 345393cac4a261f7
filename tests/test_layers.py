"""Imports point one way: public -> client -> wire; manager -> broker, wire; worker -> wire."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import whitepool_mp

ROOT = pathlib.Path(whitepool_mp.__file__).parent
PUBLIC = {
    "aio",
    "aio_lease",
    "executor",
    "jobs",
    "lease",
    "map_results",
    "pool",
    "progress",
    "proxy",
    "session",
    "status",
}

# Who may import what: a layer is a folder's modules or one module, by its name below the package.
# What is not listed (backends, integrations, cli, testing, ...) stands above all of these.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    "cpus": set(),
    "policy": {"records"},
    "config": {"errors", "policy", "cpus"},
    "broker": {"broker", "policy", "records"},
    "wire": {"wire", "errors", "records"},
    "worker": {"worker", "wire", "errors", "records"},
    "client": {"client", "wire", "config", "errors"},
    "manager": {
        "manager",
        "broker",
        "wire",
        "policy",
        "errors",
        "records",
        # The manager starts these two: the processes that workers come from, and what the kernel
        # promises both.
        "worker.nursery",
        "worker.linux",
    },
    **{name: {"client", "wire", "config", "errors", *PUBLIC} for name in PUBLIC},
}


def layer(name: str) -> str:
    """The layer of a module, by its name below the package."""
    return name.partition(".")[0]


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    """Every module of the listed layers: its name below the package, its file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if layer(name) in ALLOWED:
            yield name, path


def arrows(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """What of ours a module imports, wherever in it: the line, and the name below the package."""
    prefix = "whitepool_mp"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            # `from package import module` is an arrow to the module, if that is what it is.
            names = [
                full if is_module(full := f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            ]
        for name in names:
            if name == prefix or name.startswith(prefix + "."):
                yield node.lineno, name[len(prefix) + 1 :]


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package."""
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def may(importer: str, imported: str) -> bool:
    """Whether this arrow points the right way."""
    allowed = ALLOWED[layer(importer)]
    return any(imported == name or imported.startswith(name + ".") for name in allowed)


MODULES = list(modules())


def test_every_listed_layer_exists() -> None:
    assert {layer(name) for name, _ in MODULES} == set(ALLOWED)


def test_every_arrow_points_down() -> None:
    wrong = [
        f"{path}:{line}: {name} -> {other or 'whitepool_mp'}"
        for name, path in MODULES
        for line, other in arrows(path)
        if not may(name, other)
    ]
    assert wrong == []


def test_nothing_below_imports_what_users_see() -> None:
    seen = PUBLIC | {"", "testing", "backends", "integrations", "cli"}
    wrong = [
        f"{path}:{line}: {name} -> {other or 'whitepool_mp'}"
        for name, path in MODULES
        if layer(name) not in PUBLIC
        for line, other in arrows(path)
        if layer(other) in seen
    ]
    assert wrong == []


def test_the_manager_never_imports_a_pickle() -> None:
    """What users send is opaque bytes to it."""
    for name, path in MODULES:
        if layer(name) == "manager":
            imported = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            assert not imported & {"pickle", "cloudpickle", "marshal"}, name
            assert "wire.payload" not in [other for _, other in arrows(path)], name


def test_a_wrong_arrow_is_seen() -> None:
    assert not may("broker.core", "wire.frames")
    assert not may("client.engine", "session")
    assert not may("manager.core", "worker.main")
    assert not may("worker.serve", "client.channel")
    assert may("session", "client.member")
