"""The simulation finds what is broken on purpose: in the coordinator's orders, and in hosts."""

from __future__ import annotations

import re

import pytest

from dcres.actors.messages import Saved
from tests.simulation.clock import Lock, Stuck
from tests.simulation.guest import SimulatedVm
from tests.simulation.run import Broken, Plan, Run
from tests.support.hosts import FakeSub
from tests.support.main_host import FakeMain

SEEDS = 100


def require_found(plan: Plan, what: str) -> None:
    """It breaks in one of a few seeds, and as it should."""
    others = set()
    for seed in range(SEEDS):
        try:
            Run(seed, plan).go()
        except (Broken, Stuck) as error:
            if re.search(what, str(error)):
                return
            others.add(str(error))
    pytest.fail(f"not found in {SEEDS} seeds; what was: {others}")


@pytest.mark.parametrize(
    ("order", "answer", "what"),
    [
        ("resume", 1.5, "it is postmigrate and not running"),
        ("stage", None, "saved 0 pages, not the"),
        ("abandon", None, "a checkpoint is not over|left in the store"),
        ("destroy", None, "is there after a stop|is there$"),
        ("end_serving_parts", None, "parts are served or pinned still"),
    ],
)
def test_an_order_that_is_left_out(order: str, answer: object, what: str) -> None:
    require_found(Plan(left_out={order: answer}), what)


class HastyMain(FakeMain):
    """Publishes without a look at the parts."""

    def _write(self, checkpoint: str, manifest: str, here: tuple[str, ...]) -> None:
        self.world.published[checkpoint] = manifest


class HastySub(FakeSub):
    """Votes before its part is durable."""

    def save(self, checkpoint: str, tick: int) -> Saved:
        saved = super().save(checkpoint, tick)
        part = self.world.parts.pop((checkpoint, self.host))

        def write() -> None:
            assert isinstance(self.world, SimulatedVm)
            self.world.clock.sleep(1.0)
            self.world.parts[checkpoint, self.host] = part

        assert isinstance(self.world, SimulatedVm)
        self.world.clock.spawn(write, "write")
        return saved


def test_a_vote_that_is_no_promise() -> None:
    require_found(Plan(main=HastyMain, sub=HastySub), "lacks the part of")


class Blind(SimulatedVm):
    """A dirty bitmap that misses what the guest writes where the page is already."""

    def write(self, page: int, host: str) -> None:
        self.guest[page] += 1
        if page in self.memory.get(host, {}):
            self.memory[host][page] = self.guest[page]
        else:
            self._place(page, host)


def test_a_dirty_bitmap_that_misses_writes() -> None:
    require_found(Plan(world=Blind), "than the guest had")


class Forgetful(SimulatedVm):
    """A page that changed and came back from another host counts as it was."""

    def _place(self, page: int, host: str) -> None:
        if page not in self.memory.get(host, {}):
            self.changed.discard(page)
        super()._place(page, host)


def test_an_account_of_contents_that_forgets_pages_that_move() -> None:
    require_found(Plan(world=Forgetful), "than the guest had|not the")


class Careless(SimulatedVm):
    """Whatever is not being saved is swept, published or not."""

    def sweep(self, keep: str, *, whole_parts: bool) -> None:
        for key in [key for key in self.parts if key[0] != keep]:
            del self.parts[key]


def test_a_published_checkpoint_that_is_removed() -> None:
    require_found(Plan(world=Careless), "lacks the part of")


def test_two_operations_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lock, "acquire", lambda self, timeout_s=0.0: True)
    monkeypatch.setattr(Lock, "locked", lambda self: False)
    require_found(Plan(operations=12), "goes on after .* has begun")
