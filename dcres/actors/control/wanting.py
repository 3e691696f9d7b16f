"""A start or restore goes on only while the program that wants it is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dcres.actors.control.concurrency import Concurrency
from dcres.errors import DcresError

log = logging.getLogger("dcres.coordinator")

_LOOK_EVERY_S = 1.0


@contextmanager
def while_it_lives(
    driver: str | None,
    is_gone: Callable[[str], bool],
    give_up: Callable[[], object],
    concurrency: Concurrency,
) -> Iterator[None]:
    """Call `give_up` in this block, again and again, from when `is_gone(driver)` on.

    A program that is killed tells nobody, but Ray knows that it is gone. While that cannot be
    found out it counts as there. `driver` None is somebody whose end would say nothing.
    """
    if driver is None:
        yield
        return
    ended = concurrency.signal()

    def look() -> None:
        while not ended.wait(_LOOK_EVERY_S):
            with suppress(DcresError):
                if is_gone(driver):
                    log.warning("giving up what job %s wanted, whose driver is gone", driver)
                    give_up()

    looking = concurrency.spawn(look, "dcres-wanting")
    try:
        yield
    finally:
        ended.set()
        looking.join()
