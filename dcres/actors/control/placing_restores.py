"""Where a restore goes, decided for whoever is to begin it: any process that has a fleet.

The fleet tells which hosts there are, what room they have and who holds which part; `choosing`
decides from that alone. The pages of a plan are counted as in a restore, by a host that has the
main host's part. Nothing here changes anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dcres.actors.control.choosing import Choice, Wish, decide, require_name
from dcres.actors.control.restoring import capacities_of
from dcres.actors.control.room import Seen
from dcres.actors.messages import ForeseenRestore, PlanOrder
from dcres.actors.ports import Fleet
from dcres.errors import Conflict, DcresError, NoRoom
from dcres.model.pages import PAGE_SIZE
from dcres.model.parts import Where
from dcres.model.phase import VmPhase, in_the_way
from dcres.model.restore_plan import Flow, PlannedHost
from dcres.storage.format.manifest import Manifest, dumps


def choose_hosts(
    fleet: Fleet, manifest: Manifest, wish: Wish, phase_now: Callable[[], VmPhase]
) -> Choice:
    """The hosts of a restore that is about to begin; they are asked if there is a choice.

    What is left of a VM that is off or lost counts as free: the restore ends that once it knows
    that there is room. Raises Conflict when the VM is there, and what `decide` raises.
    """
    if wish.settled is not None:
        return wish.settled
    _require_absent(manifest.vm, phase_now())
    around = fleet.look_around(manifest.vm, dumps(manifest), take_over=False)
    try:
        return replace(decide(manifest, wish, around.seen), left_out=around.left_out)
    except NoRoom as error:
        _require_absent(manifest.vm, phase_now())  # another caller may have the room by now
        raise NoRoom("; ".join((str(error), *around.left_out))) from None


def _require_absent(vm: str, phase: VmPhase) -> None:
    if why := in_the_way(vm, phase):
        raise Conflict(why)


def foresee(
    fleet: Fleet, manifest: Manifest, wish: Wish, phase: VmPhase, *, lazy: bool, take_over: bool
) -> ForeseenRestore:
    """What a restore would do as things are now, the VM being in `phase`.

    Everything that would be refused is among the problems.
    """
    problem = in_the_way(manifest.vm, phase)
    problems = [problem] if problem else []
    around = fleet.look_around(manifest.vm, dumps(manifest), take_over=take_over)
    hosts: tuple[PlannedHost, ...] = ()
    chosen = ""
    try:
        choice = decide(manifest, wish, around.seen)
        require_name(choice, around.seen)
        chosen = choice.why
        where = _where(manifest, choice, around.seen)
        shares = choice.layout.shares
        order = PlanOrder(dumps(manifest), capacities_of(shares, manifest.pages), where.holds)
        flow = fleet.flow_on(where.holder(manifest.main.host), order)
        hosts = _planned_hosts(manifest, choice, where, flow, lazy)
    except DcresError as error:
        problems.append(str(error))
    return ForeseenRestore(hosts, tuple(problems), chosen, around.left_out)


def _where(manifest: Manifest, choice: Choice, seen: Sequence[Seen]) -> Where:
    """Which host has which part, as in a restore: others are asked for what the VM's hosts lack."""
    has = {each.info.name: each.parts for each in seen}
    parts = tuple(part.host for part in manifest.hosts)
    here = {host: has[host] for host in choice.hosts}
    return Where(parts, choice.hosts, here).completed(has, manifest.checkpoint)


def _planned_hosts(
    manifest: Manifest, choice: Choice, where: Where, flow: Flow, lazy: bool
) -> tuple[PlannedHost, ...]:
    read: Counter[str] = Counter()
    served: Counter[str] = Counter()
    moved: dict[str, Counter[str]] = {host: Counter() for host in where.here}
    for source, target, length in _transfers(manifest, where, flow, lazy):
        if source == target:
            read[target] += length
        else:
            served[source] += length
            moved[target][source] += length
    roles = {host: "sub" if index else "main" for index, host in enumerate(choice.hosts)}
    shares = dict(zip(choice.hosts, choice.layout.shares, strict=True))
    pages = dict(zip(choice.hosts, map(sum, zip(*flow, strict=True)), strict=True))
    return tuple(
        PlannedHost(
            host=host,
            role=roles.get(host, "parts"),
            memory_bytes=shares.get(host, 0),
            pages=pages.get(host, 0),
            read_bytes=read[host],
            moved_from=dict(moved[host]),
            served_bytes=served[host],
        )
        for host in where.here
    )


def _transfers(
    manifest: Manifest, where: Where, flow: Flow, lazy: bool
) -> Iterable[tuple[str, str, int]]:
    """From which host to which, and bytes: pages, and the small files of a part where it is read.

    A lazy restore has one part server for each part, which serves those that have the part, too.
    """
    for part, row, held in zip(manifest.hosts, flow, where.holds, strict=True):
        holder, readers = where.holder(part.host), set[str]()
        for target, pages, here in zip(where.targets, row, held, strict=True):
            source = target if here and not lazy else holder
            if pages:
                yield source, target, pages * PAGE_SIZE
                readers.add(source)
        small = sum(file.length_bytes for file in part.files)
        if part is manifest.main:  # placement, history and VM core are read in any case
            readers.add(where.targets[0] if held[0] else holder)
        for reader in readers:
            yield reader, reader, small
