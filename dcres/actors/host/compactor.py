"""Compaction: this host's segments of a published checkpoint are merged while the VM runs.

So the next increment has one in place of many, and a chain of them may go on for ever. Nothing
waits for it, and nothing but room is lost where it fails: segments stay as they are until the
next checkpoint is published, when it is ordered again.
"""

from __future__ import annotations

import logging
import threading

from dcres.actors.host.page_loader import parse
from dcres.actors.host.part_saver import beside_guest
from dcres.actors.host.room import require_store_room
from dcres.actors.host.site import Site
from dcres.errors import Conflict, DcresError
from dcres.linux import priority
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.manifest import HostPart, Manifest
from dcres.storage.format.merged import is_to_be_merged

log = logging.getLogger("dcres.host")

_END_S = 20.0  # for a disk that hangs


class Compactor:
    """One compaction at a time, in a thread of its own."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = threading.Lock()
        self._latest: _Compaction | None = None
        self._over = False

    def compact(self, manifest: str) -> None:
        """See `dcres.actors.protocol.Saving`. Raises Conflict after `end`."""
        wanted = parse(manifest)
        with self._lock:
            if self._over:
                raise Conflict(f"VM {wanted.vm} has ended on {self._site.host}")
            before = self._latest
            if before is not None and before.serves(wanted):
                return
            if before is not None:
                before.cancel()
            self._latest = _Compaction(self._site, wanted, before)

    def cancel(self) -> None:
        """What is under way ends soon, and leaves nothing. Repeatable."""
        with self._lock:
            if self._latest is not None:
                self._latest.cancel()

    def end(self) -> None:
        """The same for good, and it has ended, unless its disk hangs. Repeatable."""
        self._over = True
        self.cancel()
        if self._latest is not None:
            self._latest.join(_END_S)


class _Compaction:
    """The compaction of one checkpoint, once the one `before` it has ended."""

    def __init__(self, site: Site, manifest: Manifest, before: _Compaction | None) -> None:
        self._site = site
        self._manifest = manifest
        self._cancelled = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(before,), name="compact", daemon=True
        )
        self._thread.start()

    def serves(self, wanted: Manifest) -> bool:
        """Whether it goes on, and a checkpoint upon `wanted` can have what it makes."""
        goes_on = self._thread.is_alive() and not self._cancelled.is_set()
        return goes_on and self._manifest.checkpoint in wanted.chain

    def cancel(self) -> None:
        self._cancelled.set()

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def _run(self, before: _Compaction | None) -> None:
        if before is not None:
            before.join()
        name = self._manifest.checkpoint
        try:
            self._proceed(0)
            with priority.background():
                self._merge()
        except Conflict as error:
            log.info("segments of %s stay as they are: %s", name, error)
        except (DcresError, OSError) as error:
            log.warning("segments of %s stay as they are: %s", name, error)

    def _merge(self) -> None:
        store, host, manifest = self._site.store, self._site.host, self._manifest
        part = next((part for part in manifest.hosts if part.host == host), None)
        if part is None or part.segments is None:
            return
        merged = store.continuing.merged_part(manifest, host)
        if is_to_be_merged(part.pages, part.segments, merged):
            self._require_room(part)
            store.continuing.merge_part(manifest, host, beside_guest(), self._proceed)
            log.info("%d segments of %s are one now", len(part.segments), manifest.checkpoint)

    def _require_room(self, part: HostPart) -> None:
        places = sum(segment.places for segment in part.segments or ())
        require_store_room(self._site.settings.store, min(places, part.pages) * PAGE_SIZE)

    def _proceed(self, pages: int) -> None:
        """Some pages have been merged. Raises Conflict once it was cancelled."""
        if self._cancelled.is_set():
            raise Conflict("merging was cancelled")
