"""What the tests of whole VMs look at to find what was left open."""

from __future__ import annotations

import os
import socket
import subprocess

from tests.support.vm import descriptors


def opened_since(before: set[tuple[str, str]]) -> set[str]:
    return {fd for fd, _ in descriptors() - before}


def test_files_pipes_and_sockets_are_seen() -> None:
    before = descriptors()
    reader, writer = os.pipe()
    one, other = socket.socketpair()
    with one, other:
        fds = {str(fd) for fd in (reader, writer, one.fileno(), other.fileno())}
        assert fds <= opened_since(before)
    os.close(reader)
    os.close(writer)
    assert not fds & opened_since(before)


def test_what_another_language_has_connected_is_not_ours() -> None:
    before = descriptors()
    fds = [each.detach() for each in socket.socketpair()]
    assert not set(map(str, fds)) & opened_since(before)
    for fd in fds:
        os.close(fd)


def test_a_pidfd_is_seen_once_its_process_has_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        before = descriptors()
        fd = os.pidfd_open(process.pid)
        assert str(fd) not in opened_since(before), "a watcher has one, too"
        process.kill()
    assert str(fd) in opened_since(before)
    os.close(fd)
    assert str(fd) not in opened_since(before)
