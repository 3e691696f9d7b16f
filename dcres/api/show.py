"""How long work is shown: bars on a terminal or in a notebook, else lines on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from dcres.config import format_size
from dcres.model.pages import PAGE_SIZE


class _Host(Protocol):
    @property
    def host(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def bytes_per_s(self) -> float: ...
    @property
    def pages_left(self) -> int | None: ...
    @property
    def estimated_downtime_s(self) -> float | None: ...


class _Operation(Protocol):
    @property
    def phase(self) -> str: ...
    @property
    def hosts(self) -> tuple[_Host, ...]: ...
    @property
    def bytes_per_s(self) -> float: ...
    @property
    def round(self) -> int: ...
    @property
    def pages_left(self) -> Mapping[str, int]: ...
    @property
    def estimated_downtime_s(self) -> float | None: ...
    @property
    def pages_to_move(self) -> int | None: ...


def stderr_console() -> Console:
    """Where everything goes that is not a result."""
    return Console(stderr=True, highlight=False)


def watched(console: Console) -> bool:
    """Whether lines may move: on a terminal or in a notebook."""
    return console.is_terminal or console.is_jupyter


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """A line that moves while something of a few seconds is done, on a terminal or in a notebook.

    What is called with a sentence shows it: in that line, or in one of its own.
    """
    console = stderr_console()
    if watched(console):
        with console.status(text) as status:
            yield lambda sentence: status.update(f"{text}: {sentence}")
    else:
        yield lambda sentence: console.print(sentence, markup=False, soft_wrap=True)


@contextmanager
def progress_bars(
    title: str, console: Console | None = None
) -> Iterator[Callable[[_Operation], None]]:
    """A callback that draws one bar per host, or tells of each phase where no bar can be.

    Where it cannot be read any more, on a terminal that was closed, say, it shows nothing: that
    is no reason to cancel the work that it shows.
    """
    console = console or stderr_console()
    if not watched(console):
        yield _if_anybody_reads(_Lines(console, title).show)
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        heading = progress.add_task(title, total=None, rate="")
        yield _if_anybody_reads(_Bars(progress, heading, title).show)


def _if_anybody_reads(show: Callable[[_Operation], None]) -> Callable[[_Operation], None]:
    def shown(operation: _Operation) -> None:
        with suppress(OSError):
            show(operation)

    return shown


class _Bars:
    """One bar per host below a heading that names the phase."""

    def __init__(self, progress: Progress, heading: TaskID, title: str) -> None:
        self._progress = progress
        self._heading = heading
        self._title = title
        self._tasks: dict[str, TaskID] = {}
        self._most_to_move = 0

    def show(self, operation: _Operation) -> None:
        """Draw the bars as `operation` has them."""
        done = total = 0
        for host in operation.hosts:
            if not host.total_bytes:
                continue
            done, total = done + host.done_bytes, total + host.total_bytes
            if host.host not in self._tasks:
                self._tasks[host.host] = self._progress.add_task(
                    "", total=host.total_bytes, rate=""
                )
            self._progress.update(
                self._tasks[host.host],
                description=f"  {host.host} {host.what}{_left(host)}",
                completed=host.done_bytes,
                total=host.total_bytes,
                rate=_rate(host.bytes_per_s),
            )
        if operation.pages_to_move is not None:
            left = operation.pages_to_move * PAGE_SIZE
            total = self._most_to_move = max(self._most_to_move, left)
            done = total - left
        self._progress.update(
            self._heading,
            description=f"{self._title} ({_phase(operation)})",
            completed=done,
            total=total or None,
            rate=_rate(operation.bytes_per_s),
        )


class _Lines:
    """A line for every phase and every round, where nothing can be drawn over."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._told: tuple[str, int] | None = None

    def show(self, operation: _Operation) -> None:
        """Say where `operation` is, if that was not said yet."""
        now = (operation.phase, operation.round)
        if now == self._told:
            return
        self._told = now
        hosts = "".join(
            f"; {host.host} {_rate(host.bytes_per_s) or host.what or 'waits'}{_left(host)}"
            for host in operation.hosts
            if host.total_bytes
        )
        text = f"{self._title}: {_phase(operation)}{hosts}"
        # Not Console.print, which exits the process where a pipe is closed.
        print(text, file=self._console.file, flush=True)


def _rate(bytes_per_s: float) -> str:
    return f"{format_size(int(bytes_per_s))}/s" if bytes_per_s else ""


def _left(host: _Host) -> str:
    """What a live checkpoint has left on a host, and the downtime that it would take."""
    if host.pages_left is None or host.estimated_downtime_s is None:
        return ""
    return f", {host.pages_left} pages left ≈ {host.estimated_downtime_s * 1000:.0f} ms"


def _phase(operation: _Operation) -> str:
    """The phase, and how far a live checkpoint is from stopping the VM."""
    if operation.estimated_downtime_s is None:
        return operation.phase
    return (
        f"{operation.phase}, round {operation.round}, "
        f"≈ {operation.estimated_downtime_s * 1000:.0f} ms of downtime"
    )
