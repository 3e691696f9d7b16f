"""Who gets the processors when others want them, too."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from dcres.linux import priority

pytestmark = pytest.mark.linux

NICE = 9


def of_this_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def of_a_thread_of_its_own() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(of_this_thread()))
    thread.start()
    thread.join()
    return found[0]


def test_what_goes_on_in_the_background_and_what_not() -> None:
    before = of_this_thread()
    with priority.background():
        assert of_this_thread() == of_a_thread_of_its_own() == 15
    assert of_this_thread() == of_a_thread_of_its_own() == before


def test_a_process_takes_the_normal_priority_with_all_its_threads() -> None:
    program = f"""
import os, threading
from dcres.linux import priority
os.nice({NICE})
stay = threading.Event()
started = [threading.Thread(target=stay.wait) for _ in range(2)]
for each in started: each.start()
ids = [each.native_id for each in started] + [threading.get_native_id()]
assert all(os.getpriority(os.PRIO_PROCESS, each) == {NICE} for each in ids)
priority.take_normal()
print([os.getpriority(os.PRIO_PROCESS, each) for each in ids])
stay.set()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[0, 0, 0]", done.stderr
