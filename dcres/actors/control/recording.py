"""When the record of what is to run is written, and by what rule.

A life is recorded as running once: before its start or restore is told as done, or by the
coordinator that finds it running where the one before could not. What was said of it later stays,
so that a stop is never undone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from dcres.actors.control.asking import await_ready
from dcres.actors.messages import Description
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine
from dcres.errors import CheckpointCorrupt, ClusterError, Conflict, DcresError, NotFound
from dcres.model.record import Desired, Record

log = logging.getLogger("dcres.coordinator")

_READY_TIMEOUT_S = 30.0  # an actor that was just started again adopts what runs before it answers
_TRIES = 5


def record_running(main: Port, life: Description, cluster: str, by: str = "") -> None:
    """Have the record say that this life of the VM is to run, unless it tells of it already.

    Raises Conflict where it tells of a later life, StoreFull, CheckpointCorrupt, ClusterError,
    and NotFound for a host that knows of no life.
    """
    if life.spec is None:
        raise NotFound(f"host {life.host} knows nothing of the VM, so it is not on record")
    before = main.call(Machine.recorded)
    if before is not None and (before.cluster, before.generation) == (cluster, life.generation):
        return
    record = Record(
        version=1 if before is None else before.version + 1,
        generation=life.generation,
        cluster=cluster,
        desired=Desired.RUNNING,
        spec=life.spec.model_dump(mode="json", by_alias=True),
        since=_now(),
        by=by,
    )
    main.call(Machine.record, record)


def catch_up(vm: str, main: Port, life: Description, cluster: str) -> None:
    """The same for a life that was found running; where that cannot be, it runs on."""
    try:
        record_running(main, life, cluster)
    except DcresError as error:
        log.warning("VM %s is not on record as running: %s", vm, error)


def record_stopped(vm: str, fleet: Fleet, hosts: Sequence[str], by: str = "") -> None:
    """Before the VM on `hosts` is ended: have the record say so.

    Neither a main host that does not answer nor a record that says nothing keeps the VM from being
    ended. Raises StoreFull.
    """
    ports = fleet.find(vm)
    if not ports or 0 not in fleet.indices(vm):
        return
    try:
        await_ready(ports[0], lambda: all(map(fleet.alive, hosts[:1])), _READY_TIMEOUT_S)
        _record_stopped(ports[0], fleet.cluster(), by)
    except (ClusterError, CheckpointCorrupt) as error:
        log.warning("VM %s is not on record as stopped: %s", vm, error)


def _record_stopped(main: Port, cluster: str, by: str) -> None:
    for tries_left in reversed(range(_TRIES)):
        before = main.call(Machine.recorded)
        if before is None or before.cluster != cluster or before.desired is Desired.STOPPED:
            return
        try:
            main.call(Machine.record, before.stopped(_now(), by))
            return
        except Conflict:  # another was faster; a stop comes after whatever that was
            if not tries_left:
                raise


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
