"""No class and no module grows beyond what one can hold in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_METHODS = 25
MOST_LINES = 400
# Larger ones that there still are. Take out what has become smaller; put in nothing.
LARGE: set[str] = set()
METHOD = (ast.FunctionDef, ast.AsyncFunctionDef)
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "dcres").rglob("*.py"))


def too_large(module: str, source: str) -> Iterator[str]:
    """Names of what is too large: the module, or ``module:Class``."""
    if source.count("\n") > MOST_LINES:
        yield module
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            methods = [
                n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            if len(methods) > MOST_METHODS:
                yield f"{module}:{node.name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_class_or_module_is_too_large(module: str) -> None:
    found = set(too_large(module, (ROOT / module).read_text()))
    assert found <= LARGE, (
        f"{', '.join(sorted(found - LARGE))}: at most {MOST_METHODS} methods in a class and "
        f"{MOST_LINES} lines in a module; what does it do that another part could do?"
    )


def test_what_has_become_smaller_is_taken_from_the_list() -> None:
    found = {each for m in MODULES for each in too_large(m, (ROOT / m).read_text())}
    assert found >= LARGE


def test_what_is_too_large_is_found() -> None:
    methods = "\n".join(f"    def m{n}(self): ..." for n in range(MOST_METHODS))
    assert not list(too_large("m", f"class C:\n{methods}\n"))
    assert list(too_large("m", f"class C:\n{methods}\n    async def more(self): ...\n")) == ["m:C"]
    assert not list(too_large("m", "\n" * MOST_LINES))
    assert list(too_large("m", "\n" * (MOST_LINES + 1))) == ["m"]
