"""A paging process is kept running: one of it, whatever its actor did before it died."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.actors.host import daemon as daemon_
from dcres.actors.host import memory_server
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.daemon import Daemon, restart_delay_s
from dcres.actors.host.life import Life
from dcres.actors.host.prepared import Prepared
from dcres.actors.host.roles import SubRole
from dcres.actors.host.vm_folder import VmFolder, end_leftovers, marker
from dcres.actors.messages import Incarnation, LoadOrder, Role, ServeOrder
from dcres.config import HostSettings
from dcres.errors import Conflict, HostError, PagingError
from dcres.linux.process import ProcessId, find_marked
from dcres.paging import settings
from dcres.paging.settings import ServerSettings
from tests.support.servers import SECRET, VM
from tests.support.speed import patience
from tests.support.vm import descriptors, require_closed
from tests.support.wait import until

pytestmark = pytest.mark.linux

DIES_AT_ONCE = "keyword"  # a module that says nothing and does nothing


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[VmFolder]:
    """With the settings of a memory server; whatever runs for it is ended."""
    made = VmFolder(tmp_path / "run", tmp_path / "mem")
    made.make()
    chosen = ServerSettings(
        vm=VM,
        generation=1,
        secret=SECRET,
        page_count=64,
        capacity_pages=64,
        address="127.0.0.1",
        port=0,
        store=str(made.ram / "store.ram"),
        control=str(made.run / "server.sock"),
    )
    settings.save(chosen, made.run / "server.json")
    yield made
    end_leftovers(made)


def server(folder: VmFolder) -> Daemon:
    return Daemon("dcres.paging.server", folder, "server")


def test_a_process_that_no_pid_file_tells_of_is_adopted(folder: VmFolder) -> None:
    """Its actor was killed between starting it and writing that down."""
    first, second = server(folder), server(folder)
    first.start()
    pid = first.call("status")["pid"]
    pid_file = folder.run / "server.pid"
    written = pid_file.read_text()
    pid_file.unlink()
    second.start()
    try:
        assert second.call("status")["pid"] == pid
        assert pid_file.read_text() == written
    finally:
        first.stop()
        second.stop()


def test_a_restart_takes_over_what_a_dead_actor_started(folder: VmFolder) -> None:
    """The pid file names a process that is dead; its successor runs already."""
    first, second = server(folder), server(folder)
    first.start()
    pid_file = folder.run / "server.pid"
    pid_file.write_text(json.dumps({"pid": os.getpid(), "start_time": 1}))
    second.adopt()
    try:
        assert second.call("status")["pid"] == first.call("status")["pid"]
        assert json.loads(pid_file.read_text())["pid"] != os.getpid()
        assert second.restarts == 0
    finally:
        first.stop()
        second.stop()


def test_a_memory_server_that_dies_is_started_again_at_once(folder: VmFolder) -> None:
    daemon = server(folder)
    daemon.start()
    try:
        os.kill(daemon.call("status")["pid"], signal.SIGKILL)
        until(lambda: daemon.restarts == 1, what="it is started again")
        assert daemon.call_patiently("status")["held_pages"] == 0
    finally:
        daemon.stop()


def waiting_for(folder: VmFolder) -> list[ProcessId]:
    """What was prepared, or started, for the VM of `folder`."""
    return [each for pair in marker(folder).items() for each in find_marked(*pair)]


def test_what_was_prepared_is_what_starts(folder: VmFolder) -> None:
    daemon = server(folder)
    (folder.run / "server.json").rename(folder.run / "later.json")
    daemon.prepare()
    daemon.prepare()
    (ready,) = waiting_for(folder)
    (folder.run / "later.json").rename(folder.run / "server.json")
    daemon.start()
    try:
        assert daemon.call("status")["pid"] == ready.pid
        assert json.loads((folder.run / "server.pid").read_text())["pid"] == ready.pid
        os.kill(ready.pid, signal.SIGKILL)
        until(lambda: daemon.restarts == 1, 1.0, "it is started again")
        assert daemon.call_patiently("status")["pid"] != ready.pid
    finally:
        daemon.stop()
    assert waiting_for(folder) == []


def test_what_was_prepared_in_vain_ends(folder: VmFolder) -> None:
    daemon = server(folder)
    daemon.prepare()
    daemon.stop()
    assert waiting_for(folder) == []


def test_what_died_before_it_was_needed_is_replaced(folder: VmFolder) -> None:
    daemon = server(folder)
    daemon.prepare()
    (ready,) = waiting_for(folder)
    ready.end()
    daemon.start()
    try:
        assert daemon.call("status")["pid"] != ready.pid
    finally:
        daemon.stop()


def test_what_was_prepared_ends_with_its_actor(folder: VmFolder) -> None:
    """An actor that is killed closes its end of the pipe."""
    prepared = Prepared.start(
        [sys.executable, "-m", "dcres.paging.server", str(folder.run / "server.json")],
        folder.run / "server.log",
        {**os.environ, **marker(folder)},
    )
    os.close(prepared._word_fd)
    assert prepared.process.wait_gone(patience(10.0))
    assert not (folder.run / "server.sock").exists(), "it served nothing"


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where guest memory may lie."""
    with tempfile.TemporaryDirectory(prefix="dcres-t-", dir="/dev/shm") as folder:
        yield Path(folder)


def test_an_end_that_meets_a_start_under_way_leaves_nothing_prepared(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end has told the start to hurry before that has prepared its memory server."""
    settings = HostSettings(name="h", run=tmp_path / "r", ram=memory, store=tmp_path / "s")
    agent = HostAgent("vm", Role.SUB, environ=settings.environ())
    sub, life = agent.composed, agent.site.life
    assert isinstance(sub, SubRole)
    end = threading.Thread(target=sub.presence.destroy)
    daemon = sub.server.daemon
    prepare = daemon.prepare

    def late() -> None:
        end.start()
        until(lambda: life._over and daemon._unwanted.is_set(), 5, "the end has come")
        prepare()

    def load(*_: object) -> None:
        raise Conflict("load was cancelled")

    monkeypatch.setattr(daemon, "prepare", late)
    monkeypatch.setattr(memory_server, "load_pages", load)
    before = descriptors()
    with pytest.raises(Conflict):
        sub.server.serve(ServeOrder(Incarnation("vm", 1, SECRET), 64, 64, LoadOrder("", ())))
    end.join(patience(20))
    assert not end.is_alive()
    require_closed(before)
    assert waiting_for(agent.site.folder) == []


@pytest.mark.parametrize("error", [HostError("its launcher was ended"), FileNotFoundError("gone")])
def test_a_start_that_fails_by_the_end_says_so(error: Exception) -> None:
    life, ended = Life(), threading.Event()

    def end() -> None:
        with life.ending(ended.set):
            pass

    def start() -> None:
        with life.beginning():
            ending.start()
            assert ended.wait(patience(5))
            raise error

    ending = threading.Thread(target=end)
    with pytest.raises(Conflict, match="ended before its start") as raised:
        start()
    assert raised.value.__cause__ is error
    ending.join(patience(5))
    assert not ending.is_alive()


def test_a_start_that_fails_by_itself_says_why() -> None:
    with pytest.raises(HostError, match="no such program"), Life().beginning():
        raise HostError("no such program")


def answering_for_another(path: Path) -> socket.socket:
    """Somebody at a control socket who answers every order, and has another pid."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(b'{"ok": true, "pid": 1}\n')

    threading.Thread(target=answer, daemon=True).start()
    return listener


def test_a_start_fails_when_the_process_is_dead_and_another_answers(folder: VmFolder) -> None:
    daemon = Daemon(DIES_AT_ONCE, folder, "server")
    errors: list[PagingError] = []

    def start() -> None:
        try:
            daemon.start()
        except PagingError as error:
            errors.append(error)

    with answering_for_another(folder.run / "server.sock") as listener:
        threading.Thread(target=start, daemon=True).start()
        until(lambda: errors, 30.0, "the start fails")
        listener.shutdown(socket.SHUT_RDWR)
    assert "did not start" in str(errors[0])
    daemon.stop()


def test_what_never_stays_up_is_given_up_and_says_why(
    folder: VmFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_, "_MOST_RESTARTS", 2)
    monkeypatch.setattr(daemon_, "_FIRST_DELAY_S", 0.01)
    daemon = Daemon(DIES_AT_ONCE, folder, "server")
    daemon.adopt()
    try:
        until(lambda: daemon.given_up, what="it is given up")
        assert daemon.restarts == 2
        with pytest.raises(PagingError, match="the server keeps dying: it said nothing"):
            daemon.call_patiently("status")
    finally:
        daemon.stop()


def test_restarts_come_at_once_and_then_ever_later() -> None:
    delays = [restart_delay_s(number) for number in range(1, 21)]
    assert delays[:4] == [0.0, 0.1, 0.2, 0.4]
    assert max(delays) == delays[-1] == 5.0
    assert 60 < sum(delays) < 120, "what mends itself within a minute is not given up"
