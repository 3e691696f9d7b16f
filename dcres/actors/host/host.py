"""What the main host's and the sub hosts' actors share: files, daemons, loading and saving.

A host actor owns no state that matters: QEMU, pager and memory server are processes of their
own, and everything that is known about them lies in files under the host's run folder. An
actor that Ray starts again finds them there and goes on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcres.actors.host.prepared import Prepared
from dcres.actors.host.vm_folder import VmFolder, marker, processes_of
from dcres.actors.messages import Progress
from dcres.config import HostSettings
from dcres.errors import Conflict, DcresError, NoRoom, PagingError, StoreFull
from dcres.linux.files import free_in, open_own
from dcres.linux.process import ProcessId, spawn_detached
from dcres.linux.removal import remove_socket
from dcres.linux.tmpfs import require_small_pages
from dcres.model.pages import PAGE_SIZE
from dcres.paging import control

log = logging.getLogger("dcres.host")

_START_TIMEOUT_S = 120.0  # of a process that lives; a second where nothing else runs
_PATIENCE_S = 10.0
_MOST_RESTARTS = 20
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_LIVED_LONG_S = 60.0
_LIVED_AT_ALL_S = 2.0
_POLL_S = 0.02
_ENDED = "this VM was ended before its start was done"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace a state file (mode 0600) in one step."""
    fresh = path.with_suffix(".new")
    with os.fdopen(open_own(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
        json.dump(state, file)
    fresh.rename(path)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state file's content; None when there is none."""
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return state


def state_of(folder: VmFolder) -> dict[str, Any] | None:
    """The content of a VM's state file; None without one, and for another cluster's."""
    return read_state(folder.state) if folder.is_ours else None


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
        self._unwanted = threading.Event()  # wakes whoever waits before a restart
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
                write_state(self._pid_file, state)
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

    def call(self, do: str, timeout_s: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """Give it an order; see `control.call`."""
        return control.call(self.control, do, timeout_s, **arguments)

    def call_patiently(self, do: str, **arguments: Any) -> dict[str, Any]:
        """`call` an order that may be repeated, through a restart if need be.

        Raises PagingError with the reason when it was given up.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self.call(do, **arguments)
            except PagingError as error:
                # A reported error has a class of its own; this one says that nobody answered.
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
        state = read_state(self._pid_file)
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
        """Without numpy's threads for linear algebra, which nobody needs here.

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
                self.given_up = f"the {self.name} does not stay up: {self._words()}"
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


class Life:
    """Orders what begins a VM on a host and what ends it: the end waits, and is final.

    Both run in threads of one actor. Without this a coordinator that was started again would
    end what is there, while the start that its predecessor ordered goes on and leaves a QEMU.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Around a start. Raises Conflict when the end has come, however the start fails by it.

        The end kills what the start has begun, a launcher that was about to be a program too.
        """
        with self._lock:
            self._require_not_over()
            try:
                yield
            except (DcresError, OSError) as error:
                if self._over:
                    raise Conflict(_ENDED) from error
                raise
            self._require_not_over()

    def _require_not_over(self) -> None:
        if self._over:
            raise Conflict(_ENDED)

    @contextmanager
    def ending(self, hurry: Callable[[], None]) -> Iterator[None]:
        """Around the end; `hurry` makes a start under way fail and is called until it has."""
        self._over = True
        hurry()
        while not self._lock.acquire(timeout=_POLL_S):
            hurry()
        try:
            yield
        finally:
            self._lock.release()


class Meter:
    """Counts pages as they are done, lets others look, and stops the work when it is cancelled."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = Progress()
        self._cancelled = threading.Event()
        self._clock = clock
        self._began_s = self._ended_s = 0.0

    @contextmanager
    def measuring(self, what: str, pages: int) -> Iterator[None]:
        """The work inside the ``with`` block is `what`, and calls `done` as it goes."""
        self._began_s = self._ended_s = self._clock()
        self._progress = Progress(what, 0, pages * PAGE_SIZE)
        yield

    def done(self, pages: int) -> None:
        """Pages done since the last call. Raises Conflict once the work is cancelled."""
        now = self._progress
        if self._cancelled.is_set():
            raise Conflict(f"{now.what} was cancelled")
        self._ended_s = self._clock()
        self._progress = replace(now, done_bytes=now.done_bytes + pages * PAGE_SIZE)

    def cancel(self) -> None:
        """Make the work under way fail soon."""
        self._cancelled.set()

    def reset(self) -> None:
        """Allow new work."""
        self._cancelled.clear()
        self._progress = Progress()

    @property
    def progress(self) -> Progress:
        """How far it is, and its rate from the beginning to the last page done."""
        now, seconds = self._progress, self._ended_s - self._began_s
        return replace(now, bytes_per_s=now.done_bytes / seconds if seconds > 0 else 0.0)


def require_ram(settings: HostSettings, share_bytes: int) -> None:
    """NoRoom unless the tmpfs that holds guest memory can take `share_bytes` more.

    Raises UnsupportedHost where guest memory must not lie.
    """
    ram = settings.ram
    require_small_pages(ram, settings.name)
    free = free_in(ram)
    if free < share_bytes:
        raise NoRoom(
            f"{ram} has {free >> 20} MiB free and this host's share is {share_bytes >> 20} MiB; "
            "give the tmpfs more room or choose another folder with DCRES_RAM"
        )


def require_store_room(store: Path, length_bytes: int) -> None:
    """StoreFull before anything is stopped, when the disk clearly has too little room."""
    free = free_in(store)
    if free < length_bytes:
        raise StoreFull(
            f"{store} has {free >> 20} MiB free and this host's part needs up to "
            f"{length_bytes >> 20} MiB; delete checkpoints or give it another disk"
        )
