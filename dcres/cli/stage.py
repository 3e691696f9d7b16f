"""The demonstration on a terminal (a line that moves) or in a log (a line per step)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

from dcres.api.show import stderr_console, watched
from dcres.demo import Step


class ConsoleStage:
    """Shows steps as they end; on a terminal also what is being waited for."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or stderr_console()
        self._live = Status("", console=self._console) if watched(self._console) else None
        self._name = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, step: str) -> None:
        """A step begins."""
        self._name = step
        self._update(step)

    def note(self, text: str) -> None:
        """What is being waited for, and how it stands."""
        self._update(f"{self._name}: [cyan]{text}[/]")

    def end(self, step: Step) -> None:
        """The step is done."""
        guest = ""
        if step.guest is not None and step.guest["tick"]:
            guest = f"{step.guest['checks']} checks, {step.guest['failures']} failures"
        tail = "; ".join(part for part in (step.detail, guest) if part)
        self._console.print(
            f"[green]✓[/] {step.seconds:6.1f} s  {step.step}{f': [dim]{tail}[/]' if tail else ''}",
            soft_wrap=True,
        )

    def _update(self, text: str) -> None:
        if self._live is not None:
            self._live.update(text)
