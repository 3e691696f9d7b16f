"""A published checkpoint: what is known of it, its check, its end, and where it would go."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from dcres.actors.control.choosing import wish_of
from dcres.actors.control.publishing import checkpoint_facts
from dcres.api.catalogue import verify
from dcres.api.copying import Copied, KnownCopy, copy, known_copies
from dcres.api.operation import ProgressOption
from dcres.api.plan import RestorePlan, plan_restore
from dcres.api.session import Session
from dcres.config import Layout, format_size
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.checks import VerifyReport
from dcres.storage.format.manifest import Manifest


class Published:
    """A published checkpoint. `facts` is what ``dcres checkpoint --json`` prints of it.

    `dcres.api.vm.Checkpoint` is one that can be restored.
    """

    def __init__(self, session: Session, known: Manifest | dict[str, Any]) -> None:
        """`known` is its manifest, or the facts of one that was just taken.

        These do without the store, which this machine may not reach, or not by its usual name.
        """
        self._session = session
        self._manifest = known if isinstance(known, Manifest) else None
        self.facts = checkpoint_facts(known) if isinstance(known, Manifest) else known

    @property
    def manifest(self) -> Manifest:
        """All that is known of it. Raises NotFound where this session reads another store."""
        if self._manifest is None:
            self._manifest = self._session.catalogue.get(self.id)
        return self._manifest

    @property
    def id(self) -> str:
        """Its name, for the command line and for `Cluster.checkpoint`."""
        return str(self.facts["checkpoint"])

    @property
    def vm(self) -> str:
        """The name of the VM that was saved."""
        return str(self.facts["vm"])

    @property
    def created(self) -> datetime:
        """When it was begun, UTC."""
        return datetime.fromisoformat(self.manifest.created)

    def __repr__(self) -> str:
        saved = ", ".join(
            f"{part['host']} {format_size(part['pages'] * PAGE_SIZE)}"
            for part in self.facts["hosts"]
        )
        return f"<Checkpoint {self.id} ({self.facts['mode']}): {saved}>"

    def inspect(self) -> dict[str, Any]:
        """The manifest as plain values: hosts, files with checksums, VM file, times."""
        return self.manifest.model_dump(mode="json")

    def verify(self, progress: ProgressOption = None) -> VerifyReport:
        """Read every byte and compare. Raises NotFound, CheckpointCorrupt for the manifest."""
        return verify(self._session.catalogue, self.id, progress)

    def delete(self) -> None:
        """Remove it from the store for good. Raises NotFound, Conflict while it is read.

        OperationFailed says which hosts keep files of it: those that do not answer.
        """
        self._session.catalogue.delete(self.id)

    def copy(
        self, to: str, *, rate: str | float | None = None, progress: ProgressOption = None
    ) -> Copied:
        """Copy it to a URL: ``s3://bucket/prefix``, ``gs://…`` or ``file:///folder``.

        Every host that has a part sends its own, at most `rate` bytes a second (``"100MB/s"``), and
        reads back what it sent. What is there and whole is not sent again, so this may be repeated:
        it goes on after an interruption, and mends a copy that was damaged. The copy is one only
        when all of it is there. Meanwhile the checkpoint cannot be deleted. Raises ConfigError
        for a wrong URL, NotFound, Conflict if another checkpoint is there in its place,
        and OperationFailed, which says what failed on which host.
        """
        return copy(self._session.catalogue, self.id, to, rate, progress)

    def copies(self) -> list[KnownCopy]:
        """Its copies that are on record, each as it is found now. Raises NotFound."""
        return known_copies(self._session.catalogue, self.id)

    def plan(
        self,
        layout: Layout | None = None,
        *,
        single: bool = False,
        hosts: int | str | Sequence[str] | None = None,
        lazy: bool = False,
        take_over: bool = False,
    ) -> RestorePlan:
        """What `restore` with the same arguments would do; changes nothing.

        Raises ConfigError for arguments that contradict each other; everything else that would
        fail is among the plan's problems.
        """
        wish = wish_of(self.manifest, layout, single, hosts)
        return plan_restore(self._session, self.manifest, wish, lazy=lazy, take_over=take_over)
