"""TCP that notices when its peer is gone, and network namespaces: a second host's network."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dcres.linux import libc
from dcres.linux.files import opened

_NAMED = Path("/run/netns")  # ip-netns(8)
_CLONE_NEWNET = 0x40000000  # linux/sched.h

# tcp(7). A peer that says nothing is asked after 5 s, then every 5 s; either way, and when what
# was sent is not acknowledged, the connection ends with ETIMEDOUT after 20 s. Without these a host
# that lost its power keeps its connections for two hours, and 15 minutes where data was sent.
KEEPALIVE_S = 5
PEER_TIMEOUT_S = 20


def watch_peer(sock: socket.socket) -> None:
    """Let the kernel end a TCP connection whose peer's host does not answer; see above."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PEER_TIMEOUT_S // KEEPALIVE_S - 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_S * 1000)


def enter(name: str) -> None:
    """Let the calling thread, and no other, make its sockets in the namespace `name`.

    A socket stays where it was made, whoever uses it. Raises OSError.
    """
    with opened(_NAMED / name, os.O_RDONLY) as fd:
        libc.setns(fd, _CLONE_NEWNET)
