"""Starting a VM over its hosts, from nothing or from a checkpoint.

::

    reserve ──▶ clear ──▶ claim ──▶ plan ──▶ boot (main host)     ──▶ run ──▶ go
                                             serve (sub hosts)
    memory      what an   the name  parts    QEMU, pages, servers     pager,   the guest runs
    and actors  earlier   in the             all at the same time     VM core
                life left store

A lazy restore loads nothing, so that its hosts need not wait for the plan: it is made while they
boot, and `run` is the first step that needs it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from dcres.actors.control import restoring as restoring_
from dcres.actors.control.asking import await_ready
from dcres.actors.control.restoring import Restoring
from dcres.actors.messages import ClaimOrder, Incarnation, LoadOrder, RunOrder, ServeOrder
from dcres.actors.ports import Fleet, Pending, Port
from dcres.actors.protocol import Machine, Presence, Serving
from dcres.config import VmSpec
from dcres.errors import ActorGone, ClusterError, OperationFailed
from dcres.model.pages import pages_of
from dcres.model.run_state import runs_restored
from dcres.paging.settings import SubAddress
from dcres.storage.format.manifest import Manifest

_RESTART_TIMEOUT_S = 30.0  # of an actor whose process died
_TRIES = 3


class Laps:
    """What an operation was spent on: `seconds` by step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, step: str) -> None:
        """The time since the step before was for this one."""
        now = time.monotonic()
        self.seconds[step], self._last = now - self._last, now


class BringingUp:
    """One start or restore: `reserve`, then `start` or `restore`.

    `require_wanted` raises once it was cancelled. Whoever called ends what a failure leaves.
    """

    def __init__(
        self,
        vm: str,
        fleet: Fleet,
        spec: VmSpec,
        require_wanted: Callable[[], None],
        *,
        take_over: bool = False,
    ) -> None:
        self.laps = Laps()
        self._vm = vm
        self._fleet = fleet
        self._spec = spec
        self._require_wanted = require_wanted
        self._take_over = take_over
        self._ports: dict[str, Port] = {}

    def reserve(self, hosts: Sequence[str] | None) -> tuple[str, ...]:
        """The VM's hosts, the main host first. Raises NoRoom, NotFound, Conflict."""
        names = self._fleet.reserve(self._vm, self._spec.layout.shares, hosts)
        self._ports = dict(zip(names, self._fleet.find(self._vm), strict=True))
        # All look before the first changes anything.
        for order in (Presence.require_free, Presence.clear):
            _first_failure(
                {name: port.submit(order, self._take_over) for name, port in self._ports.items()}
            )
        self.laps.end("reserve")
        self._require_wanted()
        return tuple(names)

    def start(self) -> None:
        """Boot the guest; it runs when this returns."""
        order = self._boot(self._incarnation(above=0, needs_name=False), lambda host: None)
        self._go(order)

    def restore(self, manifest: Manifest, lazy: bool) -> Restoring:
        """Bring the guest back; it runs when this returns, unless it was saved standing still.

        What serves parts is still there.
        """
        incarnation = self._incarnation(above=manifest.generation, needs_name=True)
        shares = self._spec.layout.shares
        restoring = restoring_.prepare(
            manifest, shares, self._ports, self._fleet, incarnation, lazy
        )
        self.laps.end("plan")
        order = self._boot(incarnation, restoring.load_order)
        order = replace(order, resumption=restoring.resumption)
        self._go(order, paused=not runs_restored(manifest.run_state))
        return restoring

    @property
    def _main(self) -> Port:
        return next(iter(self._ports.values()))

    def _incarnation(self, above: int, needs_name: bool) -> Incarnation:
        """A VM that is new harms no other of its name, and can wait for the name to be free.

        One that is restored would be a second of the one that it was saved from.
        """
        order = ClaimOrder(self._fleet.cluster(), above, self._take_over, needs_name)
        generation = self._main.call(Machine.claim, order)
        return Incarnation(self._vm, generation, secrets.token_hex(32))

    def _boot(
        self, incarnation: Incarnation, load_order: Callable[[str], LoadOrder | None]
    ) -> RunOrder:
        """Every host starts what it runs and loads its pages at the same time."""
        main, *subs = self._ports
        order = RunOrder(incarnation, self._spec, tuple(self._ports), (), load_order(main))
        booting = self._main.submit(Machine.boot, order)
        serving: dict[str, Pending[SubAddress]] = {}
        for host, share in zip(subs, self._spec.layout.subs, strict=True):
            pages = pages_of(self._spec.memory), pages_of(share)
            serve = ServeOrder(incarnation, *pages, load_order(host))
            serving[host] = self._ports[host].submit(Serving.serve, serve)
        _first_failure({main: booting, **serving})
        self.laps.end("boot")
        self._require_wanted()
        return replace(order, subs=tuple(each.result() for each in serving.values()), load=None)

    def _go(self, order: RunOrder, *, paused: bool = False) -> None:
        self._main.call(Machine.run, order)
        self._let_go(paused)
        self.laps.end("run")

    def _let_go(self, paused: bool) -> None:
        """However long it takes, and through restarts of the actor: its QEMU waits meanwhile.

        Once it has begun, the disks cannot go back to what they were before a restore.
        """
        host, main = next(iter(self._ports.items()))
        for tries_left in reversed(range(_TRIES)):
            self._require_wanted()
            try:
                main.call(Machine.go, paused)
                return
            except ActorGone:
                if not tries_left:
                    raise
                await_ready(main, lambda: self._may_come_back(host), _RESTART_TIMEOUT_S)

    def _may_come_back(self, host: str) -> bool:
        """Whether an actor that has died is being started again, as far as is known."""
        self._require_wanted()
        return self._fleet.alive(host) and bool(self._fleet.find(self._vm))


def _first_failure(under_way: Mapping[str, Pending[object]]) -> None:
    """Wait until all hosts have answered; raises the first failure, however long others take.

    A failure keeps its type and gets its host's name where it can.
    """
    pool = ThreadPoolExecutor(len(under_way), "bringing-up")
    try:
        waiting = {host: pool.submit(pending.result) for host, pending in under_way.items()}
        done, _ = wait(waiting.values(), return_when=FIRST_EXCEPTION)
        failed = [host for host, each in waiting.items() if each in done and each.exception()]
        for host in failed:
            _raise(host, waiting[host])
    finally:
        pool.shutdown(wait=False)  # who still waits learns soon that the hosts are told to end


def _raise(host: str, failed: Future[object]) -> None:
    try:
        failed.result()
    except ClusterError as error:
        raise OperationFailed("the start was given up", {host: str(error)}) from None
