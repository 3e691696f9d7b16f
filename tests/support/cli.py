"""The ``dcres`` command as users run it: a process of its own, with a home of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcres.linux.process import find_marked
from tests.support import prefork
from tests.support.prefork import Forked
from tests.support.speed import patience
from tests.support.wait import until

TIMEOUT_S = patience(200)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def values(self) -> Any:
        """The one JSON object on standard output."""
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class Cli:
    """``dcres`` with `environ` besides our own."""

    environ: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, home: Path, **environ: str) -> Cli:
        """With the home `home` and no cluster or store of somebody else's."""
        return cls({"DCRES_HOME": str(home), **environ})

    def start(self, *arguments: str) -> Forked:
        """Start a command."""
        main = "import sys; from dcres.cli import main; sys.exit(main())"
        return self.start_python(main, *arguments)

    def start_python(self, program: str, *arguments: str) -> Forked:
        """Start a Python program where `start` starts commands."""
        inherited = {
            key: text
            for key, text in os.environ.items()
            if not key.startswith("RAY_") and key != "DCRES_STORE"
        }
        return prefork.server().run(program, arguments, {**inherited, **self.environ})

    def run(self, *arguments: str, timeout_s: float = TIMEOUT_S) -> Ran:
        """Run a command to its end."""
        return ended(self.start(*arguments), timeout_s)

    def json(self, *arguments: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Run a command that must succeed; its JSON object."""
        ran = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert ran.status == 0, f"dcres {' '.join(arguments)}: {ran.out}{ran.err}"
        return ran.values

    def refused(self, *arguments: str, status: int = 2) -> str:
        """Run a command that must fail; its one sentence, on stderr and in the JSON object."""
        ran = self.run(*arguments, "--json")
        assert ran.status == status, f"dcres {' '.join(arguments)}: {ran.out}{ran.err}"
        message = str(ran.values["message"])
        assert f"error: {message}" in ran.err
        assert "Traceback" not in ran.err
        return message


def ended(process: Forked, timeout_s: float = TIMEOUT_S) -> Ran:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=timeout_s)
    return Ran(process.returncode, out, err)


def require_nothing_left(cluster_id: str) -> None:
    """Neither a process nor a folder of the cluster with that id."""
    until(lambda: not find_marked("DCRES_CLUSTER", cluster_id), 30, "its processes are gone")
    places = (Path("/tmp"), Path("/dev/shm"))
    assert [path for place in places for path in place.glob(f"*{cluster_id}*")] == []
