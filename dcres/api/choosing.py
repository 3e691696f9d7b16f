"""Which hosts a restore goes to: what the caller wishes, what the hosts have, the choice."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.control.room import HostInfo, host_named, require_room
from dcres.actors.host import naming
from dcres.actors.host.loading import parse
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.ray import gateway
from dcres.actors.ray.fleet import RayFleet, parts_in_store, roomier
from dcres.api.session import Session
from dcres.config import HostSettings, Layout, VmSpec, format_size, listed
from dcres.errors import ConfigError, Conflict, DcresError, NoRoom, NotFound
from dcres.linux.memory import free_for_guests
from dcres.model.choice import Candidate, Share, choose, choose_evenly, choose_for
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.model.phase import VmPhase, in_the_way
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store

log = logging.getLogger("dcres.restore")

_LOOK_TIMEOUT_S = 60.0
_AT_ONCE = 16
# For QEMU itself, the pager, page tables: what a main host needs besides the guest's memory.
_BESIDES_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller says about the hosts of a restore. None: dcres decides."""

    layout: Layout | None = None
    count: int | None = None
    names: tuple[str, ...] | None = None  # the main host first

    @property
    def settled(self) -> Choice | None:
        """The choice, if nothing is left to be decided."""
        if self.layout is None or self.names is None:
            return None
        return Choice(self.layout, self.names, "as asked")


@dataclass(frozen=True, slots=True)
class Choice:
    """The hosts of a restore, the main host first, their shares, and why it is these."""

    layout: Layout
    hosts: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A live host: the memory that is free there, and the parts of the checkpoint it has."""

    info: HostInfo
    parts: tuple[str, ...]
    trouble: str = ""  # why this host could not be the main host; see `naming.trouble`


@dataclass(frozen=True, slots=True)
class Look:
    """What a host says of itself."""

    free_bytes: int
    parts: tuple[str, ...]
    trouble: str = ""


def wish_of(
    manifest: Manifest,
    layout: Layout | None,
    single: bool,
    hosts: int | str | Sequence[str] | None,
) -> Wish:
    """What a caller asks for. Raises ConfigError for wishes that contradict each other."""
    count = hosts if isinstance(hosts, int) else None
    names = None if hosts is None or isinstance(hosts, int) else tuple(listed(hosts))
    number = count if names is None else len(names)
    if number is not None and number < 1:
        raise ConfigError(f"a restore needs at least one host, not {number}")
    if single:
        if layout is not None or number not in (None, 1):
            raise ConfigError("a restore on a single host takes no layout and no second host")
        layout = Layout(main=manifest.memory_bytes)
    elif layout is not None and number not in (None, len(layout.shares)):
        raise ConfigError(
            f"the layout has {len(layout.shares)} hosts, but {number} are asked for; "
            "give a layout or hosts, or as many of both"
        )
    return Wish(layout, number, names)


def look_around(manifest: Manifest, *, take_over: bool = False) -> list[Seen]:
    """All hosts that answer, asked at the same time; a dead one is none.

    What the VM itself still holds counts as free: a restore gives it back first.
    """
    held = RayFleet().held(manifest.vm)
    alive = [roomier(host, held) for host in gateway.hosts() if host.alive]
    asked = (dumps(manifest), gateway.cluster_id(), take_over)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked = pool.map(partial(_look_at, asked), alive)
        return [seen for seen in looked if seen is not None]


def _look_at(asked: tuple[str, str, bool], host: HostInfo) -> Seen | None:
    try:
        look = gateway.run_on(host.name, look_here, *asked, timeout_s=_LOOK_TIMEOUT_S)
    except DcresError as error:
        log.warning("host %s is left out: %s", host.name, error)
        return None
    free = min(host.memory_free_bytes, look.free_bytes)
    return Seen(replace(host, memory_free_bytes=free), look.parts, look.trouble)


def look_here(manifest: str, cluster: str, take_over: bool) -> Look:
    """Runs on a host: the memory free as its kernel sees it, and what its store has."""
    settings = HostSettings.from_environ(os.environ)
    vm, me = parse(manifest).vm, naming.claimant(cluster, settings.name)
    folder = VmFolder.of(settings, vm, cluster)
    free = free_for_guests(settings.ram, _BESIDES_BYTES) + folder.ram_bytes
    trouble = folder.trouble(take_over=take_over)
    trouble = trouble or naming.trouble(Store(settings.store), vm, me, take_over=take_over)
    return Look(free, parts_in_store(manifest), trouble)


def phase_of(session: Session, vm: str) -> VmPhase:
    """What VM `vm` is doing; ``absent`` when there is none."""
    try:
        return VmPhase(session.existing(vm).call(Coordinator.status)["phase"])
    except NotFound:
        return VmPhase.ABSENT


def require_name(choice: Choice, seen: Sequence[Seen]) -> None:
    """Conflict where the main host of `choice` is one of `seen` that cannot be it."""
    for each in seen:
        if each.info.name == choice.hosts[0] and each.trouble:
            raise Conflict(each.trouble)


def choose_hosts(session: Session, manifest: Manifest, wish: Wish) -> Choice:
    """The hosts of a restore that is about to begin; they are asked if there is a choice.

    Changes nothing: what is left of a VM that is off or lost counts as free, and the restore ends
    that once it knows that there is room. Raises Conflict when the VM is there, and what `decide`
    raises.
    """
    if wish.settled is not None:
        return wish.settled
    _require_absent(session, manifest.vm)
    try:
        return decide(manifest, wish, look_around(manifest))
    except NoRoom:
        _require_absent(session, manifest.vm)  # another caller may have the room by now
        raise


def _require_absent(session: Session, vm: str) -> None:
    if why := in_the_way(vm, phase_of(session, vm)):
        raise Conflict(why)


def decide(manifest: Manifest, wish: Wish, seen: Sequence[Seen]) -> Choice:
    """Hosts and shares for a restore, by what is free and which host has which part.

    Raises ConfigError, NotFound for a host that is not there, and NoRoom, which says how much
    is missing.
    """
    if wish.layout is not None:
        wish.layout.require_room_for(manifest.memory_bytes)
        return _with_layout(manifest, wish.layout, wish.names, seen, "as asked")
    candidates = [_candidate(manifest, each) for each in seen]
    pages = pages_of(manifest.memory_bytes)
    if wish.count is None:
        shares = choose(pages, candidates)
        size = format_size(manifest.memory_bytes)
        return _choice(shares, f"as few hosts as have room for {size}, first those with its parts")
    own = VmSpec.model_validate(manifest.vm_spec).layout
    if wish.count == len(own.shares):
        try:
            why = "the shares it had when it was saved"
            return _with_layout(manifest, own, wish.names, seen, why)
        except NoRoom:
            pass  # the same number of hosts may have room for other shares
    if wish.names is not None:
        return _evenly_on(wish.names, pages, candidates, seen)
    why = f"even shares, on {wish.count} hosts with room, first those with its parts"
    return _choice(choose_evenly(pages, candidates, wish.count), why)


def _with_layout(
    manifest: Manifest,
    layout: Layout,
    names: tuple[str, ...] | None,
    seen: Sequence[Seen],
    why: str,
) -> Choice:
    infos = [each.info for each in seen]
    require_room(layout.shares, names, infos)
    if names is None:
        shares = [pages_of(share) for share in layout.shares]
        names = tuple(choose_for(shares, [_candidate(manifest, each) for each in seen]))
    return Choice(layout, names, why)


def _evenly_on(
    names: tuple[str, ...], pages: int, candidates: Sequence[Candidate], seen: Sequence[Seen]
) -> Choice:
    """Even shares on just these hosts, in the order in which they are named."""
    infos = [each.info for each in seen]
    wanted = {host_named(name, infos).name for name in names}
    if len(wanted) < len(names):
        raise ConfigError(f"{', '.join(names)}: a host is named twice; name different hosts")
    allowed = [each for each in candidates if each.name in wanted]
    shares = dict(choose_evenly(pages, allowed, len(names)))
    return _choice([(name, shares[name]) for name in names], "even shares on the hosts named")


def _candidate(manifest: Manifest, seen: Seen) -> Candidate:
    return Candidate(
        name=seen.info.name,
        free_pages=seen.info.memory_free_bytes // PAGE_SIZE,
        held_pages=sum(part.pages for part in manifest.hosts if part.host in seen.parts),
        holds_main=manifest.main.host in seen.parts,
    )


def _choice(shares: Sequence[Share], why: str) -> Choice:
    main, *subs = (pages * PAGE_SIZE for _, pages in shares)
    return Choice(Layout(main=main, subs=tuple(subs)), tuple(host for host, _ in shares), why)
