"""Pictures of placement: every page counted once, ages averaged, buckets joined exactly."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.vm_picture import look
from dcres.actors.messages import ClaimOrder, Description, Role
from dcres.errors import Conflict, NotFound
from dcres.model.history import Ticks
from dcres.model.pages import PAGE_SIZE
from dcres.model.picture import Picture, bucket_pages, summarise
from dcres.model.placement import LEAVING, MAIN, NOWHERE, Owners, pages_by_host, sub_code
from dcres.paging.pager.table import PageTable
from tests.support.fleet import LocalFleet
from tests.support.placement import CODES, TICK_S, placement

STRANGE = sub_code(7)
SUBS = [sub_code(0), sub_code(1)]
PAGES = st.lists(
    st.tuples(
        st.sampled_from([NOWHERE, *CODES, STRANGE]),
        st.integers(0, 2**32 - 1) | st.integers(0, 50),
    ),
    min_size=1,
    max_size=300,
)


def tables(pages: list[tuple[int, int]]) -> tuple[Owners, Ticks]:
    owners, ticks = zip(*pages, strict=True)
    return np.array(owners, dtype=np.uint8), np.array(ticks, dtype=np.uint32)


def picture_of(owners: Owners, ticks: Ticks, buckets: int, tick_now: int = 50) -> Picture:
    return summarise(owners, ticks, CODES, buckets=buckets, tick_now=tick_now, tick_s=TICK_S)


class TestBuckets:
    @given(st.integers(1, 1 << 40), st.integers(1, 4096))
    def test_the_least_power_of_two_that_suffices(self, page_count: int, buckets: int) -> None:
        width = bucket_pages(page_count, buckets)
        assert width & (width - 1) == 0
        assert width * buckets >= page_count
        assert width == 1 or width // 2 * buckets < page_count

    def test_none(self) -> None:
        with pytest.raises(ValueError, match="0 buckets"):
            bucket_pages(1, 0)


class TestSummary:
    @given(PAGES, st.integers(1, 64))
    def test_every_page_is_counted_once(self, pages: list[tuple[int, int]], buckets: int) -> None:
        owners, ticks = tables(pages)
        picture = picture_of(owners, ticks, buckets)
        assert len(picture.pages) <= buckets
        firsts = range(0, owners.size, picture.bucket_pages)
        for row, first in zip(picture.pages, firsts, strict=True):
            part = owners[first : first + picture.bucket_pages]
            strange, nowhere = (int((part == code).sum()) for code in (STRANGE, NOWHERE))
            assert row.tolist() == [*pages_by_host(part, SUBS), strange, nowhere]
        assert list(picture.totals.values()) == pages_by_host(owners, SUBS)
        assert picture.not_yet_brought == int((owners == STRANGE).sum())
        assert picture.nowhere == int((owners == NOWHERE).sum())

    @given(PAGES, st.integers(0, 2**32 - 1))
    def test_ages(self, pages: list[tuple[int, int]], tick_now: int) -> None:
        owners, ticks = tables(pages)
        picture = picture_of(owners, ticks, owners.size, tick_now)
        column = {MAIN: 0, LEAVING: 0, sub_code(0): 1, sub_code(1): 2, STRANGE: 3}
        for code, tick, ages in zip(owners.tolist(), ticks.tolist(), picture.age_s, strict=True):
            expected = [math.nan] * 4
            if code != NOWHERE:
                expected[column[code]] = (max(tick_now - tick, 0) + 1) * TICK_S
            assert ages.tolist() == pytest.approx(expected, rel=1e-4, nan_ok=True)

    def test_the_age_of_many_is_their_geometric_mean(self) -> None:
        owners = np.full(2, MAIN, dtype=np.uint8)
        picture = picture_of(owners, np.array([0, 99], dtype=np.uint32), 1, tick_now=99)
        assert picture.age_s[0, 0] == pytest.approx(math.sqrt(100 * 1) * TICK_S)

    @given(PAGES, st.sampled_from([1, 2, 4, 32]))
    def test_joined_is_as_if_there_had_been_fewer_buckets(
        self, pages: list[tuple[int, int]], factor: int
    ) -> None:
        whole = pages * factor
        owners, ticks = tables(whole[: -(factor // 2)] if len(pages) > 1 < factor else whole)
        fine = picture_of(owners, ticks, owners.size, tick_now=2**32 - 1)
        joined = fine.joined(factor)
        straight = picture_of(owners, ticks, len(pages), tick_now=2**32 - 1)
        assert joined.bucket_pages == straight.bucket_pages == factor
        assert joined.pages.tolist() == straight.pages.tolist()
        assert np.allclose(joined.age_s, straight.age_s, rtol=1e-4, equal_nan=True)


class TestLook:
    def test_the_table_says_where_pages_are(self, tmp_path: Path) -> None:
        owners = np.array([NOWHERE, MAIN, LEAVING, sub_code(1), STRANGE, MAIN], dtype=np.uint8)
        table = PageTable.create(tmp_path / "table", owners, 6)
        table.ticks[:] = [0, 1, 2, 3, 4, 11]
        picture = look(tmp_path / "table", tmp_path / "absent", 6, CODES, 1)
        assert picture.hosts == ("h0", "h1", "h2")
        assert picture.pages.tolist() == [[3, 0, 1, 1, 1]]
        assert picture.age_s[0, 2] == pytest.approx(0.9), "counted from the newest touch"

    def test_without_sub_hosts_the_ram_file_does(self, tmp_path: Path) -> None:
        owners = np.array([MAIN, NOWHERE, NOWHERE, STRANGE, NOWHERE], dtype=np.uint8)
        PageTable.create(tmp_path / "table", owners, 5)
        fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, 5 * PAGE_SIZE)
            os.pwrite(fd, b"x", 2 * PAGE_SIZE)
        finally:
            os.close(fd)
        codes = {MAIN: "h0", LEAVING: "h0"}
        picture = look(tmp_path / "table", tmp_path / "ram", 5, codes, 8)
        assert picture.pages[:, 0].tolist() == [0, 0, 1, 0, 0]
        assert picture.not_yet_brought == 1
        assert picture.nowhere == 3


class Host:
    """A main host with a VM, or one whose boot asks the coordinator for a picture."""

    coordinator: Coordinator | None = None
    refused: Conflict | None = None

    def perform(self, group: str, order: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self, order)(*args, **kwargs)

    def describe(self) -> Description:
        return Description("h0", Role.MAIN, present=True, running=True, hosts=("h0",))

    def require_free(self, take_over: bool) -> None:
        """It is free."""

    def status(self) -> dict[str, object]:
        return {"run_state": "running", "state": "running", "held": False}

    def picture(self, buckets: int) -> Picture:
        return placement(b"mmaa", buckets=buckets).picture

    def clear(self, take_over: bool) -> None:
        """Nothing was left."""

    def end_serving_parts(self) -> None:
        """None are served."""

    def destroy(self) -> None:
        """Nothing runs."""

    def claim(self, order: ClaimOrder) -> int:
        assert self.coordinator is not None
        with pytest.raises(Conflict, match="is starting") as caught:
            self.coordinator.placement(8)
        type(self).refused = caught.value
        raise NotFound("that was all")


class TestCoordinator:
    def test_asks_the_main_host(self) -> None:
        fleet = LocalFleet(["h0"], lambda *_: Host())
        fleet.reserve("vm", [1], None)
        picture = Coordinator("vm", fleet).placement(2)
        assert picture.pages.tolist() == [[2, 0, 0, 0], [0, 2, 0, 0]]

    def test_no_vm(self) -> None:
        with pytest.raises(NotFound, match="VM vm does not run"):
            Coordinator("vm", LocalFleet([], lambda *_: Host())).placement(8)

    def test_while_it_is_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        coordinator = Coordinator("vm", LocalFleet(["h0"], lambda *_: Host()))
        monkeypatch.setattr(Host, "coordinator", coordinator)
        monkeypatch.setattr(Host, "refused", None)
        spec = {"name": "vm", "memory": "1MiB", "kernel": "/k", "layout": {"main": "1MiB"}}
        with pytest.raises(NotFound, match="that was all"):
            coordinator.start(spec)
        assert Host.refused is not None
