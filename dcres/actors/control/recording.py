"""When the record of what is to run is written, and by what rule.

A life is recorded as running once: before its start or restore is told as done, or by the
coordinator that finds it running where the one before could not. What was said of it later stays,
so that a stop is never undone. A VM whose guest may run by now is not ended for want of a record.
"""

from __future__ import annotations

import logging
from functools import partial

from dcres.actors.control.asking import await_ready, describe
from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.protocol import Machine
from dcres.errors import CheckpointCorrupt, ClusterError, Conflict, DcresError, NotFound
from dcres.model.record import Desired, Record

log = logging.getLogger("dcres.coordinator")

_READY_TIMEOUT_S = 30.0  # an actor that was just started again adopts what runs before it answers
_ANSWER_TIMEOUT_S = 10.0
_PAUSE_S = 0.2
_TRIES = 5


def record_running(vm: VmHandle, by: str = "") -> None:
    """Have the record say that the VM, which runs, is to run.

    Where that cannot be within half a minute it runs on, and `catch_up` comes later. Raises
    Conflict where the record tells of a later life.
    """
    deadline_s = vm.concurrency.now_s() + _READY_TIMEOUT_S
    try:
        while True:
            try:
                _await_main(vm, deadline_s - vm.concurrency.now_s())
                _record_running(vm, by)
                return
            except ClusterError:
                if vm.concurrency.now_s() >= deadline_s or not vm.fleet.alive(vm.hosts.main):
                    raise
                vm.concurrency.sleep(_PAUSE_S)
    except Conflict:
        raise
    except DcresError as error:
        _warn(vm, Desired.RUNNING, error)


def catch_up(vm: VmHandle) -> None:
    """The same for a life that was found running, unless it is recorded; at most once."""
    try:
        _record_running(vm, by="")
    except DcresError as error:
        _warn(vm, Desired.RUNNING, error)


def record_stopped(vm: VmHandle, by: str = "") -> None:
    """Before the VM is ended: have the record say so.

    Neither a main host that does not answer nor a record that says nothing keeps the VM from being
    ended. Raises StoreFull.
    """
    if not vm.hosts.ports:
        return
    try:
        _await_main(vm, _READY_TIMEOUT_S)
        _record_stopped(vm, by)
    except (ClusterError, CheckpointCorrupt, NotFound) as error:
        _warn(vm, Desired.STOPPED, error)


def _await_main(vm: VmHandle, timeout_s: float) -> None:
    alive = partial(vm.fleet.alive, vm.hosts.main)
    await_ready(vm.main, alive, timeout_s, vm.concurrency)


def _warn(vm: VmHandle, desired: Desired, error: DcresError) -> None:
    log.warning("VM %s is not on record as %s: %s", vm.name, desired, error)


def _record_running(vm: VmHandle, by: str) -> None:
    main = vm.main.within(_ANSWER_TIMEOUT_S)
    life, cluster = describe(main), vm.fleet.cluster()
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
        since=_now(vm.concurrency),
        by=by,
    )
    main.call(Machine.record, record)


def _record_stopped(vm: VmHandle, by: str) -> None:
    main, cluster = vm.main.within(_ANSWER_TIMEOUT_S), vm.fleet.cluster()
    for tries_left in reversed(range(_TRIES)):
        before = main.call(Machine.recorded)
        if before is None or before.cluster != cluster or before.desired is Desired.STOPPED:
            return
        try:
            main.call(Machine.record, before.stopped(_now(vm.concurrency), by))
            return
        except Conflict:  # another was faster; a stop comes after whatever that was
            if not tries_left:
                raise


def _now(concurrency: Concurrency) -> str:
    return concurrency.utc().strftime("%Y-%m-%dT%H:%M:%SZ")
