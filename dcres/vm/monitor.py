"""QEMU's monitor (QMP) as plain, blocking, thread-safe calls; hides qemu.qmp and its asyncio.

Facts about QMP that shape this module, all tried on QEMU 7.2:

- QEMU serves one client at a time. A second one connects, because the kernel's backlog takes
  it, and then gets no greeting until the first has gone. So connecting has a deadline, and
  whoever steers a VM closes its `Monitor` when it is done.
- Descriptors given with ``getfd`` belong to the monitor, not to the connection: they stay
  open in QEMU after a disconnect, until ``closefd``, use by a command, or QEMU's end.
  (Those of ``add-fd`` do not: QEMU closes unused ones when the client leaves a running VM.)
- With ``x-ignore-shared`` a migration stream holds devices and vCPUs and no shared RAM. If the
  capability did not take, the stream holds all of RAM, so `Monitor.save_core` checks.
- ``migrate`` takes ``file:`` from 8.2 on; from 9.1 on a descriptor of a file is deprecated there.
  The schema that QEMU gives of its commands tells as well, but takes it 0.1 s.
- A disk snapshot comes before the VM core: after ``migrate`` the block nodes are inactive, and not
  locked. `dcres.model.run_state` has what else follows from that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from dcres.errors import MonitorError
from dcres.linux.files import open_own
from dcres.model.run_state import SAVED, RunState

# What goes wrong is told by our exceptions; the library would print it a second time.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

_T = TypeVar("_T")
_POLL_S = 0.002
_RETRY_S = 0.02
_LONG_TIMEOUT_S = 300.0  # a snapshot of a large disk changes the reference count of every cluster
_BANDWIDTH_BYTES_PER_S = 1 << 40
_CORE_FD = "dcres-core"
_KNOWS_FILE_URI = (8, 2, 0)


class _LoopThread:
    """An event loop in a thread of its own, to which other threads hand coroutines."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="dcres-monitor", daemon=True
        )
        self._thread.start()

    def run(self, work: Awaitable[_T], timeout_s: float) -> _T:
        """The result of `work`; TimeoutError when it takes longer than `timeout_s`."""

        async def limited() -> _T:
            return await asyncio.wait_for(work, timeout_s)

        return asyncio.run_coroutine_threadsafe(limited(), self._loop).result()

    def close(self) -> None:
        """End what is still under way, as when QEMU went while we connected, and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()


class Monitor:
    """One connection to a QEMU's monitor. Make one with `connect`; use it in a ``with`` block.

    All methods block, may be called from any thread, and raise MonitorError.
    """

    def __init__(self, path: Path, loop: _LoopThread, client: Any) -> None:
        self.path = path
        self._loop = loop
        self._client = client
        self._fd_lock = threading.Lock()
        self._closed = False

    @classmethod
    def connect(
        cls, path: Path, timeout_s: float = 10.0, alive: Callable[[], bool] | None = None
    ) -> Self:
        """Connect to the monitor socket at `path`, waiting for it to appear.

        Gives up when `timeout_s` has passed, or as soon as `alive` says that QEMU has ended.
        """
        loop = _LoopThread()
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                client = _try_connect(path, loop, deadline)
                if client is not None:
                    return cls(path, loop, client)
                if alive is not None and not alive():
                    raise MonitorError(f"QEMU ended before its monitor {path} answered")
                if time.monotonic() > deadline:
                    raise MonitorError(
                        f"no answer from the monitor {path}: QEMU does not run, or another "
                        "client is connected (QEMU serves one at a time); see `dcres status`"
                    )
                time.sleep(_RETRY_S)
        except BaseException:
            loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, so that another client can connect. May be repeated."""
        if self._closed:
            return
        self._closed = True
        with suppress(Exception):  # the other end may have gone in any way
            self._loop.run(self._client.disconnect(), 5.0)
        self._loop.close()

    @property
    def version(self) -> str:
        """QEMU's version such as ``7.2.22``."""
        return ".".join(map(str, self.version_numbers))

    @property
    def version_numbers(self) -> tuple[int, int, int]:
        """The same as numbers."""
        number = self._client.greeting.QMP.version["qemu"]
        return number["major"], number["minor"], number["micro"]

    def machine_type(self, alias: str) -> str:
        """The versioned machine type, such as ``pc-q35-7.2``, that `alias` stands for here."""
        for machine in self.execute("query-machines"):
            if machine.get("alias") == alias:
                return str(machine["name"])
        return alias

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, timeout_s: float = 30.0
    ) -> Any:
        """Run one QMP command and return its answer as plain JSON values."""
        if self._closed:
            raise MonitorError(f"the monitor {self.path} is closed; connect again")
        with _told(command, self.path, timeout_s):
            return self._loop.run(self._client.execute(command, arguments), timeout_s)

    def send_fd(self, name: str, fd: int, timeout_s: float = 30.0) -> None:
        """Give QEMU a copy of descriptor `fd` as `name` (``getfd``); ours stays open.

        QEMU's copy outlives this connection, until ``closefd``. A second descriptor of the same
        name replaces the first.
        """

        async def give() -> None:
            self._client.send_fd_scm(fd)
            await self._client.execute("getfd", {"fdname": name})

        # The descriptor and the command that names it must not be parted by another pair.
        with self._fd_lock, _told("getfd", self.path, timeout_s):
            self._loop.run(give(), timeout_s)

    def stop(self) -> None:
        """Stop the vCPUs and finish disk I/O in flight. May be repeated."""
        self.execute("stop")

    def cont(self) -> None:
        """Let the vCPUs run. May be repeated. Call `dcres.vm.safety.require_safe` before."""
        self.execute("cont")

    def status(self) -> RunState:
        """What the VM is doing."""
        return RunState(self.execute("query-status")["status"])

    def settled_status(self, timeout_s: float = 60.0) -> RunState:
        """As `status`, once a VM core that is being saved is saved: until then ``cont`` fails."""
        deadline = time.monotonic() + timeout_s
        while (state := self.status()) is RunState.FINISH_MIGRATE:
            if time.monotonic() > deadline:
                raise MonitorError(f"QEMU has been saving the VM core for {timeout_s:g} s")
            time.sleep(_POLL_S)
        return state

    def wake(self) -> None:
        """Wake a guest that sleeps (run state ``suspended``)."""
        self.execute("system_wakeup")

    def failed_disks(self) -> list[str]:
        """The disks whose errors keep the guest waiting, each with why; as ``d.qcow2: nospace``."""
        return [
            f"{each.get('inserted', {}).get('file', each['device'])}: {each['io-status']}"
            for each in self.execute("query-block")
            if each.get("io-status", "ok") != "ok"
        ]

    def snapshot_disks(self, nodes: Sequence[str], name: str) -> None:
        """QCOW2-internal snapshots called `name` of all `nodes`, or of none of them."""
        actions = [
            {"type": "blockdev-snapshot-internal-sync", "data": {"device": node, "name": name}}
            for node in nodes
        ]
        if actions:
            self.execute("transaction", {"actions": actions}, _LONG_TIMEOUT_S)

    def delete_snapshots(self, nodes: Sequence[str], name: str) -> None:
        """Delete the internal snapshots called `name`; one that is not there is passed over."""
        for node in nodes:
            which = {"device": node, "name": name}
            try:
                self.execute("blockdev-snapshot-delete-internal-sync", which, _LONG_TIMEOUT_S)
            except MonitorError as error:
                if "does not exist" not in str(error):
                    raise

    def save_core(self, path: Path, timeout_s: float = 60.0) -> int:
        """Write the VM core (vCPUs and devices, no RAM) to `path`, mode 0600, and fsync it.

        The VM is stopped before and in run state ``postmigrate`` afterwards, from which `cont`
        goes on. Saving devices can touch guest memory, so remote paging has to go on
        meanwhile. Returns the file's length in bytes.
        """
        state = self.status()
        if state is RunState.RUNNING:
            raise MonitorError("the VM runs; stop it before its core is saved")
        if state in SAVED:  # before the file is cut to nothing: it may be a core that is still good
            raise MonitorError("the VM has not run since its core was saved; use that core")
        fd = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.fchmod(fd, 0o600)
            moved = _CoreTransfer(self).run("migrate", path, fd, timeout_s)
            os.fsync(fd)
            length_bytes = os.fstat(fd).st_size
        finally:
            os.close(fd)
        self._require_no_ram(moved, length_bytes)
        return length_bytes

    @property
    def has_saved_core(self) -> bool:
        """Whether a VM core was saved and nothing has run since: its disks are inactive then."""
        if self.status() is not RunState.POSTMIGRATE:
            return False
        return bool(self.execute("query-migrate").get("status") == "completed")

    def require_core(self, path: Path) -> None:
        """MonitorError unless the core that `save_core` wrote to `path` is still the VM's."""
        if not self.has_saved_core or not path.exists():
            raise MonitorError(
                "the VM is paused, and its core could not be saved the last time; let it run "
                "once with `dcres resume`"
            )
        self._require_no_ram(self.execute("query-migrate"), path.stat().st_size)

    def load_core(self, path: Path, timeout_s: float = 60.0) -> None:
        """Load a VM core into a QEMU that was started with ``-incoming defer``.

        Loading devices can touch guest memory: its pages, or remote paging, are in place
        before. Afterwards the VM is paused. QEMU 7.2 ends itself when the file is damaged; its
        words are in its log then.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _CoreTransfer(self).run("migrate-incoming", path, fd, timeout_s)
        finally:
            os.close(fd)

    def _require_no_ram(self, moved: Mapping[str, Any], length_bytes: int) -> None:
        # "total" counts the RAM blocks that were not ignored, so a guest of zero pages, whose
        # stream would be short all the same, is noticed as well.
        ram_bytes = self.execute("query-memory-size-summary")["base-memory"]
        streamed_bytes = moved.get("ram", {}).get("total", 0)
        if max(streamed_bytes, length_bytes) >= ram_bytes:
            raise MonitorError(
                f"the VM core has {length_bytes} bytes and includes guest RAM: QEMU did not "
                "apply x-ignore-shared; its RAM must be a named file mapped with share=on"
            )


class _CoreTransfer:
    """A VM core on its way between QEMU and a file that is open here."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def run(self, command: str, path: Path, fd: int, timeout_s: float) -> dict[str, Any]:
        """Move it by ``migrate`` or ``migrate-incoming``; what QEMU says of it afterwards."""
        execute = self._monitor.execute
        ignore_shared = {"capability": "x-ignore-shared", "state": True}
        execute("migrate-set-capabilities", {"capabilities": [ignore_shared]})
        # The default of 128 MiB/s paces even a stream that goes to a file.
        execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH_BYTES_PER_S})
        execute(command, {"uri": self.uri(path, fd)})
        return self._wait(timeout_s)

    def uri(self, path: Path, fd: int) -> str:
        """``file:`` where this QEMU knows it, or the descriptor itself."""
        if self._monitor.version_numbers >= _KNOWS_FILE_URI:
            return f"file:{path}"
        self._monitor.send_fd(_CORE_FD, fd)
        return f"fd:{_CORE_FD}"

    def _wait(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            info: dict[str, Any] = self._monitor.execute("query-migrate")
            match info.get("status"):
                case "completed":
                    return info
                case "failed" | "cancelled":
                    why = info.get("error-desc", "QEMU gives no reason; see its log")
                    raise MonitorError(f"the VM core was not transferred: {why}")
                case _ if time.monotonic() > deadline:
                    self._monitor.execute("migrate_cancel")
                    raise MonitorError(f"the VM core was not transferred within {timeout_s:g} s")
                case _:
                    time.sleep(_POLL_S)


def _try_connect(path: Path, loop: _LoopThread, deadline: float) -> Any | None:
    """A connected client, or None when nobody listens yet or nobody greets in time."""
    client = QMPClient(path.name)
    # Its default listener would keep every event for good.
    client.events.event_filter = lambda _event: False
    try:
        loop.run(client.connect(str(path)), max(deadline - time.monotonic(), _RETRY_S))
    except (TimeoutError, ConnectError):
        with suppress(Exception):
            loop.run(client.disconnect(), 1.0)
        return None
    return client


@contextmanager
def _told(command: str, path: Path, timeout_s: float) -> Any:
    """Turn whatever goes wrong while `command` runs into a MonitorError."""
    try:
        yield
    except ExecuteError as error:
        raise MonitorError(f"QEMU refused {command}: {error}") from None
    except TimeoutError:
        raise MonitorError(f"QEMU did not answer {command} within {timeout_s:g} s") from None
    except (QMPError, OSError, EOFError) as error:
        why = str(error) or type(error).__name__
        raise MonitorError(f"the connection to {path} broke during {command}: {why}") from None
