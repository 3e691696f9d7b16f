"""A VM's name in its main host's store: claimed for a life, held by its QEMU, released."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from dcres.actors.messages import ClaimOrder
from dcres.errors import Conflict, DcresError, NameTaken, StoreReadOnly
from dcres.linux.machine import boot_id, machine_id
from dcres.model.ownership import Claimant
from dcres.storage.store.lives import Claimed, next_without_store, read_counter
from dcres.storage.store.protocols import CheckpointStore
from dcres.vm.monitor import Monitor

log = logging.getLogger("dcres.host")

_HELD_AS = "life"  # by QEMU's monitor


def claimant(cluster: str, host: str) -> Claimant:
    """`cluster` on this machine, as `host`."""
    return Claimant(cluster, host, machine_id(), boot_id())


def trouble(store: CheckpointStore, vm: str, me: Claimant, *, take_over: bool) -> str:
    """Why a life of `vm` could not begin on this host, as things are now; empty if it could."""
    return store.lives(vm).trouble(me, take_over=take_over)


class NameInStore:
    """The name of VM `vm` in `store`, for the lives that host `host` runs.

    `record` is where generations are kept while the store cannot be written to.
    """

    def __init__(self, store: CheckpointStore, vm: str, host: str, record: Path) -> None:
        self._store = store
        self._vm = vm
        self._host = host
        self._record = record
        self._generation = 0  # of the life that was claimed last
        self._cluster = ""
        self._lock: int | None = None  # until its QEMU has it
        self.unclaimed = ""  # why that life has no claim

    def claim(self, order: ClaimOrder) -> int:
        """Begin a life; its generation.

        Where the store cannot be written to, or the name is that of another cluster's VM that runs
        and the order does without, the life has no claim, and checkpoints only once that has
        changed. Raises Conflict for a name that is another cluster's, CheckpointCorrupt, StoreFull.
        """
        self._close()
        lives, me = self._store.lives(self._vm), claimant(order.cluster, self._host)
        # Those that were given out without the store are not to come again with it.
        known = self._store.latest_generation(self._vm), read_counter(self._record)
        above = max(order.above, *known)
        try:
            claimed = lives.claim(me, above, _now(), take_over=order.take_over)
        except (StoreReadOnly, NameTaken) as error:
            if order.needs_name:
                if isinstance(error, NameTaken):
                    raise
                lives.require_free(me, take_over=order.take_over)
            self.unclaimed = f"it can take no checkpoint: {error}"
            log.warning("VM %s: %s", self._vm, self.unclaimed)
            self._generation = next_without_store(self._record, above)
        else:
            self.unclaimed = ""
            self._generation, self._lock = claimed.generation, claimed.lock
        self._cluster = order.cluster
        return self._generation

    @property
    def claimed(self) -> bool:
        """Whether the name is the life's that is about to be started."""
        return self._lock is not None

    def hand_over(self, generation: int, monitor: Monitor) -> str:
        """The life's QEMU, which is there, holds the claim from now on; the cluster that has it.

        Raises Conflict where the claim ended with the actor that made it.
        """
        if generation != self._generation:
            raise Conflict(
                f"the actor of host {self._host} was restarted while VM {self._vm} was being "
                "started, and the claim of its name is lost; start or restore it again"
            )
        if self._lock is not None:
            monitor.send_fd(_HELD_AS, self._lock)
        self._close()
        return self._cluster

    def keep(self, cluster: str, generation: int) -> Claimed | None:
        """Require that this life may save; see `Lives.renew`. What is claimed anew is to be held.

        Raises StoreReadOnly.
        """
        me = claimant(cluster, self._host)
        return self._store.lives(self._vm).renew(me, generation, _now())

    def hold_anew(self, cluster: str, claimed: Claimed, monitor: Monitor) -> None:
        """A QEMU that runs already holds what `keep` claimed; else the claim is released."""
        try:
            monitor.send_fd(_HELD_AS, claimed.lock)
        except BaseException:
            os.close(claimed.lock)
            self.release(cluster, claimed.generation)
            raise
        os.close(claimed.lock)

    def release(self, cluster: str, generation: int) -> None:
        """The life was ended. Where that cannot be written, its lock is free. Repeatable."""
        self._close()
        with suppress(DcresError, OSError):
            self._store.lives(self._vm).release(claimant(cluster, self._host), generation)

    def release_last(self) -> None:
        """The same for the life that was claimed last, if any was. Repeatable."""
        if self._generation:
            self.release(self._cluster, self._generation)

    def _close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
