"""Asking the hosts of a VM how they are, and how far they have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Any

from dcres.actors.control.concurrency import THREADS, Concurrency, side_by_side
from dcres.actors.messages import Description, Progress
from dcres.actors.ports import Port
from dcres.actors.protocol import Presence
from dcres.errors import ClusterError, DcresError, NotFound, VmLost, VmOff
from dcres.model.pages import PAGE_SIZE
from dcres.model.phase import HostState
from dcres.model.run_state import RunState, advice

_STATUS_TIMEOUT_S = 20.0  # Ray notices a host that is cut off after 10 s
_PAUSE_S = 0.05
_LOOK_S = 1.0  # Ray notices a dead host after 5 s in a cluster of dcres, 14 s by default


def await_ready(
    port: Port, alive: Callable[[], bool], timeout_s: float, concurrency: Concurrency = THREADS
) -> None:
    """Wait until an actor answers, through a restart; no longer than its host is `alive`.

    Raises ActorGone, and ClusterError for one that is there and silent. Ray tells soon that a
    host is dead, and of its actors only that they are being started again.
    """
    deadline = concurrency.now_s() + timeout_s
    while True:
        left_s = deadline - concurrency.now_s()
        try:
            port.wait_ready(max(0.01, min(_LOOK_S, left_s)))
            return
        except ClusterError:  # ActorGone among them
            if left_s <= _LOOK_S or not alive():
                raise
            concurrency.sleep(_PAUSE_S)


def describe(port: Port) -> Description:
    """What a host knows of the VM; waits for an actor that is being started again."""
    port.wait_ready(_STATUS_TIMEOUT_S)
    return port.call(Presence.describe)


Facts = dict[str, Any]  # what a host has told, for people


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of asking a host; `status` is its latest, from before if it does not answer now.

    `since` is when a silent host first did not answer.
    """

    host: str
    state: HostState
    status: Facts
    why: str = ""
    since: datetime | None = None

    @property
    def generation(self) -> int:
        """The VM's, as far as this host has told it; 0 if not."""
        return int(self.status.get("generation", 0))

    def to_dict(self) -> Facts:
        """As a coordinator's status has it."""
        since = None if self.since is None else self.since.isoformat(timespec="seconds")
        facts = {"host_state": str(self.state), "host_why": self.why, "silent_since": since}
        return {**self.status, "host": self.host, **facts}


class Roll:
    """Asks all hosts of a VM at once how they are, and keeps what they said last.

    `alive` tells of a host by name whether it is there at all.
    """

    def __init__(
        self,
        vm: str,
        alive: Callable[[str], bool],
        clock: Callable[[], datetime] | None = None,
        concurrency: Concurrency = THREADS,
    ) -> None:
        self._vm = vm
        self._alive = alive
        self._clock = clock or concurrency.utc
        self._concurrency = concurrency
        self._latest: dict[str, Facts] = {}
        self._silent: dict[str, datetime] = {}

    def call(self, ports: Mapping[str, Port]) -> list[Heard]:
        """What every host says, the main host first."""
        asks = [partial(self._ask, host, port) for host, port in ports.items()]
        return side_by_side(self._concurrency, asks, "asking")

    def named(self, hosts: Sequence[str]) -> list[Heard]:
        """The hosts without asking them."""
        return [self._heard(host, HostState.UNASKED) for host in hosts]

    def forget(self) -> None:
        """The VM has ended: the next one of its name is another."""
        self._latest, self._silent = {}, {}

    def _ask(self, host: str, port: Port) -> Heard:
        try:
            status = _status_of(self._vm, host, port, partial(self._alive, host), self._concurrency)
        except VmOff as error:
            self._learn(host, port)
            self._latest[host] = {**self._latest[host], "run_state": ""}
            return self._heard(host, HostState.OFF, str(error))
        except VmLost as error:
            self._learn(host, port)
            return self._heard(host, HostState.LOST, str(error))
        except ClusterError as error:
            since = self._silent.setdefault(host, self._clock())
            why = f"since {since:%Y-%m-%d %H:%M:%S} UTC {error}"
            return self._heard(host, HostState.SILENT, why, since)
        except DcresError as error:  # as of a pager that is being started again
            return self._heard(host, HostState.TROUBLED, str(error))
        self._silent.pop(host, None)
        self._latest[host] = status
        if status.get("run_state") == RunState.SHUTDOWN:
            return self._heard(host, HostState.OFF, advice(self._vm, RunState.SHUTDOWN))
        return self._heard(host, HostState.ANSWERS)

    def _learn(self, host: str, port: Port) -> None:
        """From the state file of a host that cannot give a status and has never given one."""
        if self._latest.get(host) or not self._alive(host):
            self._latest.setdefault(host, {})
            return
        generation = reserved = 0
        with suppress(DcresError):
            known = describe(port)
            generation, reserved = known.generation, known.reserved
        pages = reserved // PAGE_SIZE
        shares = {"limit_pages": pages, "capacity_pages": pages}
        self._latest[host] = {"generation": generation, **shares}

    def _heard(
        self, host: str, state: HostState, why: str = "", since: datetime | None = None
    ) -> Heard:
        return Heard(host, state, self._latest.get(host, {}), why, since)


def why_of(heard: Sequence[Heard], state: HostState) -> str:
    """What the hosts in this state say of it."""
    return "; ".join(each.why for each in heard if each.state is state)


def _status_of(
    vm: str, host: str, port: Port, alive: Callable[[], bool], concurrency: Concurrency
) -> Facts:
    """Raises VmLost where it is proven that what the VM had on this host is gone.

    Silence proves nothing, nor does an actor that is being started again for long.
    """
    gone = f"host {host} of VM {vm} is gone"
    try:
        await_ready(port, alive, _STATUS_TIMEOUT_S, concurrency)
        status = port.within(_STATUS_TIMEOUT_S).call(Presence.status)
    except ClusterError as error:
        if alive():
            raise ClusterError(f"host {host} of VM {vm} does not answer ({error})") from None
        raise VmLost(f"{gone} ({error}); restore a checkpoint") from None
    except NotFound:
        # Ray moves the actors of a dead host to a new one, where nothing of the VM is.
        raise VmLost(f"{gone}; restore a checkpoint") from None
    facts: Facts = dict(status)
    if facts.get("state") == "lost":
        raise VmLost(f"VM {vm} is lost: {facts['lost_why']}")
    return facts


def ask_progress(ports: Mapping[str, Port]) -> list[dict[str, Any]]:
    """What every host is at, as `dcres.actors.messages.Progress`; nothing where it is silent."""
    return [{"host": host, **asdict(_progress(port))} for host, port in ports.items()]


def _progress(port: Port) -> Progress:
    try:
        return port.call(Presence.progress)
    except DcresError:  # it is being restarted; the next look may find it
        return Progress()
