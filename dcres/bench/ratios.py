"""Main host to sub host, from 1:7 to 7:1: what figures 9 and 10 have in common.

One VM on two hosts with disks and links of their own (`dcres.bench.hosts`). Its shares add up to
its memory. Each host holds what the ratio says, less the few percent that the guest never touched:
the sub host lacks them after the main host's share became smaller, after it grew both do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dcres.bench.hosts import Hosts, slow_cluster
from dcres.bench.result import Figure, Ratio, Setup
from dcres.bench.split import MIB, SplitVm, guest_spec, layout_of
from dcres.config import Layout

PARTS = 8
EVEN = PARTS // 2
MAIN_PARTS = tuple(range(1, PARTS))
QUICK_MAIN_PARTS = (1, EVEN, PARTS - 1)
DISK_MB_PER_S = 200  # see `dcres.bench.figure7`
MEMORY_MIB, QUICK_MEMORY_MIB = 1024, 512


def name_of(main_parts: int) -> str:
    """Such as ``1_7``."""
    return f"{main_parts}_{PARTS - main_parts}"


def memory_mib(setup: Setup) -> int:
    """The VM's."""
    return QUICK_MEMORY_MIB if setup.quick else MEMORY_MIB


def layout_at(main_parts: int, memory: int) -> Layout:
    """`memory` MiB over two hosts, `main_parts` eighths of it on the main host."""
    main = memory * main_parts // PARTS
    return layout_of(main, memory - main)


def order(setup: Setup, at: int) -> tuple[int, ...]:
    """Shares of the main host in round `at`: downwards, then upwards, and so on.

    A step from one to the next moves little, and what drifts hits both ends alike.
    """
    parts = QUICK_MAIN_PARTS if setup.quick else MAIN_PARTS
    return parts[::-1] if at % 2 == 0 else parts


@contextmanager
def filled(setup: Setup, name: str) -> Iterator[tuple[Hosts, SplitVm]]:
    """The VM `name` with its memory full, at the first ratio of `order`; disks without limit."""
    memory = memory_mib(setup)
    with ExitStack() as held:
        hosts, cluster = held.enter_context(slow_cluster(setup.folder, 2, memory * MIB))
        setup.say(f"a guest of {memory} MiB fills its memory")
        vm = SplitVm(held, cluster, guest_spec(setup.folder, name, memory))
        vm.start(layout_at(order(setup, 0)[0], memory))
        vm.await_filled()
        yield hosts, vm


def whats(prefix: str) -> tuple[str, ...]:
    """What is measured, over the ratios."""
    return tuple(f"{prefix}_{name_of(parts)}" for parts in MAIN_PARTS)


def ratios(prefix: str) -> dict[str, Ratio]:
    """Each against the even split, in the same round."""
    return {
        f"ratio_{name_of(parts)}": Ratio(f"{prefix}_{name_of(parts)}", f"{prefix}_{name_of(EVEN)}")
        for parts in MAIN_PARTS
    }


def figure(title: str, prefix: str, color: str) -> Figure:
    """A curve over the ratios."""
    labels = tuple(name_of(parts).replace("_", ":") for parts in MAIN_PARTS)
    return Figure(title, "s", whats(prefix), color, labels, "memory on main host : sub host")
