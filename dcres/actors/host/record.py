"""The main host's part in the record of what is to run: it is kept in this host's store."""

from __future__ import annotations

import logging

from dcres.errors import StoreFull, StoreReadOnly
from dcres.model.record import Desired, Record
from dcres.storage.store.protocols import CheckpointStore

log = logging.getLogger("dcres.host")


def write_record(store: CheckpointStore, vm: str, record: Record, *, unclaimed: bool) -> str:
    """Write it, durably; why there is none, for a life without its name and where it cannot be.

    That a VM is stopped is said in any case. Raises Conflict for a version or generation that has
    been overtaken, StoreFull for a stop, CheckpointCorrupt.
    """
    why = f"no record says that it is to be {record.desired}"
    if unclaimed:
        return why  # the record is that of whoever has the name
    try:
        store.lives(vm).records.write(record)
    except (StoreReadOnly, StoreFull) as error:
        if isinstance(error, StoreFull) and record.desired is Desired.STOPPED:
            raise
        why = f"{why}: {error}"
        log.warning("VM %s: %s", vm, why)
        return why
    return ""
