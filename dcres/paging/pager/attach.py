"""Getting hold of a QEMU: its RAM mapping, a userfaultfd and a pipe of its own.

QEMU keeps its copies of all three for as long as it lives. That is what lets a pager die:
faults go on waiting, pages in the pipe stay there, and the next pager takes copies again.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.errors import PagesLost, PagingError, VmLost
from dcres.linux import inject
from dcres.linux.files import data_extents, open_own, opened
from dcres.linux.pipe import access_mode
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.pages import PAGE_SIZE, Mask, mask_of_extents
from dcres.model.placement import LEAVING, MAIN, NOWHERE
from dcres.paging.content import ContentChanges
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.table import PageTable
from dcres.paging.settings import PagerSettings

_USERFAULTFD = "anon_inode:[userfaultfd]"


@dataclass(frozen=True, slots=True)
class Attached:
    """What a pager works with. All descriptors are ours and closed by the stack given."""

    uffd: Userfaultfd
    base: int
    ram: int
    outbox: Outbox
    adopted: bool


def lock_of(settings: PagerSettings) -> Path:
    """What a pager holds for its life; a file of its own, since the table is put in place."""
    return Path(settings.table).with_suffix(".lock")


def open_table(settings: PagerSettings) -> PageTable:
    """The VM's page table; a new one, of what is in the RAM file, when there is none yet.

    Raises PagingError when it is of another size, or has pages with a host that the settings do
    not name: serving goes on where all pages can be had, or not at all.
    """
    path = Path(settings.table)
    if not path.exists():
        with opened(settings.ram, os.O_RDONLY) as fd:
            # QEMU loads firmware and kernel before the guest runs.
            owners = np.where(present(fd, settings.page_count), MAIN, NOWHERE).astype(np.uint8)
        return PageTable.create(path, owners, settings.limit_pages)
    table = PageTable(path, settings.page_count)
    _require_known(table, settings)
    return table


def open_content(table: PageTable, path: Path, base: str) -> ContentChanges:
    """The account of what changed; a new one, since `base`, for a QEMU that ran nothing yet.

    Raises NoRoom, PagingError for one of another VM.
    """
    if table.pipe_inode and path.exists():
        return ContentChanges(path, table.page_count)
    return ContentChanges.fresh(path, table.page_count, base)


def _require_known(table: PageTable, settings: PagerSettings) -> None:
    known = {NOWHERE, MAIN, LEAVING, *(each.code for each in (*settings.subs, *settings.sources))}
    counts = np.bincount(table.owners, minlength=256)
    strange = [code for code in np.flatnonzero(counts).tolist() if code not in known]
    if strange:
        words = ", ".join(f"{counts[code]} pages with owner {code}" for code in strange)
        raise PagingError(
            f"the page table {settings.table} has {words}, and the pager's settings name no such "
            "host; put the host that has these pages back into them"
        )


def attach(settings: PagerSettings, book: PageBook, stack: ExitStack) -> Attached:
    """Take over the paging of a stopped QEMU, or of one whose pager has died.

    Raises VmLost when QEMU is gone, UnsupportedHost, PagesLost when memory is missing.
    """
    base = _ram_base(settings)
    ram, spool = _open(settings.ram, stack), _open(settings.outbox, stack)
    os.ftruncate(spool, settings.page_count * PAGE_SIZE)
    table = book.table
    adopted = table.pipe_inode != 0
    if adopted:
        uffd = stack.enter_context(_adopt_userfaultfd(settings.qemu_pid))
    else:
        _require_placed(table, ram)
        uffd = stack.enter_context(_new_userfaultfd(settings, base))
        table.pipe_inode = _new_pipe(settings.qemu_pid)
    pipe = _adopt_pipe(settings.qemu_pid, table.pipe_inode, stack)
    outbox = Outbox(book, ram, spool, pipe)
    if adopted:
        # Its predecessor may have died before it did that for sub hosts that have just joined.
        _register(uffd, base, settings)
        _recover(book, outbox, ram, spool)
        uffd.wake(base, settings.page_count * PAGE_SIZE)
    return Attached(uffd, base, ram, outbox, adopted)


def _open(path: str, stack: ExitStack) -> int:
    fd = open_own(path, os.O_RDWR | os.O_CREAT)
    stack.callback(os.close, fd)
    return fd


def _ram_base(settings: PagerSettings) -> int:
    try:
        found = inject.mappings(settings.qemu_pid, settings.ram)
    except FileNotFoundError:
        raise VmLost(f"QEMU (process {settings.qemu_pid}) is gone") from None
    if len(found) != 1 or found[0][1] - found[0][0] != settings.page_count * PAGE_SIZE:
        raise VmLost(f"process {settings.qemu_pid} does not map {settings.ram} once and whole")
    return found[0][0]


def _new_userfaultfd(settings: PagerSettings, base: int) -> Userfaultfd:
    number = inject.make_userfaultfd(settings.qemu_pid)
    uffd = Userfaultfd(inject.take(settings.qemu_pid, number))
    uffd.enable()
    _register(uffd, base, settings)
    return uffd


def _register(uffd: Userfaultfd, base: int, settings: PagerSettings) -> None:
    """Have the kernel report faults. Repeatable, with another answer to what is missing, too.

    Without sub hosts nothing is ever missing: the guest then runs at full speed, and only its
    writes are recorded.
    """
    missing = bool(settings.subs or settings.sources)
    uffd.register(base, settings.page_count * PAGE_SIZE, missing=missing)


def keep_owners(attached: Attached, settings: PagerSettings, book: PageBook) -> None:
    """The first sub host joins: from now on no page may come or go behind our back.

    Before, a page that the guest touched appeared without a fault, and nobody kept the owners.
    What the RAM file holds once faults are reported is all that is there.
    """
    _register(attached.uffd, attached.base, settings)
    book.keep_owners(present(attached.ram, settings.page_count))


def _adopt_userfaultfd(pid: int) -> Userfaultfd:
    numbers = inject.descriptors(pid, _USERFAULTFD)
    if len(numbers) != 1:
        raise VmLost(
            f"QEMU (process {pid}) holds {len(numbers)} userfaultfds, not the one of dcres"
        )
    return Userfaultfd(inject.take(pid, numbers[0]))


def _new_pipe(pid: int) -> int:
    read_end, _ = inject.make_pipe(pid)
    return os.stat(f"/proc/{pid}/fd/{read_end}").st_ino


def _adopt_pipe(pid: int, inode: int, stack: ExitStack) -> tuple[int, int]:
    numbers = inject.descriptors(pid, f"pipe:[{inode}]")
    if len(numbers) != 2:
        raise VmLost(f"QEMU (process {pid}) no longer holds the pipe of dcres")
    ends = {}
    for number in numbers:
        fd = inject.take(pid, number)
        stack.callback(os.close, fd)
        ends[access_mode(fd)] = fd
    # Their numbers do not tell: QEMU has threads, and one may close a file between the two.
    if ends.keys() != {os.O_RDONLY, os.O_WRONLY}:
        raise VmLost(
            f"QEMU (process {pid}) holds one end of the pipe of dcres twice and the other not at "
            "all; restore a checkpoint"
        )
    return ends[os.O_RDONLY], ends[os.O_WRONLY]


def present(fd: int, page_count: int) -> Mask:
    """Which pages a sparse file holds."""
    return mask_of_extents(data_extents(fd, page_count), page_count)


def _require_placed(table: PageTable, ram: int) -> None:
    in_ram = present(ram, table.page_count)
    wrong = int((in_ram != (table.owners == MAIN)).sum())
    if wrong:
        raise PagesLost(f"the RAM file and the page table disagree about {wrong} pages")


def _recover(book: PageBook, outbox: Outbox, ram: int, spool: int) -> None:
    outbox.recover()
    count = book.table.page_count
    outbox.drop_mask(book.recover(present(ram, count), present(spool, count)))
