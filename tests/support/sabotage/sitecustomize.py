"""Takes one guard out of a paging process, to show that the tests notice.

Put first on PYTHONPATH of a process that is started with DCRES_TEST_SABOTAGE.
"""

from __future__ import annotations

import os
from typing import Any


def arrivals_are_not_recorded() -> None:
    from dcres.paging.changes import NOBODY_LOOKS
    from dcres.paging.pager.book import PageBook

    honest = PageBook._came

    def came(self: Any, first: int, stop: int) -> None:
        changes, self.changes = self.changes, NOBODY_LOOKS
        try:
            honest(self, first, stop)
        finally:
            self.changes = changes

    PageBook._came = came  # type: ignore[method-assign]


def departures_are_not_recorded() -> None:
    from dcres.paging.changes import NOBODY_LOOKS
    from dcres.paging.pager.evictor import Evictor

    honest = Evictor.step

    def step(self: Any) -> bool:
        book = self._book
        changes, book.changes = book.changes, NOBODY_LOOKS
        try:
            return honest(self)
        finally:
            book.changes = changes

    Evictor.step = step  # type: ignore[method-assign]


def writes_are_looked_for_only_before_the_stop() -> None:
    from dcres.paging.pager.evictor import Evictor

    honest = Evictor.note_writes

    def note_writes(self: Any) -> None:
        if self.enabled:  # it is not from the drain on
            honest(self)

    Evictor.note_writes = note_writes  # type: ignore[method-assign]


def last_writes_are_not_asked_for() -> None:
    from dcres.paging.pager.evictor import Evictor

    Evictor._note_last_writes = lambda self, pages: None  # type: ignore[method-assign]


def pages_come_back_clean() -> None:
    from dcres.paging.pager.book import PageBook

    honest = PageBook._came

    def came(self: Any, first: int, stop: int) -> None:
        honest(self, first, stop)
        self.content._marks[first:stop] = 0

    PageBook._came = came  # type: ignore[method-assign]


def a_pager_dies_in_a_scan() -> None:
    """Between the scan, which protects pages again, and the marks of what it found."""
    from dcres.paging.pager.evictor import Evictor

    honest = Evictor.note_writes
    scans = iter(range(1 << 30))

    def note_writes(self: Any) -> None:
        if self.enabled and self._book.content.kept and next(scans) == 9:
            self._tracker.scan(protect=True)
            os._exit(9)
        honest(self)

    Evictor.note_writes = note_writes  # type: ignore[method-assign]


def a_pager_trusts_one_that_died_in_a_scan() -> None:
    from dcres.paging.content import ContentChanges

    a_pager_dies_in_a_scan()
    ContentChanges.distrust = lambda self, pages: None  # type: ignore[method-assign]


def linux_6_1() -> None:
    """The kernel's answers to UFFDIO_API before WP_UNPOPULATED (6.4) and WP_ASYNC (6.7)."""
    import errno
    import fcntl

    from dcres.linux import abi

    has = abi.UffdFeature.MISSING_SHMEM | abi.UffdFeature.WP_HUGETLBFS_SHMEM
    honest = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: Any = 0) -> Any:
        if request != abi.UFFDIO_API:
            return honest(fd, request, argument)
        # fs/userfaultfd.c, userfaultfd_api: asked for what it lacks it clears the struct.
        wanted, argument.features = argument.features, 0
        if wanted & ~int(has):
            argument.api = 0
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        argument.features = int(has)
        return 0

    fcntl.ioctl = ioctl  # type: ignore[assignment]


def no_userfaultfd() -> None:
    """A kernel that was built without: its number is one that no system call has."""
    from dcres.linux import libc

    libc.SYS_USERFAULTFD = 999


_KNOWN = {
    "linux 6.1": linux_6_1,
    "no userfaultfd": no_userfaultfd,
    "last scan": writes_are_looked_for_only_before_the_stop,
    "arrivals": arrivals_are_not_recorded,
    "departures": departures_are_not_recorded,
    "last writes": last_writes_are_not_asked_for,
    "kept at page-in": pages_come_back_clean,
    "dies in a scan": a_pager_dies_in_a_scan,
    "trusts one that died": a_pager_trusts_one_that_died_in_a_scan,
}

if "DCRES_TEST_SABOTAGE" in os.environ:
    _KNOWN[os.environ["DCRES_TEST_SABOTAGE"]]()
