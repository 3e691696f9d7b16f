"""What page-in costs without Python: the native handler of `handler.c` in the pager's place.

The native writer faults as it does under dcres; all of its memory lies in the store of a native
memory server. Everything else of a pager is missing, so nothing of it can go wrong or be slow.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dcres.bench.rig import Writer, build
from dcres.errors import PagingError
from dcres.linux import inject
from dcres.linux.files import opened
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.pages import PAGE_SIZE

_SOURCE = Path(__file__).with_name("handler.c")
_PIECE_BYTES = 1 << 20


def build_handler(folder: Path) -> Path:
    """The native handler, compiled into `folder`."""
    return build(_SOURCE, folder / "handler")


@contextmanager
def paged_by_handler(writer: Path, handler: Path, pages: int, run: int) -> Iterator[Writer]:
    """A writer whose `pages` pages are all remote; a fault brings up to `run` of them."""
    with ExitStack() as stack:
        ram = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm"))
        )
        store = ram / "store"
        _fill(store, pages)
        server = _started(stack, [str(handler), "serve", str(store)])
        guest = Writer(writer, ram / "guest.ram", pages)
        stack.callback(guest.kill)
        pid = guest.process.pid
        base = inject.mappings(pid, str(ram / "guest.ram"))[0][0]
        uffd = stack.enter_context(Userfaultfd(inject.take(pid, inject.make_userfaultfd(pid))))
        uffd.enable()
        uffd.register(base, pages * PAGE_SIZE, missing=True)
        argv = [str(handler), "page", str(uffd.fd), str(base), str(pages), server, str(run)]
        _started(stack, argv, uffd.fd)
        yield guest


def _fill(store: Path, pages: int) -> None:
    with opened(store, os.O_RDWR | os.O_CREAT) as fd:
        for at in range(0, pages * PAGE_SIZE, _PIECE_BYTES):
            os.pwrite(fd, os.urandom(min(_PIECE_BYTES, pages * PAGE_SIZE - at)), at)


def _started(stack: ExitStack, argv: list[str], *pass_fds: int) -> str:
    """Start a part of the handler, to be killed at the end; its first line."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds)
    stack.callback(_end, process)
    line = process.stdout.readline().strip() if process.stdout is not None else ""
    if not line:
        raise PagingError(f"{argv[0]} {argv[1]} ended before it was ready")
    return line


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
