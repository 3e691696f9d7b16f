"""A fleet of four fake hosts over one `World`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dcres.actors.messages import Role
from tests.support.fleet import LocalFleet
from tests.support.hosts import FakeHost, FakeSub, FakeVisitor
from tests.support.main_host import FakeMain
from tests.support.world import World


@contextmanager
def fake_fleet(world: World) -> Iterator[LocalFleet]:
    """Hosts h0 to h3, for a VM of the name vm. In the end nothing may have gone wrong."""

    def make(vm: str, role: Role, host: str) -> FakeHost:
        return (FakeMain if role is Role.MAIN else FakeSub)(world, vm, host)

    made = LocalFleet(
        ["h0", "h1", "h2", "h3"],
        make,
        holding=world.parts_at,
        make_visitor=lambda vm, host: FakeVisitor(world, vm, host),
    )
    yield made
    made.release("vm")
    assert world.wrong == []
