"""The page book: every transition of "A page's life", from every state, and no others.

And that nothing else in dcres writes a page's state.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import PagesLost, PagingError
from dcres.model.pages import Pages
from dcres.model.placement import LEAVING, MAIN, NOWHERE, sub_code
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.table import PageTable

ROOT = Path(__file__).parents[2]
HERE, THERE = sub_code(0), sub_code(1)
PAGE, PAGES = 1, 4
OTHERS = [0, 2, 3]


@dataclass(frozen=True, slots=True)
class State:
    """All that the book knows of a page."""

    owner: int
    in_flight: bool = False
    recalled: bool = False
    fetched: bool = False


# Each state that there is, and how a page comes into it from what its table says at first.
STATES: dict[str, tuple[State, int, list[str]]] = {
    "nowhere": (State(NOWHERE), NOWHERE, []),
    "main": (State(MAIN), MAIN, []),
    "leaving": (State(LEAVING), MAIN, ["page_out"]),
    "in flight": (State(LEAVING, in_flight=True), MAIN, ["page_out", "sent"]),
    "recalled in flight": (
        State(MAIN, in_flight=True, recalled=True),
        MAIN,
        ["page_out", "sent", "taken_back"],
    ),
    "host": (State(HERE), HERE, []),
    "fetched": (State(HERE, fetched=True), HERE, ["fetch"]),
    "handed over": (State(THERE, fetched=True), HERE, ["fetch", "hand_over"]),
    "recalled from a fetch": (
        State(MAIN, recalled=True, fetched=True),
        HERE,
        ["fetch", "page_in"],
    ),
    "other host": (State(THERE), THERE, []),
}

TRANSITIONS: dict[str, Callable[[PageBook, Pages], object]] = {
    "first_touch": lambda book, pages: book.first_touch(int(pages[0])),
    "page_in": lambda book, pages: book.page_in(int(pages[0]), int(pages[0]) + 1, HERE),
    "heard_page_in": lambda book, pages: book.heard_page_in(int(pages[0]), int(pages[0]) + 1),
    "taken_back": lambda book, pages: book.taken_back(int(pages[0])),
    "page_out": lambda book, pages: book.page_out(pages),
    "resume_page_out": lambda book, pages: book.resume_page_out(pages),
    "sent": lambda book, pages: book.sent(pages),
    "stored": lambda book, pages: book.stored(pages, HERE),
    "unanswered": lambda book, pages: book.unanswered(pages),
    "fetch": lambda book, pages: book.fetch(pages),
    "hand_over": lambda book, pages: book.hand_over(pages, THERE),
    "fetched": lambda book, pages: book.fetched(pages),
}

# The table of docs/protocol.md. What is not here is refused.
ALLOWED: dict[tuple[str, str], str] = {
    ("nowhere", "first_touch"): "main",
    ("host", "page_in"): "main",
    ("fetched", "page_in"): "recalled from a fetch",
    ("leaving", "taken_back"): "main",
    ("in flight", "taken_back"): "recalled in flight",
    ("main", "page_out"): "leaving",
    ("leaving", "sent"): "in flight",
    ("in flight", "stored"): "host",
    ("recalled in flight", "stored"): "main",
    ("in flight", "unanswered"): "leaving",
    ("recalled in flight", "unanswered"): "main",
    ("host", "fetch"): "fetched",
    ("other host", "fetch"): "handed over",
    ("fetched", "hand_over"): "handed over",
    ("handed over", "hand_over"): "handed over",
    ("fetched", "fetched"): "host",
    ("handed over", "fetched"): "other host",
    ("recalled from a fetch", "fetched"): "main",
    # The hot path has written the owner, so the book sees only that it is MAIN.
    ("main", "heard_page_in"): "main",
    ("recalled in flight", "heard_page_in"): "recalled in flight",
    ("recalled from a fetch", "heard_page_in"): "recalled from a fetch",
    # When a pager starts nothing is under way yet.
    ("main", "resume_page_out"): "leaving",
    ("leaving", "resume_page_out"): "leaving",
}


class Marks:
    """A dirty bitmap that remembers."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    def mark(self, first: int, stop: int) -> None:
        self.pages += range(first, stop)

    def mark_pages(self, pages: Pages) -> None:
        self.pages += pages.tolist()


def book_of(folder: Path, *owners: int) -> PageBook:
    codes = np.array(owners, dtype=np.uint8)
    return PageBook(PageTable.create(folder / "table", codes, len(owners)))


def book_in(folder: Path, state: str) -> PageBook:
    """A book whose page `PAGE` is in this state, and whose others nobody has touched."""
    _, owner, steps = STATES[state]
    book = book_of(folder, *(owner if page == PAGE else NOWHERE for page in range(PAGES)))
    for step in steps:
        TRANSITIONS[step](book, np.array([PAGE]))
    assert state_of(book, PAGE) == STATES[state][0]
    return book


def state_of(book: PageBook, page: int) -> State:
    masks = (book._in_flight, book._recalled, book._fetching)
    return State(int(book.owners[page]), *(bool(mask[page]) for mask in masks))


def check_counts(book: PageBook) -> None:
    assert book.resident == (book.owners == MAIN).sum()
    assert book.leaving == (book.owners == LEAVING).sum()
    assert book.in_flight_pages == book._in_flight.sum()
    assert book.fetching_pages == book._fetching.sum()


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("state", STATES)
def test_a_transition_is_as_in_the_table_or_refused(
    tmp_path: Path, state: str, transition: str
) -> None:
    book = book_in(tmp_path, state)
    book.changes = marks = Marks()
    to = ALLOWED.get((state, transition))
    if to is None:
        with pytest.raises(PagingError, match=f"page {PAGE} "):
            TRANSITIONS[transition](book, np.array([PAGE]))
        check_counts(book)
        assert state_of(book, PAGE) == STATES[state][0], "what is refused changes nothing"
        assert not marks.pages
    else:
        TRANSITIONS[transition](book, np.array([PAGE]))
        assert state_of(book, PAGE) == STATES[to][0]
        if transition != "heard_page_in":  # it counts what the hot path has changed
            check_counts(book)
    assert [state_of(book, page) for page in OTHERS] == [State(NOWHERE)] * len(OTHERS)


def test_what_comes_or_goes_is_marked_and_what_goes_on_elsewhere_is_not(tmp_path: Path) -> None:
    marked = set()
    for state, transition in ALLOWED:
        book = book_in(tmp_path, state)
        book.changes = marks = Marks()
        TRANSITIONS[transition](book, np.array([PAGE]))
        if marks.pages:
            assert marks.pages == [PAGE]
            marked.add(transition)
    assert marked == {"first_touch", "page_in", "heard_page_in", "taken_back", "page_out"}


@pytest.mark.parametrize(
    "transition", ["page_out", "sent", "stored", "unanswered", "fetch", "hand_over", "fetched"]
)
def test_of_a_batch_with_one_wrong_page_nothing_is_done(tmp_path: Path, transition: str) -> None:
    start = next(state for state, name in ALLOWED if name == transition)
    _, owner, steps = STATES[start]
    book = book_of(tmp_path, *[owner] * 3, NOWHERE)
    for step in steps:
        TRANSITIONS[step](book, np.array([0, 1, 2]))
    before = [state_of(book, page) for page in range(4)]
    with pytest.raises(PagingError, match=r"for page 3 \(owner 0"):
        TRANSITIONS[transition](book, np.arange(4))
    assert [state_of(book, page) for page in range(4)] == before
    TRANSITIONS[transition](book, np.arange(3))
    check_counts(book)


def test_a_run_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    book = book_of(tmp_path, HERE, HERE, THERE, HERE)
    for first, stop in ((0, 3), (1, 4)):
        with pytest.raises(PagingError, match="page-in from host"):
            book.page_in(first, stop, HERE)
    book.page_in(0, 2, HERE)
    assert book.owners.tolist() == [MAIN, MAIN, THERE, HERE]
    with pytest.raises(PagingError, match="page-in of the hot path"):
        book.heard_page_in(0, 3)


def test_of_what_is_stored_the_book_says_what_the_host_may_keep(tmp_path: Path) -> None:
    book = book_of(tmp_path, *[MAIN] * 4)
    pages = np.arange(4)
    book.page_out(pages)
    book.sent(pages)
    book.taken_back(2)
    assert np.flatnonzero(book.recalled).tolist() == [2]
    assert book.may_leave(pages).tolist() == [False] * 4
    assert book.stored(pages, THERE).tolist() == [True, True, False, True]
    assert book.owners.tolist() == [THERE, THERE, MAIN, THERE]
    assert book.may_leave(slice(None)).tolist() == [False, False, True, False]
    assert book.in_flight_pages == 0


@pytest.mark.parametrize("code", [NOWHERE, MAIN, LEAVING])
def test_what_is_no_host_takes_no_pages(tmp_path: Path, code: int) -> None:
    sent, fetched = book_in(tmp_path, "in flight"), book_in(tmp_path, "fetched")
    for refused in (
        lambda: sent.stored(np.array([PAGE]), code),
        lambda: fetched.hand_over(np.array([PAGE]), code),
        lambda: sent.page_in(PAGE, PAGE + 1, code),
    ):
        with pytest.raises(PagingError):
            refused()
    assert state_of(sent, PAGE) == STATES["in flight"][0]
    assert state_of(fetched, PAGE) == STATES["fetched"][0]


def test_a_handed_over_page_tells_whose_it_was(tmp_path: Path) -> None:
    book = book_of(tmp_path, HERE, THERE, HERE, MAIN)
    book.fetch(np.arange(3))
    assert book.not_fetched(0, 4, HERE).tolist() == []
    assert book.hand_over(np.array([0, 1]), sub_code(2)).tolist() == [HERE, THERE]
    book.fetched(np.arange(3))
    assert book.owners.tolist() == [sub_code(2), sub_code(2), HERE, MAIN]
    assert book.not_fetched(0, 4, HERE).tolist() == [2]


def test_a_pager_that_starts_takes_what_the_files_hold(tmp_path: Path) -> None:
    book = book_of(tmp_path, NOWHERE, HERE, MAIN, LEAVING)
    ram = np.array([False, True, False, False])
    outbox = np.array([False, True, True, True])
    assert book.recover(ram, outbox).tolist() == [False, True, False, False]
    assert book.owners.tolist() == [NOWHERE, MAIN, LEAVING, LEAVING]
    check_counts(book)
    with pytest.raises(PagesLost, match="2 pages of the main host are gone"):
        book.recover(ram, ~outbox)
    assert book.owners.tolist() == [NOWHERE, MAIN, LEAVING, LEAVING]


def test_from_the_first_sub_host_on_owners_are_kept(tmp_path: Path) -> None:
    book = book_of(tmp_path, NOWHERE, MAIN, LEAVING, LEAVING)
    book.keep_owners(np.array([True, False, False, True]))
    assert book.owners.tolist() == [MAIN, NOWHERE, LEAVING, MAIN]
    check_counts(book)
    with pytest.raises(PagingError, match="owners kept from now on is not possible for page 3"):
        book_of(tmp_path, MAIN, MAIN, MAIN, HERE).keep_owners(np.ones(4, dtype=np.bool_))


def test_the_protocol_s_table_and_the_book_have_the_same_transitions() -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    table = text[text.index("| transition | method |") : text.index("Standby changes none of it")]
    told = set(re.findall(r"`([a-z_]+)`", table))
    reading = {"recalled", "may_leave", "waiting", "not_fetched"}
    public = {name for name in vars(PageBook) if not name.startswith("_")}
    assert told == public - reading == {*TRANSITIONS, "recover", "keep_owners"}


# Nothing else writes


def test_views_that_are_given_out_cannot_be_written(tmp_path: Path) -> None:
    book = book_of(tmp_path, *[MAIN] * 4)
    for view in (book.owners, book.recalled, book.table.owners):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    with pytest.raises(TypeError, match="read-only"):
        book.table.owner_bytes()[0] = 1


WRITERS = ("dcres/paging/pager/book.py", "dcres/paging/pager/table.py")
# `writable_owners` is the book's. What it hands to C is for the hot path and for nothing else.
BOOK_ONLY = {"writable_owners", "_in_flight", "_recalled", "_fetching"}
TO_C = {"dcres/paging/pager/pager.py"}
PAGING = sorted(
    name
    for name in (str(path.relative_to(ROOT)) for path in (ROOT / "dcres").rglob("*.py"))
    if name not in WRITERS
)


def writes(source: str, *, may_hand_to_c: bool = False) -> Iterator[int]:
    """Lines that write a page's state, or get hold of what can."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(
                value=ast.Attribute(attr="owners" | "_owners" | "recalled"),
                ctx=ast.Store() | ast.Del(),
            ):
                yield node.lineno
            case ast.Attribute(attr="owners" | "recalled", ctx=ast.Store() | ast.Del()):
                yield node.lineno
            case ast.Attribute(attr=name) if name in BOOK_ONLY:
                yield node.lineno
            case ast.Attribute(attr="for_hot_path") if not may_hand_to_c:
                yield node.lineno


@pytest.mark.parametrize("module", PAGING)
def test_only_the_book_writes_a_page_s_state(module: str) -> None:
    source = (ROOT / module).read_text()
    found = [f"{module}:{line}" for line in writes(source, may_hand_to_c=module in TO_C)]
    assert not found, f"{', '.join(found)}: only PageBook writes that, by one of its transitions"


@pytest.mark.parametrize(
    "line",
    [
        "table.owners[pages] = MAIN",
        "self._owners[page] = MAIN",
        "self._table.owners[first:stop] |= 1",
        "table.owners += 1",
        "self._evictor.recalled[pages] = False",
        "owners = self._table.writable_owners",
        "book._in_flight[page] = True",
        "owners = book.for_hot_path",
    ],
)
def test_the_rule_catches(line: str) -> None:
    assert set(writes(line)) == {1}


@pytest.mark.parametrize(
    "line", ["owners = np.zeros(4)", "owners[0] = 1", "here = table.owners[pages] == MAIN"]
)
def test_the_rule_allows(line: str) -> None:
    assert not list(writes(line))


def test_what_the_hot_path_put_is_counted_and_marked_once_it_is_heard(tmp_path: Path) -> None:
    book, marks = book_in(tmp_path, "host"), Marks()
    book.changes = marks
    before = book.resident
    book.for_hot_path[PAGE] = MAIN
    book.heard_page_in(PAGE, PAGE + 1)
    assert state_of(book, PAGE) == STATES["main"][0]
    assert (book.resident, marks.pages) == (before + 1, [PAGE])
    check_counts(book)


@pytest.mark.parametrize("first", ["heard_page_in", "fetched"])
def test_what_the_hot_path_put_while_a_host_fetches_it_is_recalled(
    tmp_path: Path, first: str
) -> None:
    """Whichever is heard first: the host's copy is older than what the guest writes here."""
    book = book_in(tmp_path, "fetched")
    book.for_hot_path[PAGE] = MAIN
    with pytest.raises(PagingError, match="handed over is not possible"):
        book.hand_over(np.array([PAGE]), THERE)
    TRANSITIONS[first](book, np.array([PAGE]))
    if first == "heard_page_in":
        assert state_of(book, PAGE) == STATES["recalled from a fetch"][0]
        book.fetched(np.array([PAGE]))
    else:
        book.heard_page_in(PAGE, PAGE + 1)
    assert state_of(book, PAGE) == STATES["main"][0]
    check_counts(book)
