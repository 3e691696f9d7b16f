"""Waiting for Ray's nodes to start: as long as the machine needs, and saying what for.

A node takes 5 s where nothing else runs, and minutes on a slow machine that is busy. So what ends
the wait is that a node is ready, or that it has ended: its ``ray start``, or the raylet that this
has started, whose death ``ray start`` itself does not notice before the node is ready.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dcres.actors.ray.local_node import LONGEST_START_S, LocalNode
from dcres.errors import ClusterError
from dcres.linux.process import ProcessId

log = logging.getLogger("dcres.nodes")

Tell = Callable[[str], None]

_POLL_S = 0.05
_LOOK_S = 1.0  # from one look at a node's processes to the next
_TELL_S = 10.0  # nobody is told of a start that takes as long as usual
_TAIL_LINES = 20
# What says why, in the logs of Python (the end of a traceback) and of Ray's own programs.
_REASON = re.compile(
    r"^(\w+\.)*\w*(Error|Exception|Exit|Interrupt)\b.*:|\b(ERR|ERROR)\b|\s[EC] \d+\s"
)
_REMARK = re.compile(r"\s(INFO|SUCC|WARNING|[IW] \d+)\s")


def log_waiting(sentence: str) -> None:
    """What is told where nobody asked for it."""
    log.warning("%s", sentence)


class NodesWait:
    """The wait for nodes of one cluster; `tell` hears of it as soon as it takes long."""

    def __init__(self, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._began = self._looked = clock()
        self._told = 0.0

    def for_port(self, address: str, head: LocalNode, process: ProcessId) -> None:
        """Until something listens at ``host:port``. Raises ClusterError if the node ends."""
        host, _, port = address.rpartition(":")
        while not _listens(host, int(port)):
            self._pause({head: process})

    def for_ready(self, launched: Mapping[LocalNode, ProcessId]) -> None:
        """Until all of them are part of the cluster. Raises ClusterError if one of them ends."""
        waiting = dict(launched)
        while waiting := {node: waiting[node] for node in waiting if not node.is_ready()}:
            self._pause(waiting)

    def _pause(self, waiting: Mapping[LocalNode, ProcessId]) -> None:
        now = self._clock()
        for node, process in waiting.items():
            if not process.alive and not node.is_ready():
                raise _ended(node)
        if now - self._looked >= _LOOK_S:
            self._looked = now
            _look_after_raylets(waiting)
        so_far = now - self._began
        names = [node.settings.name for node in waiting]
        if so_far > LONGEST_START_S:
            raise ClusterError(
                f"{_nodes(names)} not ready after {so_far:.0f} s, although all its processes run; "
                "try again when the machine is less busy"
            )
        if so_far - self._told >= max(_TELL_S, self._told / 3):  # seldomer as time goes by
            self._told = so_far
            self._tell(waiting_for(names, so_far, os.getloadavg()[0], os.cpu_count() or 1))
        time.sleep(_POLL_S)


def waiting_for(names: Iterable[str], so_far_s: float, load: float, processors: int) -> str:
    """The sentence for whoever wonders why nothing happens."""
    busy = "the machine is busy" if load > processors else "the machine is not busy"
    return (
        f"waiting for {_nodes(names)}, {so_far_s:.0f} s so far; "
        f"{busy} (load {load:.0f} on {processors} processors)"
    )


def last_words(*logs: str) -> str:
    """The line that says why a program ended, of the first log in which there is one.

    Of a traceback that is the error, and not a frame. Without such a line it is the last that is
    more than a remark.
    """
    lines = [line.strip() for each in logs for line in reversed(each.splitlines()) if line.strip()]
    reasons = (line for line in lines if _REASON.search(line))
    others = (line for line in lines if not _REMARK.search(line))
    return next(reasons, None) or next(others, "none of its logs says why")


def _nodes(names: Iterable[str]) -> str:
    *first, last = names
    return f"Ray's nodes {', '.join(first)} and {last}" if first else f"Ray's node {last}"


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _look_after_raylets(waiting: Mapping[LocalNode, ProcessId]) -> None:
    raylets = _raylets()
    for node, process in waiting.items():
        raylet = raylets.get(process.pid)
        if raylet is None:
            continue
        if raylet.alive:
            node.promise_agent(raylet.argv)
        elif not node.is_ready():
            raise _ended(node)


def _raylets() -> dict[int, ProcessId]:
    """Session → its raylet, dead or alive: its oldest process of that name.

    A child that the raylet is about to make another program of has its name for a moment.
    """
    found: dict[int, ProcessId] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text(errors="replace").rpartition(") ")
        except OSError:  # it has ended
            continue
        pid, _, name = head.partition(" (")
        if name == "raylet":
            fields = tail.split()
            session, each = int(fields[3]), ProcessId(int(pid), int(fields[19]))
            found[session] = min(found.get(session, each), each, key=lambda one: one.start_time)
    return found


def _ended(node: LocalNode) -> ClusterError:
    logs = [node.log, *sorted(node.temp.glob("session_latest/logs/raylet.*"))]
    texts = [path.read_text(errors="replace") for path in logs if path.is_file()]
    for text in texts:
        log.debug("%s", "\n".join(text.splitlines()[-_TAIL_LINES:]))
    return ClusterError(
        f"Ray's node {node.settings.name} ended while it was starting: {last_words(*texts)}"
    )
