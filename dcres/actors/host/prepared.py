"""A Python process that is started before there is anything for it to do.

A pager takes 0.2 s to load its modules, which is time that a restore has while pages come from the
disk. `python -m dcres.actors.host.prepared MODULE ARGUMENT…` loads MODULE and waits for a word on
its standard input; then it is what ``python -m MODULE ARGUMENT…`` would be. Without the word,
because what was to give it has ended, it ends.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from dcres.linux.process import ProcessId, spawn_detached

_WORD = b"."


class Prepared:
    """A process that waits, until `release_if`."""

    def __init__(self, process: ProcessId, word_fd: int) -> None:
        self.process = process
        self._word_fd = word_fd

    @classmethod
    def start(
        cls, argv: Sequence[str], log: Path, env: Mapping[str, str], inherited: Sequence[int] = ()
    ) -> Self:
        """Prepare ``python -m MODULE ARGUMENT…``; see `dcres.linux.process.spawn_detached`."""
        python, option, *program = argv
        argv = [python, option, "dcres.actors.host.prepared", *program]
        stdin_fd, word_fd = os.pipe()
        try:
            process = spawn_detached(argv, log, env, stdin=stdin_fd, inherited=inherited)
            return cls(process, word_fd)
        except BaseException:
            os.close(word_fd)
            raise
        finally:
            os.close(stdin_fd)

    def release_if(self, needed: bool) -> None:
        """Let it begin, and depend on us no longer, or end."""
        try:
            if needed:
                os.write(self._word_fd, _WORD)
        except BrokenPipeError:
            return  # it has ended, as what waits for its answer will find
        finally:
            os.close(self._word_fd)
        if not needed:
            self.process.end()


def main(arguments: list[str]) -> int:
    """Load a module, and run its ``main`` when the word comes."""
    module = importlib.import_module(arguments[0])
    if hasattr(module, "__path__"):  # a package is run by its __main__
        module = importlib.import_module(f"{arguments[0]}.__main__")
    word = os.read(sys.stdin.fileno(), len(_WORD))
    if word != _WORD:
        return 0
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    result: int = module.main(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
