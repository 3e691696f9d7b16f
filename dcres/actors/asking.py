"""Asking the hosts of a VM how they are, and how far they have come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from dcres.actors.messages import Progress, Status
from dcres.actors.ports import Port
from dcres.errors import ActorGone, ClusterError, DcresError, NotFound, VmLost

_STATUS_TIMEOUT_S = 20.0  # Ray notices a host that is cut off after 10 s
_PROGRESS_TIMEOUT_S = 5.0
_PAUSE_S = 0.05
_LOOK_S = 1.0  # Ray notices a dead host after 5 s in a cluster of dcres, 14 s by default


def await_ready(port: Port, alive: Callable[[], bool], timeout_s: float) -> None:
    """Wait until an actor answers, through a restart; no longer than its host is `alive`.

    Raises ActorGone, and ClusterError for one that is there and silent. Ray tells soon that a
    host is dead, and of its actors only that they are being started again.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            port.wait_ready(max(0.01, min(_LOOK_S, left_s)))
            return
        except ClusterError:  # ActorGone among them
            if left_s <= _LOOK_S or not alive():
                raise
            time.sleep(_PAUSE_S)


def describe(port: Port) -> Status:
    """What a host knows of the VM; waits for an actor that is being started again."""
    port.wait_ready(_STATUS_TIMEOUT_S)
    description: Status = port.call("describe", timeout_s=_STATUS_TIMEOUT_S)
    return description


def ask_all(vm: str, ports: Mapping[str, Port], alive: Callable[[str], bool]) -> list[Status]:
    """The status of every host of `vm`. Raises VmLost for one that is gone or has lost pages.

    Raises ClusterError for one that is there and does not answer: it may only be busy. `alive`
    tells of a host by name whether it is there at all.
    """
    return [_ask(vm, host, port, partial(alive, host)) for host, port in ports.items()]


def _ask(vm: str, host: str, port: Port, alive: Callable[[], bool]) -> Status:
    gone = f"host {host} of VM {vm} is gone"
    try:
        await_ready(port, alive, _STATUS_TIMEOUT_S)
        status: Status = port.call("status", timeout_s=_STATUS_TIMEOUT_S)
    except ClusterError as error:
        if not isinstance(error, ActorGone) and alive():
            raise ClusterError(f"host {host} of VM {vm} does not answer ({error})") from None
        raise VmLost(f"{gone} ({error}); restore a checkpoint") from None
    except NotFound:
        # Ray moves the actors of a dead host to a new one, where nothing of the VM is.
        raise VmLost(f"{gone}; restore a checkpoint") from None
    if status.get("state") == "lost":
        raise VmLost(f"VM {vm} is lost: {status['lost_why']}")
    return status


def ask_progress(ports: Mapping[str, Port]) -> list[dict[str, Any]]:
    """What every host is at, as `dcres.actors.messages.Progress`; nothing where it is silent."""
    return [{"host": host, **asdict(_progress(port))} for host, port in ports.items()]


def _progress(port: Port) -> Progress:
    try:
        progress: Progress = port.call("progress", timeout_s=_PROGRESS_TIMEOUT_S)
    except DcresError:  # it is being restarted; the next look may find it
        return Progress()
    return progress
