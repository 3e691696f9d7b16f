"""What a host tells before a restore is placed: its room, and what its store has."""

from __future__ import annotations

from dcres.actors.host import name_in_store
from dcres.actors.host.page_loader import make_plan, parse
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Look, PlanOrder
from dcres.config import HostSettings
from dcres.linux.memory import free_for_guests
from dcres.model.restore_plan import Flow
from dcres.storage.store.store import Store

# For QEMU itself, the pager, page tables: what a main host needs besides the guest's memory.
_BESIDES_BYTES = 256 << 20


def look(settings: HostSettings, manifest: str, cluster: str, take_over: bool) -> Look:
    """The memory free as the host's kernel sees it, and what its store has."""
    found = parse(manifest)
    store, me = Store(settings.store), name_in_store.claimant(cluster, settings.name)
    folder = VmFolder.of(settings, found.vm, cluster)
    trouble = folder.trouble(take_over=take_over)
    return Look(
        free_bytes=free_for_guests(settings.ram, _BESIDES_BYTES) + folder.ram_bytes,
        parts=store.parts_here(found),
        trouble=trouble or name_in_store.trouble(store, found.vm, me, take_over=take_over),
    )


def flow(settings: HostSettings, order: PlanOrder) -> Flow:
    """The plan's numbers, from the main host's part in this store."""
    return make_plan(Store(settings.store), order).flow
