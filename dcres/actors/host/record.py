"""The main host's part in the record of what is to run: it is kept in this host's store."""

from __future__ import annotations

import logging

from dcres.errors import StoreReadOnly
from dcres.model.record import Record
from dcres.storage.store.protocols import CheckpointStore

log = logging.getLogger("dcres.host")


def write_record(store: CheckpointStore, vm: str, record: Record, *, unclaimed: bool) -> str:
    """Write it, durably; why there is none, on a store to read and for a life without its name.

    Raises Conflict for a version or generation that has been overtaken, StoreFull,
    CheckpointCorrupt.
    """
    why = f"no record says that it is to be {record.desired}"
    if unclaimed:
        return why  # the record is that of whoever has the name
    try:
        store.lives(vm).records.write(record)
    except StoreReadOnly as error:
        why = f"{why}: {error}"
        log.warning("VM %s: %s", vm, why)
        return why
    return ""
