"""A cluster is taken for dead only where that is proved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcres.model.whereabouts import Life, Place, life_of

HERE = Place("machine", "host", "boot", "pid:[1]")
CONTAINER = replace(HERE, pids="pid:[2]", host="0a1b2c")
REBOOTED = replace(HERE, boot="before")
OTHER = Place("other", "far", "boot of the other", "pid:[1]")
OTHER_NAMELESS = replace(OTHER, machine="")
EARLIER = Place("", "", "boot", "")
EARLIER_BEFORE = Place("", "", "before", "")


@pytest.mark.parametrize(
    ("recorded", "held", "seen", "expected"),
    [
        (HERE, True, True, Life.HERE),
        (HERE, True, False, Life.HERE),  # it is being started
        (HERE, False, True, Life.HERE),  # what is left of it runs
        (HERE, False, False, Life.DEAD),
        (CONTAINER, True, False, Life.ELSEWHERE),
        (CONTAINER, True, True, Life.ELSEWHERE),  # seen from the machine that the container is on
        (CONTAINER, False, True, Life.HERE),
        (CONTAINER, False, False, Life.DEAD),
        (REBOOTED, False, False, Life.DEAD),
        (REBOOTED, False, True, Life.DEAD),  # a stranger with such a mark: that kernel is gone
        (OTHER, True, False, Life.ELSEWHERE),
        (OTHER, True, True, Life.ELSEWHERE),
        (OTHER, False, False, Life.UNKNOWN),  # its file system may not pass locks on
        (OTHER_NAMELESS, False, False, Life.UNKNOWN),
        (EARLIER, False, True, Life.HERE),
        (EARLIER, False, False, Life.UNKNOWN),
        (EARLIER_BEFORE, False, False, Life.UNKNOWN),
    ],
)
def test_life(recorded: Place, held: bool, seen: bool, expected: Life) -> None:
    assert life_of(recorded, HERE, held=held, seen=seen) is expected


def test_machines_without_a_name_are_not_one() -> None:
    nameless = replace(HERE, machine="")
    before = replace(nameless, boot="before")
    assert life_of(before, nameless, held=False, seen=False) is Life.UNKNOWN
