"""Processes that outlive their spawner."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.errors import UnsupportedHost
from dcres.linux.holding import hold, is_held
from dcres.linux.process import ProcessId, find_marked, spawn_detached
from tests.support.speed import patience
from tests.support.wait import until

MARK = "DCRES_TEST_MARK"


@pytest.fixture
def mark() -> Iterator[str]:
    """A value by which a test's processes are found, and ended when it is over."""
    value = uuid.uuid4().hex
    yield value
    for process in find_marked(MARK, value):
        process.kill(signal.SIGKILL)


def environ(mark: str) -> dict[str, str]:
    return {**os.environ, MARK: mark}


def test_a_process_is_known_by_its_command_line(tmp_path: Path, mark: str) -> None:
    argv = ["sleep", "60", "0"]
    process = spawn_detached(argv, tmp_path / "log", environ(mark))
    until(lambda: process.argv == argv, what="the program has replaced the shell")
    process.kill()
    assert process.wait_gone(patience(5.0))
    assert process.argv == []


def test_normal_priority_whatever_ours_is(tmp_path: Path, mark: str) -> None:
    spawn = (
        "from pathlib import Path; from dcres.linux.process import spawn_detached; import sys;"
        "print(spawn_detached(['sleep', '60'], Path(sys.argv[1])).pid)"
    )
    told = subprocess.run(
        ["nice", "-n", "15", sys.executable, "-c", spawn, str(tmp_path / "log")],
        env=environ(mark),
        capture_output=True,
        text=True,
        check=True,
    )
    assert os.getpriority(os.PRIO_PROCESS, int(told.stdout)) == 0


def test_output_and_input(tmp_path: Path, mark: str) -> None:
    log = tmp_path / "log"
    process = spawn_detached(
        ["sh", "-c", "cat; pwd; echo words >&2"], log, environ(mark), tmp_path, b"secret\n"
    )
    assert process.wait_gone(patience(10))
    assert log.read_text().splitlines() == ["secret", str(tmp_path), "words"]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_the_log_is_appended_to(tmp_path: Path, mark: str) -> None:
    log = tmp_path / "log"
    for word in ("one", "two"):
        assert spawn_detached(["echo", word], log, environ(mark)).wait_gone(patience(10))
    assert log.read_text() == "one\ntwo\n"


def test_a_daemon_is_in_its_own_session_and_not_our_child(tmp_path: Path, mark: str) -> None:
    process = spawn_detached(["sleep", "60"], tmp_path / "log", environ(mark))
    assert process.alive
    assert os.getsid(process.pid) == process.pid
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    # The program opens and closes its libraries first.
    until(lambda: sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["0", "1", "2"], what="no more")
    assert process.kill(signal.SIGTERM)
    assert process.wait_gone(patience(10))
    assert [process.alive, process.kill(signal.SIGTERM)] == [False, False]


def test_a_daemon_survives_its_spawner(tmp_path: Path, mark: str) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dcres.linux.process import spawn_detached\n"
        f"spawn_detached(['sleep', '60'], Path({str(tmp_path / 'log')!r}))\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    spawner = subprocess.run(
        [sys.executable, "-c", program], env=environ(mark), start_new_session=True, check=False
    )
    assert spawner.returncode == -signal.SIGKILL
    (daemon,) = find_marked(MARK, mark)
    assert daemon.alive
    adopted = ProcessId(daemon.pid, daemon.start_time)
    adopted.end()
    until(lambda: find_marked(MARK, mark) == [], what="the daemon is gone")


def test_another_process_with_the_same_pid_is_not_meant(tmp_path: Path, mark: str) -> None:
    process = spawn_detached(["sleep", "60"], tmp_path / "log", environ(mark))
    earlier = ProcessId(process.pid, process.start_time - 1)
    assert not earlier.alive
    assert not earlier.kill(signal.SIGKILL)
    assert earlier.wait_gone(0)
    assert process.alive


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = ProcessId.of(child.pid)
    assert process is not None
    assert process.alive
    assert not process.wait_gone(0)
    child.kill()
    assert process.wait_gone(patience(10))
    assert ProcessId.of(child.pid) is not None, "it is a zombie still"
    assert [process.alive] == [False]
    child.wait()
    assert ProcessId.of(child.pid) is None


def test_end_kills_what_ignores_sigterm(tmp_path: Path, mark: str) -> None:
    log = tmp_path / "log"
    process = spawn_detached(
        ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"], log, environ(mark)
    )
    until(lambda: "up" in log.read_text(), what="the trap is set")
    process.end(grace_s=0.2)
    assert not process.alive


def test_a_name_with_parentheses_and_spaces(tmp_path: Path, mark: str) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    process = spawn_detached([str(program), "60"], tmp_path / "log", environ(mark))
    until(
        lambda: Path(f"/proc/{process.pid}/comm").read_text() == "a) R (b\n", what="exec happened"
    )
    assert ProcessId.of(process.pid) == process


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHost, match="no-such-program is not installed"):
        spawn_detached(["no-such-program"], tmp_path / "log")


_BIG = """
import mmap, sys, threading, time
memory = mmap.mmap(-1, 256 << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
for _ in range(4):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""


def test_what_has_ended_holds_no_lock_any_more(tmp_path: Path) -> None:
    """Its first thread may be a zombie while the last one still gives back memory."""
    path = tmp_path / "lock"
    path.touch()
    for _ in range(8):
        fd = os.open(path, os.O_RDWR)
        assert hold(fd)
        with subprocess.Popen(
            [sys.executable, "-c", _BIG], stdout=subprocess.PIPE, pass_fds=[fd]
        ) as child:
            os.close(fd)
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            process = ProcessId.of(child.pid)
            assert process is not None
            assert process.kill()
            assert process.end(0.0)
            assert not is_held(path)
            assert not process.kill(), "it has ended"
