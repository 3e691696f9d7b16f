"""Buffers that are kept, and are there before they are needed."""

from __future__ import annotations

import errno
import mmap
import resource
import threading
from typing import NoReturn

import pytest

from dcres.model.pages import PAGE_SIZE
from dcres.storage.engine import buffers
from dcres.storage.engine.buffers import Buffers

LENGTH = 16 * PAGE_SIZE  # short, so that they have no huge pages


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


OWN_FAULTS = 3  # that Python itself may have meanwhile, on a loaded machine


def touch(buffer: memoryview, length_bytes: int) -> int:
    """How many pages were not there, and up to OWN_FAULTS more."""
    before = faults()
    for at in range(0, length_bytes, PAGE_SIZE):
        buffer[at] = 1
    return faults() - before


def test_two_users_never_have_the_same_buffer() -> None:
    pool = Buffers(LENGTH)
    with pool.lent() as one, pool.lent() as other:
        assert len(one) == len(other) == LENGTH
        one[0], other[0] = 1, 2
        assert one[0] == 1


def test_a_buffer_is_kept_for_the_next_user() -> None:
    pool = Buffers(LENGTH)
    with pool.lent() as buffer:
        assert touch(buffer, LENGTH) >= LENGTH // PAGE_SIZE
    with pool.lent() as buffer:
        assert touch(buffer, LENGTH) <= OWN_FAULTS


def test_a_buffer_comes_back_from_a_user_that_fails() -> None:
    pool = Buffers(LENGTH)

    def fail() -> NoReturn:
        with pool.lent() as buffer:
            buffer[0] = 7
            raise ValueError("as planned")

    with pytest.raises(ValueError, match="as planned"):
        fail()
    with pool.lent() as again:
        assert again[0] == 7


def test_what_was_warmed_is_there() -> None:
    pool = Buffers(LENGTH)
    pool.warm(2, LENGTH // 2)
    with pool.lent() as one, pool.lent() as other, pool.lent() as cold:
        assert touch(one, LENGTH // 2) <= OWN_FAULTS
        assert touch(other, LENGTH // 2) <= OWN_FAULTS
        assert touch(cold, LENGTH) >= LENGTH // PAGE_SIZE


def test_warming_makes_no_more_than_there_are_to_be() -> None:
    pool = Buffers(LENGTH)
    with pool.lent() as mine:
        mine[0] = 7
        pool.warm(2, LENGTH)
        with pool.lent() as one, pool.lent() as fresh:
            assert touch(one, LENGTH) <= OWN_FAULTS
            assert touch(fresh, LENGTH) >= LENGTH // PAGE_SIZE
        assert mine[0] == 7


def test_users_may_come_while_it_is_warmed() -> None:
    pool = Buffers(1 << 20)
    threads = [threading.Thread(target=pool.warm, args=(8, 1 << 20)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for mark in range(200):
        with pool.lent() as one, pool.lent() as other:
            one[:2], other[:2] = bytes([1, mark]), bytes([2, mark])
            assert (one[0], one[1], other[0], other[1]) == (1, mark, 2, mark)
    for thread in threads:
        thread.join()


def test_no_memory_is_met_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(length_bytes: int) -> NoReturn:
        raise OSError(errno.ENOMEM, "no memory")

    def unpopulated(buffer: mmap.mmap, length_bytes: int) -> NoReturn:
        none(length_bytes)

    pool = Buffers(LENGTH)
    monkeypatch.setattr(buffers, "populate", unpopulated)
    pool.warm(1, LENGTH)
    monkeypatch.setattr(buffers, "aligned_buffer", none)
    pool.warm(2, LENGTH)
    with pool.lent(), pytest.raises(OSError, match="no memory"), pool.lent():
        raise AssertionError("it was lent what is not there")
