"""How a pager comes to a standstill: what its two steps wait for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dcres.paging.pager.standstill import PagerState, Standstill
from dcres.paging.transport.link import LinkState


class Pager:
    """What a standstill looks at, and the answers that it gave."""

    def __init__(self) -> None:
        self.faults = SimpleNamespace(
            fetching=False, pages_in=0, zero_pages=0, taken_back=0, faults=0
        )
        self.evictor = SimpleNamespace(
            drained=True, enabled=True, pages_out=0, note_writes=lambda: None
        )
        self.mover = SimpleNamespace(drained=True, enabled=True)
        self.link = SimpleNamespace(
            sub=SimpleNamespace(host="h1"),
            state=LinkState.READY,
            settled=True,
            flush_releases=lambda: None,
        )
        parts: tuple[Any, Any, Any] = (self.faults, self.evictor, self.mover)
        links: list[Any] = [self.link]
        self.standstill = Standstill(*parts, lambda: 7)
        self.standstill.set_links(links)
        self.answers: list[Any] = []


@pytest.fixture
def pager() -> Pager:
    return Pager()


def quiesced(pager: Pager) -> bool:
    pager.standstill.keep_promises()
    return bool(pager.answers)


def test_pages_that_the_guest_had_asked_for_do_not_count_as_moved_for_a_checkpoint(
    pager: Pager,
) -> None:
    pager.faults.fetching = True
    pager.standstill.quiesce(pager.answers.append)
    assert not quiesced(pager)
    pager.faults.pages_in, pager.faults.fetching = 14, False
    assert quiesced(pager)
    assert pager.answers[0].pages_in == 14
    pager.standstill.freeze(pager.answers.append)
    pager.standstill.keep_promises()
    assert pager.answers[1].pages_in == 14
    assert pager.standstill.state is PagerState.FROZEN


@pytest.mark.parametrize("what", ["evictor", "mover"])
def test_pages_on_their_way_out_are_waited_for(pager: Pager, what: str) -> None:
    getattr(pager, what).drained = False
    pager.standstill.quiesce(pager.answers.append)
    assert not quiesced(pager)
    assert [pager.evictor.enabled, pager.mover.enabled] == [False, False]
    getattr(pager, what).drained = True
    assert quiesced(pager)


def test_what_a_broken_link_owes_is_not_waited_for(pager: Pager) -> None:
    """The freeze says then that it is broken, and the VM is paused no longer than for that."""
    pager.faults.fetching, pager.link.state = True, LinkState.DOWN
    pager.standstill.quiesce(pager.answers.append)
    assert quiesced(pager)
