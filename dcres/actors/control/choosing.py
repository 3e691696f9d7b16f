"""Which hosts a restore goes to: what the caller wishes, what the hosts have, the choice.

Pure: `dcres.actors.control.placing_restores` asks the fleet what the hosts have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcres.actors.control.room import Seen, host_named, require_room
from dcres.config import Layout, VmSpec, format_size, listed
from dcres.errors import ConfigError, Conflict, NoRoom
from dcres.model.choice import Candidate, Share, choose, choose_evenly, choose_for
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.storage.format.manifest import Manifest


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
    left_out: tuple[str, ...] = ()  # a sentence for each host that could not be asked


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


def require_name(choice: Choice, seen: Sequence[Seen]) -> None:
    """Conflict where the main host of `choice` is one of `seen` that cannot be it."""
    for each in seen:
        if each.info.name == choice.hosts[0] and each.trouble:
            raise Conflict(each.trouble)


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
