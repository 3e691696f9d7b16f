"""Page-out over every order of events: links break and come back, pages are wanted in between.

RAM file, outbox, pipe and page table are real; the sub hosts are dictionaries. Whatever happens,
each page's last content is where the page table says, and once all links are back and everything
was answered, nothing is on its way any more.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    Mask,
    count_pages,
    extents_of_pages,
    pages_of_extents,
)
from dcres.model.placement import LEAVING, MAIN, sub_code
from dcres.model.wire import Kind
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.table import PageTable
from dcres.paging.transport.requests import Request, Runs

PAGES = 8
SMALL = 3  # pages that the second sub host has room for; the first could take all


def content(page: int, version: int) -> bytes:
    return (page * 1000 + version).to_bytes(8, "little") * (PAGE_SIZE // 8)


class Sub:
    """A link, and behind it a memory server that answers when it is told to."""

    source = False

    def __init__(self, index: int, capacity: int) -> None:
        self.code = sub_code(index)
        self.sub = SimpleNamespace(capacity_pages=capacity)
        self.ready = True
        self.pages: dict[int, bytes] = {}
        self._held = 0
        self._releases: list[Extents] = []
        self.requests: deque[tuple[Request, list[bytes]]] = deque()

    @property
    def room_pages(self) -> int:
        return max(0, self.sub.capacity_pages - self._held) if self.ready else 0

    def flush_releases(self) -> None:
        if self.ready and self._releases:
            pages = np.sort(np.concatenate([pages_of_extents(each) for each in self._releases]))
            self._releases, self._held = [], self._held - pages.size
            self.requests.append((Request(0, Kind.RELEASE, extents_of_pages(pages)), []))

    def release(self, runs: Runs) -> None:
        self._releases.append(np.array(runs))

    def page_out(self, extents: Extents, data: list[bytes]) -> None:
        self.flush_releases()
        assert count_pages(extents) <= self.room_pages
        self._held += count_pages(extents)
        self.requests.append((Request(0, Kind.PAGE_OUT, extents), data))

    def asked_to_keep(self) -> list[int]:
        """The pages of all page-outs that it has not answered."""
        asked = [each.extents for each, _ in self.requests if each.kind is Kind.PAGE_OUT]
        return [page for extents in asked for page in pages_of_extents(np.array(extents)).tolist()]

    def serve(self) -> Request | None:
        """Do the oldest request; its acknowledgement, if there was one to do."""
        if not self.requests:
            return None
        request, data = self.requests.popleft()
        pages = request.pages.tolist()
        if request.kind is Kind.RELEASE:
            for page in pages:
                self.pages.pop(page, None)
        else:
            whole = b"".join(data)
            for at, page in enumerate(pages):
                self.pages[page] = whole[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
            assert len(self.pages) <= self.sub.capacity_pages
        return request

    def go_down(self) -> list[Request]:
        """The connection ends: what was unanswered, page-outs only."""
        left = [request for request, _ in self.requests if request.kind is Kind.PAGE_OUT]
        self.ready = False
        self.requests.clear()
        self._releases.clear()
        return left

    def come_back(self, owners: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """As links reconcile: what the table does not place here is released."""
        assert all(page in self.pages for page in np.flatnonzero(owners == self.code).tolist())
        self.pages = {p: data for p, data in self.pages.items() if owners[p] == self.code}
        self.ready, self._held = True, len(self.pages)


class Tracker:
    """A kernel that has seen no write; pages on standby stay there."""

    def scan(self, *, protect: bool) -> Extents:
        return np.empty((0, 2), dtype=np.int64)

    def mapped(self, pages: np.ndarray[Any, np.dtype[np.int64]]) -> Mask:
        return np.zeros(pages.size, dtype=np.bool_)


class World:
    """A main host with all `pages` in its RAM file, and two sub hosts."""

    def __init__(
        self, folder: Path, ram: int, outbox: int, pipe: tuple[int, int], pages: int
    ) -> None:
        for fd in (ram, outbox):
            os.ftruncate(fd, pages * PAGE_SIZE)
        self.ram = ram
        self.versions = [0] * pages
        for page in range(pages):
            self._put(page, content(page, 0))
        owners = np.full(pages, MAIN, dtype=np.uint8)
        self.table = PageTable.create(folder / "table", owners, pages)
        self.book = PageBook(self.table)
        self.subs = [Sub(0, pages), Sub(1, SMALL)]
        self.outbox = Outbox(self.book, ram, outbox, pipe)
        self._ticks = 0
        parts: Any = (self.subs, Tracker(), self._tick)
        self.evictor = Evictor(self.book, self.outbox, *parts)

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _put(self, page: int, data: bytes) -> None:
        assert os.pwrite(self.ram, data, page * PAGE_SIZE) == PAGE_SIZE

    def limit(self, pages: int) -> None:
        self.evictor.share.limit(pages)

    def write(self, page: int) -> None:
        """The guest writes a page, which is brought first, unless its host is away."""
        owner = int(self.table.owners[page])
        if owner == LEAVING:
            self._put(page, self.outbox.read_page(page))
            self.evictor.taken_back(page)
        elif owner != MAIN:
            sub = self._sub(owner)
            if not sub.ready:
                return
            self._put(page, sub.pages[page])
            self.book.page_in(page, page + 1, owner)
            self.evictor.arrived(page, page + 1)
            sub.release([(page, page + 1)])
        assert os.pread(self.ram, PAGE_SIZE, page * PAGE_SIZE) == self._expected(page)
        self.versions[page] += 1
        self._put(page, self._expected(page))

    def owned_by(self, code: int) -> list[int]:
        return [int(page) for page in np.flatnonzero(self.table.owners == code)]

    def _sub(self, code: int) -> Sub:
        return next(sub for sub in self.subs if sub.code == code)

    def _expected(self, page: int) -> bytes:
        return content(page, self.versions[page])

    def answer(self, sub: Sub) -> None:
        done = sub.serve()
        if done is not None and done.kind is Kind.PAGE_OUT:
            self.evictor.stored(sub, done.extents)  # type: ignore[arg-type]

    def go_down(self, sub: Sub, *, unheard: bool) -> None:
        """`unheard`: the server did one thing more, and its answer is lost."""
        if sub.ready:
            done = sub.serve() if unheard else None
            lost = [done] if done is not None and done.kind is Kind.PAGE_OUT else []
            self.evictor.unanswered([*lost, *sub.go_down()])

    def come_back(self, sub: Sub) -> None:
        if not sub.ready:
            sub.come_back(self.table.owners)

    def sent(self) -> list[int]:
        """The pages that are on their way to a sub host."""
        return [page for sub in self.subs for page in sub.asked_to_keep()]

    def check(self) -> None:
        assert len(self.sent()) == len(set(self.sent())), "a page is sent out twice"
        owners = self.table.owners
        assert self.book.resident == int((owners == MAIN).sum())
        assert self.book.leaving == int((owners == LEAVING).sum())
        for page, owner in enumerate(owners.tolist()):
            if owner == MAIN:
                found = os.pread(self.ram, PAGE_SIZE, page * PAGE_SIZE)
            elif owner == LEAVING:
                found = self.outbox.read_page(page)
            else:
                found = self._sub(owner).pages[page]
            assert found == self._expected(page), f"page {page} of owner {owner}"

    def settle(self) -> None:
        """All links are back, all is answered: nothing may be left over anywhere."""
        for sub in self.subs:
            self.come_back(sub)
        for _ in range(10 * PAGES):
            self.evictor.step()
            for sub in self.subs:
                sub.flush_releases()
                while sub.requests:
                    self.answer(sub)
        assert self.evictor.drained
        assert not self.book.recalled.any()
        for sub in self.subs:
            assert sorted(sub.pages) == self.owned_by(sub.code)
        self.check()


@contextmanager
def world(pages: int = PAGES) -> Iterator[World]:
    fds = [os.memfd_create("ram"), os.memfd_create("outbox"), *os.pipe()]
    try:
        with TemporaryDirectory() as folder:
            yield World(Path(folder), fds[0], fds[1], (fds[2], fds[3]), pages)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_page_that_left_again_is_not_sent_a_second_time() -> None:
    """Its link breaks while it is taken back; it leaves for a host with little room."""
    with world() as made:
        roomy, _ = made.subs
        made.limit(0)
        made.evictor.step()
        made.evictor.step()
        made.write(made.owned_by(LEAVING)[0])
        made.go_down(roomy, unheard=False)
        made.evictor.step()
        made.evictor.step()
        made.come_back(roomy)
        for _ in range(PAGES):
            made.evictor.step()
        assert sorted(made.sent()) == list(range(PAGES))
        made.settle()


def test_a_page_that_is_missed_before_it_was_sent_is_not_sent() -> None:
    """Faults are answered in the middle of `take`, and told of between two steps."""
    with world() as made:
        made.limit(0)
        made.evictor.step()
        assert made.sent() == []
        taken = made.owned_by(LEAVING)
        made.write(taken[0])
        made.evictor.step()
        assert made.sent() == taken[1:]
        assert not made.book.recalled.any()
        made.settle()


@pytest.mark.parametrize("answers", [False, True], ids=["unanswered", "stored"])
def test_what_was_taken_for_a_host_that_went_away_goes_where_part_of_it_fits(
    answers: bool,
) -> None:
    with world() as made:
        roomy, small = made.subs
        made.limit(0)
        made.evictor.step()
        made.go_down(roomy, unheard=False)
        for _ in range(PAGES):
            made.evictor.step()
            if answers:
                made.answer(small)
        assert len(small.pages if answers else small.asked_to_keep()) == SMALL
        made.settle()


def remote(made: World) -> int | None:
    """A page that the guest would have to wait for."""
    away = np.flatnonzero(made.table.owners > LEAVING)
    return int(away[0]) if away.size else None


@pytest.mark.parametrize("busy", [False, True], ids=["idle guest", "busy guest"])
def test_faults_are_served_all_the_way_down_to_a_lower_limit(busy: bool) -> None:
    """Also by a guest that brings a page whenever it may; it cannot keep the limit away."""
    many, few, waits, longest, turns = 2048, 64, 0, 0, 0
    with world(many) as made:
        roomy, small = made.subs
        small.sub.capacity_pages = 0
        made.limit(few)
        goal = few + 2 * made.evictor.share.slack_pages
        while turns < 200 and made.book.resident + made.book.leaving > goal:
            made.evictor.step()
            made.answer(roomy)
            waits = waits + 1 if made.evictor.share.over_limit else 0
            longest, turns = max(longest, waits), turns + 1
            while busy and not made.evictor.share.over_limit and (page := remote(made)) is not None:
                made.write(page)
        made.limit(many)
        made.settle()
    assert turns < 200, "the main host does not come down"
    assert longest <= 3, "turns of 64 pages each that a fault has waited"


pages = st.integers(0, PAGES - 1)
subs = st.integers(0, 1)
events = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.just(0)),
        st.tuples(st.just("limit"), st.sampled_from([0, 3, PAGES])),
        st.tuples(st.just("write"), pages),
        st.tuples(st.just("answer"), subs),
        st.tuples(st.just("down"), subs),
        st.tuples(st.just("down, unheard"), subs),
        st.tuples(st.just("back"), subs),
    ),
    min_size=20,
    max_size=80,
)


@settings(max_examples=100, deadline=None)
@given(events)
def test_nothing_is_lost_nor_in_two_places(events: list[tuple[str, int]]) -> None:
    with world() as made:
        for event, number in events:
            match event:
                case "step":
                    made.evictor.step()
                case "limit":
                    made.limit(number)
                case "write":
                    made.write(number)
                case "answer":
                    made.answer(made.subs[number])
                case "back":
                    made.come_back(made.subs[number])
                case _:
                    made.go_down(made.subs[number], unheard=event != "down")
            made.check()
        made.settle()
