"""Ctrl-C and its like: once is heard, a second time does not cut cleaning up short."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest

from dcres.actors import _ray
from dcres.actors.local_cluster import LocalCluster
from dcres.api import cluster as api_cluster
from dcres.api import vm as api_vm
from dcres.api.session import Session
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


def test_a_shell_that_ignores_it_for_us_is_overruled() -> None:
    """As one does for a job in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt_on_signals()
    assert heard(signal.SIGINT)


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
    patch.setattr(LocalCluster, "stop", cleaning.clean)
    LocalCluster.start(home, 1, 1 << 20)


def leave_a_cluster(cleaning: Cleaning, home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalCluster, "_bring_up", lambda *_: None)
    patch.setattr(LocalCluster, "stop", cleaning.clean)
    for name in ("connected_address", "connect", "disconnect"):
        patch.setattr(_ray, name, lambda *_: None)
    with api_cluster.local_cluster(hosts=1, memory="1MiB", home=home):
        cleaning.begin()


def bring_up_a_vm(cleaning: Cleaning, home: Path, patch: pytest.MonkeyPatch) -> None:
    class Retiring:
        retire = cleaning.clean

        def coordinator(self, vm: str) -> Any:
            return None

    patch.setattr(api_vm, "attend", cleaning.begin)
    api_vm._bring_up(cast(Session, Retiring()), "vm", ("start",), "start vm", False)


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
