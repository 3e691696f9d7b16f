"""What documentation and examples name is there: files, links, commands, options, Python names."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

import dcres
from dcres.api.defaults import DEFAULT_DOWNTIME_S, DEFAULT_MAX_ROUNDS
from dcres.cli import FAILED, INTERRUPTED, WRONG_INPUT, app
from dcres.config import load_vm_spec

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
EXAMPLES = ROOT / "examples"
ABOUT_COMMANDS = [ROOT / "README.md", ROOT / "docs/operators.md"]
FOLDERS = "dcres|tests|docs|scripts|examples"
A_PATH = re.compile(rf"(?<![\w/.~$}}-])((?:{FOLDERS})/[\w./-]*\w/?)")
A_TEST = re.compile(r"(?<![\w/])(test_\w+\.py)")
A_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.M)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.M | re.S)
A_COMMAND = re.compile(
    r"(?<![\w/.@-])dcres((?: --?[a-z]\S*(?: HOST:PORT| HEAD:6379)?)*) ([a-z]+)\b"
)
AN_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")

# What these variables are in examples.
KINDS = {
    "dcres": dcres,
    "cluster": dcres.Cluster,
    "vm": dcres.Vm,
    "checkpoint": dcres.Checkpoint,
    "old": dcres.Checkpoint,
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands() -> dict[str, TyperCommand]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    known = {name: each for name, each in group.commands.items() if isinstance(each, TyperCommand)}
    assert len(known) == len(group.commands)
    return known


def options_of(command: TyperCommand) -> set[str]:
    return {name for each in command.params for name in each.opts} | {"--help"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return words.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {slug(each) for each in re.findall(r"^#+ (.+)$", text, re.M)}


def commands_in(page: Path) -> Iterator[tuple[str, str]]:
    """The name of each command in the code of a page, and the rest of its line."""
    for code in CODE.findall(page.read_text()):
        for line in code.strip("`").splitlines():
            for found in A_COMMAND.finditer(line):
                rest = line[found.end() :].split(" dcres ", 1)[0]
                yield found[2], re.split(r"\s# |, then ", rest, maxsplit=1)[0]


@pages
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    missing = {path for path in A_PATH.findall(text) if not (ROOT / path).exists()}
    assert not missing


@pages
def test_tests_exist(page: Path) -> None:
    there = {path.name for path in ROOT.glob("tests/**/test_*.py")}
    assert set(A_TEST.findall(page.read_text())) <= there


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for inline, reference in A_LINK.findall(CODE.sub("", page.read_text())):
        target = inline or reference
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", ABOUT_COMMANDS, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = commands()
    found = list(commands_in(page))
    assert len(found) > 10
    for name, rest in found:
        assert name in known, name
        wrong = set(AN_OPTION.findall(rest)) - options_of(known[name])
        assert not wrong, f"dcres {name}{rest}"


@pytest.mark.parametrize("page", ABOUT_COMMANDS, ids=lambda page: page.name)
def test_options_named_alone_exist(page: Path) -> None:
    known = {option for command in commands().values() for option in options_of(command)}
    spans = re.findall(r"`(--[a-z][^`\n]*)`", page.read_text())
    assert {AN_OPTION.findall(span)[0] for span in spans} <= known


def test_the_manual_has_all_commands_with_all_options() -> None:
    rows = [line for line in (ROOT / "docs/operators.md").read_text().splitlines() if "| `" in line]
    shared = {"--json", "--debug", "--address", "--store", "--yes", "--help"}
    for name, command in commands().items():
        own = [row.split(" | ", 1)[0] for row in rows if f"`dcres {name}" in row]
        assert own, name
        for parameter in command.params:
            if not isinstance(parameter, TyperOption) or {*parameter.opts} & shared:
                continue
            assert any(each in row for row in own for each in parameter.opts), parameter.name


def test_units_and_defaults_are_those_of_the_program() -> None:
    manual = (ROOT / "docs/operators.md").read_text()
    protocol = (ROOT / "docs/protocol.md").read_text()
    parameters = {each.name: each for each in commands()["checkpoint"].params}
    assert parameters["downtime"].metavar == "MS"
    assert parameters["downtime"].default == DEFAULT_DOWNTIME_S * 1000
    assert f"`--downtime MS` (milliseconds, default {DEFAULT_DOWNTIME_S * 1000:.0f})" in manual
    assert f"`--downtime`, default {DEFAULT_DOWNTIME_S * 1000:.0f} ms" in protocol
    assert f"(default {DEFAULT_MAX_ROUNDS})" in protocol


def test_exit_statuses_are_those_of_the_program() -> None:
    manual = (ROOT / "docs/operators.md").read_text()
    sentence = manual[manual.index("Exit status:") :].split("\n\n")[0]
    assert [int(each) for each in re.findall(r"(?:^|[:;] )(\d+) [a-z]", sentence)] == [
        0,
        FAILED,
        WRONG_INPUT,
        INTERRUPTED,
    ]


def cells() -> Iterator[str]:
    """The notebook's code."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "examples are kept without what they printed"
            yield "".join(cell["source"])


def blocks_of_readme() -> Iterator[str]:
    text = (ROOT / "README.md").read_text()
    yield from re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize(
    "code",
    [(EXAMPLES / "job.py").read_text(), "\n".join(cells()), "\n".join(blocks_of_readme())],
    ids=["job", "notebook", "readme"],
)
def test_examples_use_what_there_is(code: str) -> None:
    used = [
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert {"dcres", "vm"} <= {name for name, _ in used}
    for name, attribute in used:
        if name == "dcres":
            assert attribute in dcres.__all__
        elif name in KINDS:
            assert hasattr(KINDS[name], attribute) or attribute == "name", f"{name}.{attribute}"


def test_examples_have_a_vm_file_that_is_right() -> None:
    spec = load_vm_spec(EXAMPLES / "vm.yaml")
    assert sum(spec.layout.shares) >= spec.memory
    assert '"vm.yaml"' in "".join(cells())
