"""What changed since a checkpoint, wherever pages went: by a real pager, held against memory.

A page that is not marked must be, byte for byte, what it was in the base.
"""

from __future__ import annotations

import os
import random
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dcres.errors import PagingError
from dcres.model.pages import PAGE_SIZE
from dcres.paging.content import ContentChanges, content_file
from tests.support import sabotage
from tests.support.paging import Rig, rig
from tests.support.speed import patience

pytestmark = pytest.mark.linux

PAGES, LIMIT, SUBS = 2048, 600, (1200, 1200)
ROUNDS = int(os.environ.get("DCRES_ROUNDS", "2"))  # more of them make a campaign
CUTS = 6 * ROUNDS
MOST = 200  # without a guard a fault shows within a few

Words = npt.NDArray[np.uint64]


@contextmanager
def stopped(paged: Rig) -> Iterator[None]:
    """The writer stands still, and so does paging."""
    os.kill(paged.writer.process.pid, signal.SIGSTOP)
    try:
        paged.order("quiesce")
        paged.order("freeze")
        yield
        paged.order("thaw")
    finally:
        os.kill(paged.writer.process.pid, signal.SIGCONT)


def memory_of(paged: Rig) -> Words:
    return np.frombuffer(paged.memory(), dtype=np.uint64).reshape(PAGES, PAGE_SIZE // 8)


class Checked:
    """Cuts of a running writer; what is not marked is compared with the base."""

    def __init__(self, paged: Rig, seed: int, *, mortal: bool = False) -> None:
        self.paged = paged
        self.rng = random.Random(seed)
        self.taken: dict[str, Words] = {}
        self.mortal = mortal
        self.stale = self.unmarked = self.cuts = self.restarts = 0
        self._path = content_file(paged.ram / "table")

    @property
    def account(self) -> ContentChanges:
        return ContentChanges(self._path, PAGES, writable=False)

    def work(self) -> None:
        """The writer works while pages come and go."""
        self.paged.writer.tell(f"skewed {self.rng.randrange(50, 1500)}")
        for _ in range(self.rng.randrange(1, 4)):
            self._limit(self.rng.choice([64, 200, 400, 600, 1000]))
        self._until_answered()

    def _limit(self, pages: int) -> None:
        try:
            self.paged.order("resize", limit_pages=pages)
        except PagingError:  # it died, as it was made to
            self.restart_pager()

    def _until_answered(self) -> None:
        answers = self.paged.writer.process.stdout
        assert answers is not None
        while not select.select([answers], [], [], 0.2)[0]:
            self._limit(LIMIT)
        self.paged.writer.answer()

    def restart_pager(self) -> None:
        self.paged.kill("pager")
        self.paged.start_pager()
        self.restarts += 1

    def cut(self, *, publish: bool) -> None:
        """A checkpoint, which is given up or becomes the base, unless the pager dies in it."""
        try:
            self._cut(publish)
        except PagingError:
            if not self.mortal:
                raise
            self.restart_pager()

    def _cut(self, publish: bool) -> None:
        self.cuts += 1
        name = f"writer-20260101-000000-{self.cuts:04x}"
        with stopped(self.paged):
            now = memory_of(self.paged)
            self.paged.order("cut", checkpoint=name)
            account = self.account
            if account.base:
                unmarked = ~account.changed()
                self.unmarked += int(unmarked.sum())
                self.stale += int((now != self.taken[account.base]).any(axis=1)[unmarked].sum())
            # One that is told of as the base may become it, though nobody hears of that.
            self.taken = {each: self.taken[each] for each in {account.base} - {""}} | {name: now}
        if publish:
            self.work()  # between the cut and its publishing changes are the next one's
            self.paged.order("rebase", checkpoint=name)
            assert self.account.base == name


@pytest.fixture
def checked(tmp_path: Path, writer_program: Path) -> Iterator[Checked]:
    with rig(tmp_path, writer_program, PAGES, LIMIT, SUBS) as paged:
        paged.writer.ask("fill")
        yield Checked(paged, 11)


@pytest.mark.timeout(patience(60 * ROUNDS + 300))
def test_what_is_not_marked_is_as_in_the_base(checked: Checked) -> None:
    """Over pages that leave and come back, cuts that are given up, and pagers that are killed."""
    for number in range(CUTS):
        checked.work()
        if number % 8 == 6:
            checked.restart_pager()
        checked.cut(publish=checked.rng.random() < 0.7)
    after = checked.paged.status()
    assert checked.stale == 0
    assert checked.unmarked > CUTS * PAGES // 4, "nearly everything was marked"
    print(f"{checked.unmarked} pages were not marked; {after['pages_out']} have left lately")
    assert after["pages_out"] > 100, "nothing has moved since the last kill"


@pytest.mark.timeout(patience(300))
@pytest.mark.parametrize("guard", ["last writes", "kept at page-in", "trusts one that died"])
def test_without_one_guard_a_fault_is_seen(
    guard: str, tmp_path: Path, writer_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(next(iter(sabotage.__path__)))))
    monkeypatch.setenv("DCRES_TEST_SABOTAGE", guard)
    with rig(tmp_path, writer_program, PAGES, LIMIT, SUBS) as paged:
        paged.writer.ask("fill")
        checked = Checked(paged, 12, mortal=True)
        for _ in range(MOST):
            checked.work()
            checked.cut(publish=True)
            if checked.stale:
                return
    pytest.fail(f"{MOST} cuts without {guard!r} showed no fault")


@pytest.mark.timeout(patience(300))
def test_a_pager_that_died_between_a_scan_and_its_marks_is_not_trusted(
    tmp_path: Path, writer_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(next(iter(sabotage.__path__)))))
    monkeypatch.setenv("DCRES_TEST_SABOTAGE", "dies in a scan")
    with rig(tmp_path, writer_program, PAGES, LIMIT, SUBS) as paged:
        paged.writer.ask("fill")
        checked = Checked(paged, 13, mortal=True)
        while checked.restarts < 3 or not checked.unmarked:
            checked.work()
            checked.cut(publish=True)
    assert checked.stale == 0


def test_a_cut_is_for_a_stopped_guest(checked: Checked) -> None:
    with pytest.raises(PagingError, match="not frozen"):
        checked.paged.order("cut", checkpoint="writer-20260101-000000-0001")


def test_a_checkpoint_without_a_cut_is_no_base(checked: Checked) -> None:
    """And what was the base is none any more: nobody can say which it would be."""
    checked.cut(publish=True)
    assert checked.account.base
    with pytest.raises(PagingError, match="is not known"):
        checked.paged.order("rebase", checkpoint="writer-20260101-000000-ffff")
    assert not checked.account.base


def test_a_checkpoint_is_published_once(checked: Checked) -> None:
    """An answer may be lost, and the order repeated."""
    checked.cut(publish=True)
    checked.paged.order("rebase", checkpoint="writer-20260101-000000-0001")
    checked.cut(publish=True)
    assert checked.stale == 0
    assert checked.unmarked > 0


def test_a_checkpoint_that_was_given_up_changes_nothing(checked: Checked) -> None:
    checked.cut(publish=True)
    checked.paged.writer.ask("write 1 300")
    checked.cut(publish=False)
    checked.cut(publish=False)
    assert checked.account.changed()[:300].all()
    assert checked.account.base == "writer-20260101-000000-0001"
    assert checked.stale == 0


def test_what_changes_after_the_cut_is_the_next_ones(checked: Checked) -> None:
    checked.cut(publish=True)
    checked.paged.writer.ask("write 1 10")
    checked.cut(publish=False)
    checked.paged.writer.ask("write 1 2")
    checked.paged.order("rebase", checkpoint="writer-20260101-000000-0002")
    with stopped(checked.paged):
        changed = checked.account.changed()
    assert changed[:2].all()
    assert not changed[2:10].any()
