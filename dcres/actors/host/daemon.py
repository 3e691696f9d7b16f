"""A paging process of a VM that is kept running."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dcres.actors.host.prepared import Prepared
from dcres.actors.host.state import read_json, write_json
from dcres.actors.host.vm_folder import VmFolder, marker, processes_of
from dcres.errors import DcresError, PagingError
from dcres.linux.process import ProcessId, spawn_detached
from dcres.linux.removal import remove_socket
from dcres.paging import control
from dcres.paging.orders import Json

log = logging.getLogger("dcres.host")

_START_TIMEOUT_S = 120.0  # of a process that lives; a second where nothing else runs
_PATIENCE_S = 10.0
_MOST_RESTARTS = 20
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_LIVED_LONG_S = 60.0
_LIVED_AT_ALL_S = 2.0
_POLL_S = 0.02


class Daemon:
    """A paging process that is kept running: started, adopted, and started again when it dies.

    Its settings file says all it needs, so that a new one goes on where the old one stopped.
    `needed` says whether there still is something for it to do.
    """

    def __init__(
        self,
        module: str,
        vm_folder: VmFolder,
        name: str,
        needed: Callable[[], bool] = lambda: True,
    ) -> None:
        folder = vm_folder.run
        self._vm_folder = vm_folder
        self._argv = [sys.executable, "-m", module, str(folder / f"{name}.json")]
        self._marker = marker(vm_folder)
        self._pid_file = folder / f"{name}.pid"
        self._log = folder / f"{name}.log"
        self.control = folder / f"{name}.sock"
        self.name = name
        self.restarts = 0
        self.given_up = ""  # why it is not started again
        self._needed = needed
        self._wanted = False
        self._unwanted = threading.Event()  # wakes what waits before a restart
        self._spawning = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._process: ProcessId | None = None
        self._prepared: Prepared | None = None

    def prepare(self) -> None:
        """Have a process loaded for `start`; it needs no settings yet, and ends with us."""
        with self._spawning:
            if self._prepared is None:
                self._prepared = Prepared.start(
                    self._argv, self._log, self._environ, self._vm_folder.held
                )

    def start(self) -> None:
        """Start it, or adopt the one that runs; returns when it answers."""
        self._want()
        self._adopt_or_spawn()
        self._await_answer()
        self._keep_watch()

    def adopt(self) -> None:
        """As `start`, for an actor that was started again: what fails now is tried again."""
        self._want()
        try:
            self._adopt_or_spawn()
            self._await_answer()
        except (PagingError, OSError) as error:
            log.error("%s", error)
        self._keep_watch()

    def _want(self) -> None:
        self._unwanted.clear()
        self._wanted, self.given_up = True, ""

    def _adopt_or_spawn(self) -> None:
        with self._spawning:
            if not self._wanted:
                raise PagingError(f"the {self.name} is being stopped")
            process = self._read_pid()
            if process is None or not process.alive:
                process = self._unwritten() or self._spawn()
                state = {"pid": process.pid, "start_time": process.start_time}
                write_json(self._pid_file, state)
            self._process = process
            self._end_preparing(process)

    def _unwritten(self) -> ProcessId | None:
        """The live process of this daemon that the pid file does not tell of.

        An actor that was killed between starting it and writing that down left it. Of several
        the oldest: those that came later find it at work and end.
        """
        ours = [each for each in processes_of(self._vm_folder) if each.argv == self._argv]
        return min(ours, key=lambda each: each.start_time, default=None)

    def _keep_watch(self) -> None:
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._watch, name=self.name, daemon=True)
            self._watcher.start()

    def call(self, do: str, timeout_s: float = 30.0, **arguments: Any) -> Json:
        """Give it an order; see `control.call`."""
        return control.call(self.control, do, timeout_s, **arguments)

    def call_patiently(self, do: str, **arguments: Any) -> Json:
        """`call` an order that may be repeated, through a restart if need be.

        Raises PagingError with the reason when it was given up.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self.call(do, **arguments)
            except PagingError as error:
                # A reported error has a class of its own; this one says that nothing answered.
                if type(error) is not PagingError or not self._needed():
                    raise
                if self.given_up:
                    raise PagingError(self.given_up) from error
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it for good. Repeatable. Another cluster's is left alone."""
        with self._spawning:
            self._wanted = False
            self._unwanted.set()
            self._end_preparing(None)
        if not self._vm_folder.is_ours:
            return
        process = self._process or self._read_pid()
        if process is not None:
            process.end()
        self._vm_folder.remove_file(self._pid_file)
        remove_socket(self.control)

    def _read_pid(self) -> ProcessId | None:
        state = read_json(self._pid_file)
        return None if state is None else ProcessId(state["pid"], state["start_time"])

    def _end_preparing(self, chosen: ProcessId | None) -> None:
        """The prepared process begins if it is `chosen`, now that the pid file tells of it."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.release_if(prepared.process == chosen)

    def _spawn(self) -> ProcessId:
        if self._prepared is not None and self._prepared.process.alive:
            return self._prepared.process
        return spawn_detached(self._argv, self._log, self._environ, inherited=self._vm_folder.held)

    @property
    def _environ(self) -> dict[str, str]:
        """Without numpy's threads for linear algebra, which nothing needs here.

        To start them takes 60 ms of a processor, as much as to import numpy without them.
        """
        return {**os.environ, **self._marker, "OPENBLAS_NUM_THREADS": "1"}

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            process = self._process
            if process is None or not process.alive or time.monotonic() > deadline:
                why = f"the {self.name} did not start; its log ends with: {self._words()}"
                raise PagingError(why)
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        """Whether it is this process, and no other, that answers at its socket."""
        try:
            answer = self.call("status", 2.0)
        except PagingError:
            return False
        return self._process is not None and answer["pid"] == self._process.pid

    def _words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return "it said nothing"
        return lines[-1] if lines else "it said nothing"

    def _watch(self) -> None:
        in_a_row, at_once, since = 0, 0, time.monotonic()
        while self._wanted:
            process = self._process
            if process is not None and not process.wait_gone(0.5):
                continue
            if not self._wanted or not self._needed():
                return
            lived_s = time.monotonic() - since
            in_a_row = 0 if lived_s > _LIVED_LONG_S else in_a_row + 1
            at_once = 0 if lived_s > _LIVED_AT_ALL_S else at_once + 1
            if in_a_row > _MOST_RESTARTS:
                self.given_up = f"the {self.name} keeps dying: {self._words()}"
                log.error("%s", self.given_up)
                return
            # Without delay where that may help: a guest waits.
            if self._unwanted.wait(restart_delay_s(at_once)):
                continue
            since = time.monotonic()
            self._restart()

    def _restart(self) -> None:
        self.restarts += 1
        log.warning("the %s has died; starting another", self.name)
        try:
            self._adopt_or_spawn()
            self._await_answer()
        except (DcresError, OSError) as error:
            log.error("%s", error)


def restart_delay_s(at_once: int) -> float:
    """How long to wait before a restart, after so many that died at once; 0 at first.

    What keeps dying may need a moment until it is mended.
    """
    return 0.0 if at_once < 2 else min(_FIRST_DELAY_S * 2.0 ** (at_once - 2), _LONGEST_DELAY_S)
