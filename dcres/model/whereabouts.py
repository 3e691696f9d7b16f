"""Whether a cluster lives of which there is a record, and whether that can be judged from here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Place:
    """Where processes are: the machine, its name, the life of its kernel, the PID namespace."""

    machine: str
    host: str
    boot: str
    pids: str

    @property
    def is_known(self) -> bool:
        """Whether it was written down: an earlier dcres did not."""
        return bool(self.pids)


class Life(StrEnum):
    """What is known of a cluster."""

    HERE = "here"  # it lives, and all its processes can be seen from here
    ELSEWHERE = "elsewhere"  # it lives, in another PID namespace or on another machine
    DEAD = "dead"
    UNKNOWN = "unknown"  # nothing shows that it lives, and nothing that it does not


def life_of(recorded: Place, here: Place, *, held: bool, seen: bool) -> Life:
    """`held`: somebody holds the cluster's lock; `seen`: processes of it are seen from here.

    A kernel that has started again took all with it, and a machine has one kernel at a time.
    """
    same_kernel = recorded.boot == here.boot
    if seen and same_kernel and (not held or recorded.pids in ("", here.pids)):
        return Life.HERE
    if held:
        return Life.HERE if same_kernel and recorded.pids == here.pids else Life.ELSEWHERE
    if not recorded.is_known:  # such a cluster holds no lock
        return Life.UNKNOWN
    same_machine = bool(here.machine) and recorded.machine == here.machine
    return Life.DEAD if same_kernel or same_machine else Life.UNKNOWN
