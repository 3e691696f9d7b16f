"""Ctrl-C and its like: once is heard, a second time does not cut cleaning up short."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_home import Claim
from dcres.api import cluster as api_cluster
from dcres.linux.interrupt import interrupt_on_signals, uninterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
every_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As in a command; pytest gets its own handlers back."""
    before = {each: signal.signal(each, lambda *_: None) for each in SIGNALS}
    interrupt_on_signals()
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def heard(number: signal.Signals) -> bool:
    """Whether the signal interrupts us; pytest would end for it."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        return str(error) == number.name
    return False


@every_signal
def test_each_is_like_ctrl_c_except_while_cleaning_up(number: signal.Signals) -> None:
    with uninterrupted():
        assert not heard(number)
    assert heard(number)


@every_signal
def test_a_cleaning_up_that_fails_leaves_the_handlers_as_they_were(number: signal.Signals) -> None:
    with pytest.raises(OSError, match="busy"), uninterrupted():
        raise OSError("busy")
    assert heard(number)


def test_cleaning_up_within_cleaning_up_does_not_end_it() -> None:
    with uninterrupted():
        with uninterrupted():
            pass
        assert not heard(signal.SIGINT)
    assert heard(signal.SIGINT)


@every_signal
def test_one_that_is_ignored_stays_so(number: signal.Signals) -> None:
    """As nohup does with SIGHUP, and a shell with SIGINT for a job in the background."""
    signal.signal(number, signal.SIG_IGN)
    interrupt_on_signals()
    with uninterrupted():
        pass
    assert signal.getsignal(number) is signal.SIG_IGN
    assert [heard(each) for each in SIGNALS] == [each is not number for each in SIGNALS]


@pytest.mark.parametrize("starter", [["nohup"], ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh"]])
def test_a_command_that_was_told_to_ignore_them(starter: list[str]) -> None:
    program = (
        "import sys; from dcres.linux.interrupt import interrupt_on_signals as i; i()\n"
        "print(flush=True); sys.stdin.read(); print('went on', flush=True); sys.stdin.close()\n"
        "import signal; signal.pause()"
    )
    command = [*starter, sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as ran:
        assert ran.stdin is not None
        assert ran.stdout is not None
        ran.stdout.readline()
        for each in (signal.SIGHUP, *([signal.SIGINT] if starter[0] == "sh" else [])):
            ran.send_signal(each)
        ran.stdin.close()
        went_on = ran.stdout.readline()
        ran.send_signal(signal.SIGTERM)
        assert went_on == "went on\n"
        assert ran.stderr is not None
        assert ran.stderr.read().endswith("KeyboardInterrupt: SIGTERM\n"), "which still does"


def test_in_a_thread_nothing_happens() -> None:
    done = []

    def work() -> None:
        interrupt_on_signals()
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def in_a_program(text: str) -> subprocess.CompletedProcess[str]:
    """How a program of its own ends that sends itself SIGTERM with ``term()``."""
    begin = (
        "import signal, sys, threading\n"
        "from dcres.linux.interrupt import Terminated, ended_by_sigterm, uninterrupted\n"
        "term = lambda: signal.raise_signal(signal.SIGTERM)\n"
        "say = lambda *words: print(*words, flush=True)\n"
    )
    command = [sys.executable, "-c", begin + textwrap.dedent(text)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class TestEndedBySigterm:
    """What a library does about SIGTERM while it has something under way."""

    def test_the_block_is_left_first_and_then_the_process_ends_by_the_signal(self) -> None:
        ran = in_a_program("""
            with ended_by_sigterm():
                try:
                    with ended_by_sigterm():  # one in another is the same
                        term()
                except Terminated:
                    term()  # more of them change nothing
                    with uninterrupted():
                        term()
                    say("taken down")
                    raise
            say("goes on")
        """)
        assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGTERM, "taken down\n", "")

    def test_also_if_what_it_interrupts_has_an_answer_all_the_same(self) -> None:
        ran = in_a_program("""
            with ended_by_sigterm():
                try:
                    term()
                except Terminated:
                    pass
            say("goes on")
        """)
        assert (ran.returncode, ran.stdout) == (-signal.SIGTERM, "")

    def test_without_a_signal_nothing_stays(self) -> None:
        ran = in_a_program("""
            with ended_by_sigterm():
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            mine = lambda *_: say("mine")
            with ended_by_sigterm():
                signal.signal(signal.SIGTERM, mine)
            assert signal.getsignal(signal.SIGTERM) is mine, "the program has set it meanwhile"
        """)
        assert (ran.returncode, ran.stderr) == (0, "")

    def test_what_the_program_does_about_it_goes_first(self) -> None:
        ran = in_a_program("""
            for handler in (signal.SIG_IGN, lambda *_: say("mine")):
                signal.signal(signal.SIGTERM, handler)
                with ended_by_sigterm():
                    term()
                assert signal.getsignal(signal.SIGTERM) is handler
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
            with ended_by_sigterm():
                term()
        """)
        assert (ran.returncode, ran.stdout, ran.stderr) == (7, "mine\n", "")

    def test_in_a_thread_nothing_can_be_done(self) -> None:
        ran = in_a_program("""
            def work():
                with ended_by_sigterm():
                    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        """)
        assert (ran.returncode, ran.stderr) == (0, "")


class Cleaning:
    """Something that is cleaned up after a first Ctrl-C, while a second comes."""

    def __init__(self) -> None:
        self.done = False

    def begin(self, *_: object, **__: object) -> NoReturn:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the first was not heard")

    def clean(self, *_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        self.done = True


def start_a_cluster(cleaning: Cleaning, home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalCluster, "_bring_up", cleaning.begin)
    patch.setattr(Claim, "clear", cleaning.clean)
    LocalCluster.start(home, 1, 1 << 20)


def leave_a_cluster(cleaning: Cleaning, home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalCluster, "_bring_up", lambda *_: None)
    patch.setattr(LocalCluster, "stop", cleaning.clean)
    for name in ("connected_address", "connect", "disconnect"):
        patch.setattr(gateway, name, lambda *_: None)
    with api_cluster.local_cluster(hosts=1, memory="1MiB", home=home):
        cleaning.begin()


def bring_up_a_vm(cleaning: Cleaning, home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Coordinators, "obtain", lambda *_: None)
    patch.setattr(Coordinators, "retire", cleaning.clean)
    with Coordinators().bringing_up("vm"):
        cleaning.begin()


@pytest.mark.parametrize("work", [start_a_cluster, leave_a_cluster, bring_up_a_vm])
def test_a_second_ctrl_c_does_not_stop_taking_down(
    work: Callable[[Cleaning, Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cleaning = Cleaning()
    with pytest.raises(KeyboardInterrupt):
        work(cleaning, tmp_path, monkeypatch)
    assert cleaning.done


SIGTERM_IN_A_LOCAL_CLUSTER = """
import signal, sys
from pathlib import Path
import dcres
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.local_cluster import LocalCluster

home = Path(sys.argv[1])
LocalCluster._bring_up = lambda *_: None
LocalCluster.stop = lambda self: (home / "stopped").touch()
gateway.connected_address = gateway.connect = gateway.disconnect = lambda *_: None
with dcres.local_cluster(hosts=1, memory="1MiB", home=home, keep=True):
    signal.raise_signal(signal.SIGTERM)
    print("not reached")
"""


def test_a_local_cluster_ends_with_a_program_that_is_told_to(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGTERM_IN_A_LOCAL_CLUSTER, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
    assert (tmp_path / "stopped").exists()
