"""Imports point down, siblings never meet, and each outside library has one owner."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a part may import besides itself, dcres.errors and dcres.model.pages.
MAY_IMPORT = {
    "errors": set[str](),
    "config": {"model"},
    "model": set[str](),
    "linux": set[str](),
    "storage": {"model", "linux"},
    "paging": {"model", "linux"},
    "vm": {"model", "linux", "config"},
    "actors": {"model", "linux", "config", "storage", "paging", "vm"},
    "doctor": {"model", "linux", "config", "storage", "paging", "vm", "actors"},
    "bench": {"model", "linux", "config", "storage", "paging", "vm", "actors", "doctor"},
    "api": {"model", "linux", "config", "storage", "paging", "vm", "actors", "doctor"},
    "demo": {"model", "linux", "config", "storage", "paging", "vm", "actors", "doctor", "api"},
    "cli": {
        "model",
        "linux",
        "config",
        "storage",
        "vm",
        "actors",
        "doctor",
        "api",
        "demo",
        "bench",
    },
    "": {"model", "config", "api"},  # dcres/__init__.py, the façade
}
OWNERS = {
    "ray": ("dcres/actors/ray/gateway/",),
    "qemu": ("dcres/vm/monitor.py",),
    "pyarrow": ("dcres/storage/",),
    "pydantic": ("dcres/config.py", "dcres/storage/format/manifest.py"),
    "ctypes": ("dcres/linux/",),
    "fcntl": ("dcres/linux/",),
    "typer": ("dcres/cli/",),
    "rich": (
        "dcres/cli/",
        "dcres/api/show.py",
        "dcres/bench/command.py",
        "dcres/bench/__main__.py",
    ),
    "yaml": ("dcres/config.py",),
    "xxhash": ("dcres/storage/",),
    "matplotlib": ("dcres/api/placement.py", "dcres/bench/page.py"),
}
MODEL_MAY_IMPORT = {"numpy", "dcres", *sys.stdlib_module_names}
FOR_EVERYONE = ("dcres.errors.", "dcres.model.pages.")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(dotted: str) -> str:
    """``dcres.vm.monitor.Monitor`` → vm."""
    return [*dotted.split("."), ""][1]


def problems(file: str, line: int, name: str) -> Iterator[str]:
    part = part_of(file.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
    top = name.split(".")[0]
    where = f"{file}:{line} imports {name}"
    if top in OWNERS and not file.startswith(OWNERS[top]):
        yield f"{where}, but only {' and '.join(OWNERS[top])} may import {top}"
    if part == "model" and top not in MODEL_MAY_IMPORT:
        yield f"{where}, but model is pure: only the standard library and numpy"
    if top != "dcres" or f"{name}.".startswith(FOR_EVERYONE):
        return
    if part not in MAY_IMPORT:
        yield f"{file}: {part!r} has no place among the layers; give it one in {__name__}"
    elif part_of(name) not in {part, *MAY_IMPORT[part]}:
        may = ", ".join(sorted(MAY_IMPORT[part])) or "nothing of dcres"
        yield f"{where}, but {part or 'the façade'} may import {may}"


def module_of(file: str) -> str:
    """``dcres/vm/__init__.py`` → dcres.vm."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "dcres").rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file: str) -> None:
    found = [p for line, name in imports(ROOT / file) for p in problems(file, line, name)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "name", "why"),
    [
        ("dcres/paging/x.py", "dcres.vm.monitor.Monitor", "but paging may import linux, model"),
        ("dcres/model/x.py", "dcres.linux.abi", "but model may import nothing"),
        ("dcres/linux/x.py", "dcres.model.plan", "but linux may import nothing"),
        ("dcres/storage/x.py", "dcres.config.VmSpec", "but storage may import"),
        (
            "dcres/actors/control/coordinator.py",
            "ray",
            "only dcres/actors/ray/gateway/ may import ray",
        ),
        ("dcres/vm/process.py", "qemu.qmp.QMPClient", "only dcres/vm/monitor.py"),
        ("dcres/model/x.py", "xxhash", "model is pure"),
        ("dcres/new/x.py", "dcres.vm.command", "has no place among the layers"),
    ],
)
def test_the_rules_catch(file: str, name: str, why: str) -> None:
    assert why in "\n".join(problems(file, 1, name))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("dcres/linux/x.py", "dcres.model.pages.PAGE_SIZE"),
        ("dcres/linux/x.py", "dcres.errors.HostError"),
        ("dcres/storage/format/tables.py", "pyarrow.ipc"),
        ("dcres/cli.py", "dcres.api.connect"),
        ("dcres/actors/ray/gateway/calls.py", "ray.exceptions"),
    ],
)
def test_the_rules_allow(file: str, name: str) -> None:
    assert not list(problems(file, 1, name))


# Time and threads, and Ray, in what controls VMs

CONTROL = [file for file in FILES if file.startswith("dcres/actors/control/")]
NOT_IN_CONTROL = ("time", "threading", "queue", "concurrent", "dcres.actors.ray")


def not_for_control(file: str, names: Iterable[str]) -> list[str]:
    """All time goes through a `Concurrency`, so that a virtual clock can take its place."""
    if file.endswith("/concurrency.py"):
        return []
    return [
        f"{file} imports {name}"
        for name in names
        if f"{name}.".startswith(tuple(f"{each}." for each in NOT_IN_CONTROL))
    ]


@pytest.mark.parametrize("file", CONTROL)
def test_control_waits_through_concurrency_and_knows_no_ray(file: str) -> None:
    assert not_for_control(file, (name for _, name in imports(ROOT / file))) == []


def test_what_is_not_for_control_is_found() -> None:
    names = ("time", "threading.Lock", "concurrent.futures.wait", "dcres.actors.ray.fleet.RayFleet")
    assert len(not_for_control("dcres/actors/control/x.py", names)) == len(names)
    assert not_for_control("dcres/actors/control/x.py", ["datetime.datetime", "dcres.model"]) == []


# Circles

# Rooms of paging, from the bottom: each may import those before it, and itself. "" is paging's
# own modules.
PAGING_ROOMS = {"": set[str](), "transport": {""}, "pager": {"", "transport"}}
PAGING_ROOMS["server"] = PAGING_ROOMS["pager"]


def graph() -> dict[str, set[str]]:
    """Which modules of dcres each one imports; those for types alone count, too."""
    modules = {module_of(file): file for file in FILES}
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        names = {name for _, name in imports(ROOT / file)}
        # `from dcres.paging import control` names a module, `from dcres.errors import X` does not.
        named = {name if name in modules else name.rpartition(".")[0] for name in names}
        found[module] = (named & modules.keys()) - {module}
    return found


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of modules each of which can be reached from each other one."""
    reach = {start: _reached(edges, start) for start in edges}
    return {
        frozenset({*(other for other in reach[start] if start in reach[other])})
        for start in edges
        if start in reach[start]
    }


def _reached(edges: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    fresh = set(edges[start])
    while fresh:
        seen |= fresh
        fresh = {after for each in fresh for after in edges[each]} - seen
    return seen


def room_of(module: str) -> str:
    """``dcres.paging.pager.book`` → pager; ``dcres.paging.settings`` → "" (paging's own)."""
    parts = [*module.split("."), ""]
    return parts[2] if len(parts) > 4 or parts[2] in PAGING_ROOMS else ""


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = [" ↔ ".join(sorted(circle)) for circle in circles(graph())]
    assert not found, "these import each other in a circle: " + "; ".join(found)


def test_a_circle_is_found() -> None:
    chain = {"a": {"b"}, "b": {"c"}, "c": set[str](), "d": {"a"}}
    assert circles(chain) == set()
    assert circles({**chain, "c": {"a"}}) == {frozenset("abc")}


def test_the_rooms_of_paging_are_above_one_another() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if module.startswith("dcres.paging.") and other.startswith("dcres.paging.")
        if room_of(other) not in {room_of(module), *PAGING_ROOMS[room_of(module)]}
    ]
    assert not upward, "\n".join(upward)
