"""Asking the hosts of a VM how they are, and how far they have come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dcres.actors.messages import Progress, Status
from dcres.actors.ports import Port
from dcres.errors import ActorGone, ClusterError, DcresError, NotFound, VmLost

_STATUS_TIMEOUT_S = 10.0
_PROGRESS_TIMEOUT_S = 5.0


def describe(port: Port) -> Status:
    """What a host knows of the VM; waits for an actor that is being started again."""
    port.wait_ready(_STATUS_TIMEOUT_S)
    description: Status = port.call("describe", timeout_s=_STATUS_TIMEOUT_S)
    return description


def ask_all(vm: str, ports: Mapping[str, Port]) -> list[Status]:
    """The status of every host of `vm`. Raises VmLost for one that is gone or has lost pages."""
    return [_ask(vm, host, port) for host, port in ports.items()]


def _ask(vm: str, host: str, port: Port) -> Status:
    gone = f"host {host} of VM {vm} is gone"
    try:
        port.wait_ready(_STATUS_TIMEOUT_S)
        status: Status = port.call("status", timeout_s=_STATUS_TIMEOUT_S)
    except (ActorGone, ClusterError) as error:
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
