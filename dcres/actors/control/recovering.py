"""What a coordinator does about a VM that one before it left: with its checkpoint, its servers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from dcres.actors.control.checkpointing import HALT_TIMEOUT_S
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine, Parts, Saving
from dcres.errors import ClusterError, DcresError

log = logging.getLogger("dcres.coordinator")

_RESUME_TIMEOUT_S = 180.0  # it waits for a stop that is under way


def let_go(vm: str, main: Port, checkpoint: str | None) -> None:
    """Give up what `checkpoint` does to the VM, or what an earlier one has left of that.

    The VM is as it was found then: it runs if a checkpoint had stopped it, and stands if it stood.
    As `Checkpointing` does it: the VM waits for a host that saves, so that ends first.
    """
    if checkpoint is not None:
        log.warning("VM %s: giving up checkpoint %s", vm, checkpoint)
        with suppress(ClusterError):  # its disk hangs: the guest goes on first
            main.within(HALT_TIMEOUT_S).call(Saving.halt, checkpoint)
        main.within(_RESUME_TIMEOUT_S).call(Machine.resume, checkpoint)
        return
    status = main.call(Machine.status)
    if status["held"] or status["state"] in ("quiet", "frozen"):
        log.warning("VM %s stands still for a checkpoint that is over; it is let go", vm)
        main.within(_RESUME_TIMEOUT_S).call(Machine.resume, "")


def discard(checkpoint: str, ports: Sequence[Port]) -> None:
    """What is left of a checkpoint, unless it was published. `ports` begin with the main host's.

    Which is certain once the main host has halted it: a publishing under way ends first.
    """
    main, *subs = ports
    main.within(_RESUME_TIMEOUT_S).call(Saving.halt, checkpoint)
    if main.call(Machine.published, checkpoint):
        return
    for port in subs:
        port.call(Saving.halt, checkpoint)
    for port in ports:
        port.call(Saving.abandon, checkpoint)


def end_servers(vm: str, fleet: Fleet, ports: Sequence[Port]) -> None:
    """As `Restoring.end`, when nobody remembers which hosts serve parts."""
    for port in ports:
        with suppress(DcresError):
            port.call(Parts.end_serving_parts)
    fleet.leave(vm)


def hosts_known(vm: str, fleet: Fleet) -> tuple[str, ...]:
    """The VM's hosts by where its reservation is; one that is on no live host has no name."""
    return tuple(
        next(iter(fleet.hosts_of(vm, [index])), f"(host {index})") for index in fleet.indices(vm)
    )
