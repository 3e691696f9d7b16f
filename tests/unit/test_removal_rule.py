"""No module of dcres removes a file by itself: `dcres.linux.removal` alone does, and asks why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REMOVING = {"unlink", "rmtree", "rmdir", "removedirs", "unlinkat"}
# Benchmarks remove what they have made in a folder of their own.
EXCEPT = ("dcres/linux/removal.py", "dcres/bench/")
MODULES = sorted(
    name
    for name in (str(path.relative_to(ROOT)) for path in (ROOT / "dcres").rglob("*.py"))
    if not name.startswith(EXCEPT)
)


def removals(source: str) -> Iterator[int]:
    """Lines where files are removed: any use of such a name, called or handed on."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="remove"):
                yield node.lineno
            case ast.Attribute(attr=name) if name in REMOVING:
                yield node.lineno
            case ast.ImportFrom(module="os" | "shutil", names=names):
                if {alias.name for alias in names} & {"remove", *REMOVING}:
                    yield node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_removals_go_through_one_module(module: str) -> None:
    found = [f"{module}:{line}" for line in removals((ROOT / module).read_text())]
    assert not found, (
        f"{', '.join(found)}: only dcres/linux/removal.py removes files, and it wants to see "
        "that they are ours; use OwnFolder, CheckpointFolder, Created or remove_socket"
    )


@pytest.mark.parametrize(
    "line",
    [
        "path.unlink(missing_ok=True)",
        "stack.callback(changes.unlink, missing_ok=True)",
        "os.remove(path)",
        "os.unlink(name, dir_fd=fd)",
        "shutil.rmtree(folder, ignore_errors=True)",
        "from shutil import rmtree",
        "from os import remove as gone",
        "folder.rmdir()",
    ],
)
def test_the_rule_catches(line: str) -> None:
    assert list(removals(line)) == [1]


@pytest.mark.parametrize("line", ["loop.remove(fd)", "created.remove()", "os.rename(a, b)"])
def test_the_rule_allows(line: str) -> None:
    assert not list(removals(line))
