"""Records which pages a process touches, by keeping nearly all of its memory from it.

Only the last few pages that it touched stay mapped, in the order of their arrival; the others
lie in the outbox. So almost every touch is a page fault, and what is not was touched shortly
before: a host with room for more pages would have held it. No network, no policy, no neighbours.
"""

from __future__ import annotations

import os
import select
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from mmap import mmap
from pathlib import Path

import numpy as np

from dcres.bench.replay import Trace
from dcres.errors import PagingError
from dcres.linux import inject
from dcres.linux.files import data_extents, opened
from dcres.linux.pipe import address_of
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.pages import PAGE_SIZE, Pages, mask_of_extents
from dcres.model.placement import LEAVING, MAIN, NOWHERE
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.table import PageTable

_BATCH_PAGES = 16
_FAULTS_AT_ONCE = 16
_POLL_MS = 20


class Recorder:
    """Serves one process's page faults in a thread of its own; see `recording`."""

    def __init__(
        self, uffd: Userfaultfd, base: int, book: PageBook, outbox: Outbox, most: int
    ) -> None:
        self._uffd, self._base, self._book, self._outbox = uffd, base, book, outbox
        self._table = table = book.table
        self._owners = table.owner_bytes()
        self._most = most
        self._page = mmap(-1, PAGE_SIZE)
        self._page_address = address_of(self._page)
        self._arrivals: deque[int] = deque(np.flatnonzero(table.owners == MAIN).tolist())
        self._keep = table.page_count
        self._pages: list[int] = []
        self._written: list[bool] = []
        self._recording = self._stopping = False
        self._trouble: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="recorder")
        self._thread.start()

    def begin(self, keep_pages: int) -> None:
        """From now on keep so few pages mapped, and record."""
        self._keep = keep_pages
        self._recording = True

    @property
    def full(self) -> bool:
        """Whether as much as wanted is recorded. Raises PagingError when it went wrong."""
        if self._trouble is not None:
            raise PagingError(f"recording page accesses failed: {self._trouble}")
        return len(self._pages) >= self._most

    def trace(self) -> Trace:
        """What was recorded until now."""
        pages = np.array(self._pages[: self._most], dtype=np.int64)
        return Trace(self._table.page_count, pages, np.array(self._written[: self._most]))

    def put_on_standby(self, pages: Pages) -> None:
        """Take present pages out of the page table, as the pager does; the process is idle."""
        self._outbox.unmap(pages)

    def stop(self) -> None:
        """Serve no more: the process waits for its next page, for ever."""
        self._stopping = True
        self._thread.join()

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._uffd.fd, select.POLLIN)
        try:
            while not self._stopping:
                if poller.poll(_POLL_MS):
                    for address, write in self._uffd.read_accesses(_FAULTS_AT_ONCE):
                        self._bring((address - self._base) // PAGE_SIZE, write)
                while len(self._arrivals) > self._keep:
                    self._take_oldest()
        except Exception as error:
            self._trouble = error

    def _bring(self, page: int, write: bool) -> None:
        address = self._base + page * PAGE_SIZE
        owner = self._owners[page]
        if owner == MAIN:
            self._uffd.wake(address, PAGE_SIZE)
            return
        if self._recording and len(self._pages) < self._most:
            self._pages.append(page)
            self._written.append(write)
        if owner == LEAVING:
            extent = np.array([[page, page + 1]])
            self._page[:] = self._outbox.read(extent)[0]
            self._uffd.copy(address, self._page_address, PAGE_SIZE)
            self._book.taken_back(page)
            self._outbox.drop(extent)
        else:
            self._uffd.zero(address, PAGE_SIZE)
            self._book.first_touch(page)
        self._arrivals.append(page)

    def _take_oldest(self) -> None:
        count = min(_BATCH_PAGES, len(self._arrivals))
        pages = sorted(self._arrivals.popleft() for _ in range(count))
        self._outbox.take(np.array(pages, dtype=np.int64))


@contextmanager
def recording(pid: int, ram: Path, page_count: int, most: int) -> Iterator[Recorder]:
    """Attach to a process that maps `ram`; at the end it waits for good, and is to be killed."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dcres-record-", dir=ram.parent))
        stack.callback(shutil.rmtree, folder)
        ram_fd = stack.enter_context(opened(ram, os.O_RDWR))
        spool = stack.enter_context(opened(folder / "outbox", os.O_RDWR | os.O_CREAT))
        os.ftruncate(spool, page_count * PAGE_SIZE)
        base = inject.mappings(pid, str(ram))[0][0]
        uffd = stack.enter_context(Userfaultfd(inject.take(pid, inject.make_userfaultfd(pid))))
        uffd.enable()
        uffd.register(base, page_count * PAGE_SIZE, missing=True)
        here = mask_of_extents(data_extents(ram_fd, page_count), page_count)
        owners = np.where(here, MAIN, NOWHERE).astype(np.uint8)
        book = PageBook(PageTable.create(folder / "table", owners, page_count))
        pipe = os.pipe()
        for fd in pipe:
            stack.callback(os.close, fd)
        recorder = Recorder(uffd, base, book, Outbox(book, ram_fd, spool, pipe), most)
        stack.callback(recorder.stop)
        yield recorder
