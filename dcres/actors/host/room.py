"""Room on a host for guest memory, and for checkpoints."""

from __future__ import annotations

from pathlib import Path

from dcres.config import HostSettings
from dcres.errors import NoRoom, StoreFull
from dcres.linux.files import free_in
from dcres.linux.tmpfs import require_small_pages


def require_ram(settings: HostSettings, share_bytes: int) -> None:
    """NoRoom unless the tmpfs that holds guest memory can take `share_bytes` more.

    Raises UnsupportedHost where guest memory must not lie.
    """
    ram = settings.ram
    require_small_pages(ram, settings.name)
    free = free_in(ram)
    if free < share_bytes:
        raise NoRoom(
            f"{ram} has {free >> 20} MiB free and this host's share is {share_bytes >> 20} MiB; "
            "give the tmpfs more room or choose another folder with DCRES_RAM"
        )


def require_store_room(store: Path, length_bytes: int) -> None:
    """StoreFull before anything is stopped, when the disk clearly has too little room."""
    free = free_in(store)
    if free < length_bytes:
        raise StoreFull(
            f"{store} has {free >> 20} MiB free and this host's part needs up to "
            f"{length_bytes >> 20} MiB; delete checkpoints or give it another disk"
        )
