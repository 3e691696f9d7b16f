"""Every error that dcres raises on purpose, sorted by who has to act.

::

    DcresError
    ├── InputError             the caller asked for something that cannot be; exit status 2
    │   ├── ConfigError        a VM file, a layout or an option is wrong
    │   ├── NotFound           no such VM, checkpoint or host
    │   └── Conflict           it exists already, or something else is being done to it
    │       └── NameTaken      the VM's name in the store is that of another cluster's, which runs
    ├── HostError              this host cannot do what is needed
    │   ├── UnsupportedHost    kernel, privileges or programs are missing
    │   ├── NoRoom             not enough memory or disk
    │   └── NotOurs            a file or folder is not provably dcres's own
    ├── StorageError           what is on disk cannot be trusted or written
    │   ├── CheckpointCorrupt  a file of a checkpoint is missing, truncated or altered
    │   │   └── FileMissing    it is not there at all
    │   ├── BaseUnusable       no increment can be made upon a checkpoint; take a full one
    │   ├── StoreFull          the disk ran out of space
    │   └── StoreReadOnly      the store cannot be written to
    ├── PagingError            remote paging went wrong
    │   ├── ProtocolError      a peer sent a malformed or unexpected frame
    │   ├── Refused            a peer did not prove that it belongs to this VM
    │   └── PagesLost          pages that should be somewhere are nowhere
    ├── VmError                the QEMU process
    │   ├── QemuFailed         it did not start, or exited; its own words are included
    │   ├── MonitorError       a QMP command failed
    │   ├── UnsafeDevice       a device or disk that no checkpoint could have, or that writes
    │   │                      guest memory behind the page table
    │   └── VmLost             the VM cannot go on; restore a checkpoint
    │       └── VmOff          it has ended in order: start it again
    └── ClusterError           Ray, or an actor on it
        ├── ActorGone          an actor has died or is being restarted; try again, or give up on it
        └── OperationFailed    an operation over several hosts; says which host failed and why

An error crosses Ray as its type, its ``args`` and its attributes, so every class takes exactly the
arguments that it stores: one sentence, and for `OperationFailed` the failures by host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class HostFailure:
    """What went wrong on one host, as plain values: the error's class by name, and its sentence.

    `host` is empty where it was no host's doing.
    """

    host: str
    kind: str
    message: str

    @classmethod
    def of(cls, host: str, error: BaseException) -> HostFailure:
        """What `error` says of `host`, or of the one host that it names itself if that is empty.

        One that is not of dcres counts as a ClusterError.
        """
        if isinstance(error, DcresError):
            if not host and len(error.failed_on) == 1 and not isinstance(error, OperationFailed):
                return error.failed_on[0]
            return cls(host, type(error).__name__, str(error))
        return cls(host, ClusterError.__name__, f"{type(error).__name__}: {error}")

    def is_a(self, kind: type[DcresError]) -> bool:
        """Whether an error of that class, or of one below it, was raised."""
        return issubclass(_class_named(self.kind), kind)

    def to_dict(self) -> dict[str, str]:
        """As ``--json`` prints it."""
        return {"host": self.host, "type": self.kind, "message": self.message}

    @property
    def error(self) -> DcresError:
        """The error again, of the class that it had; its sentence names the host."""
        kind = _class_named(self.kind)
        message = f"{self.host}: {self.message}" if self.host else self.message
        made = kind(message, {}) if issubclass(kind, OperationFailed) else kind(message)
        made.failed_on = (self,) if self.host else ()
        return made


class DcresError(Exception):
    """Base of all; its text is one sentence that names the thing and the remedy.

    `failed_on` says on which hosts what went wrong, and `journal` what the operation that failed
    had done until then; both are empty where there is nothing to say.
    """

    failed_on: tuple[HostFailure, ...] = ()
    journal: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        facts: dict[str, Any] = {"error": type(self).__name__, "message": str(self)}
        if self.failed_on:
            facts["failures"] = [each.to_dict() for each in self.failed_on]
        if self.journal:
            facts["journal"] = list(self.journal)
        return facts


class InputError(DcresError):
    """The caller asked for something that cannot be."""


class ConfigError(InputError):
    """A VM file, a layout or an option is wrong."""


class NotFound(InputError):
    """There is no such VM, checkpoint or host."""


class Conflict(InputError):
    """It exists already, or something else is being done to it."""


class NameTaken(Conflict):
    """The VM's name in the store belongs to a VM of another cluster, which runs."""


class HostError(DcresError):
    """This host cannot do what is needed."""


class UnsupportedHost(HostError):
    """The kernel, privileges or programs that dcres needs are missing."""


class NoRoom(HostError):
    """Not enough memory or disk on a host."""


class NotOurs(HostError):
    """A file or folder is not provably dcres's own; it is neither used nor removed."""


class StorageError(DcresError):
    """What is on disk cannot be trusted or written."""


class CheckpointCorrupt(StorageError):
    """A file of a checkpoint is missing, truncated or altered."""


class FileMissing(CheckpointCorrupt):
    """A file that a checkpoint names is not there at all."""


class BaseUnusable(StorageError):
    """No increment can be made upon that checkpoint; take a full one."""


class StoreFull(StorageError):
    """The disk ran out of space."""


class StoreReadOnly(StorageError):
    """The store cannot be written to."""


class PagingError(DcresError):
    """Remote paging went wrong."""


class ProtocolError(PagingError):
    """A peer sent a malformed or unexpected frame."""


class Refused(PagingError):
    """A peer did not prove that it belongs to this VM."""


class PagesLost(PagingError):
    """Pages that should be somewhere are nowhere."""


class VmError(DcresError):
    """Something about the QEMU process."""


class QemuFailed(VmError):
    """QEMU did not start, or exited."""


class MonitorError(VmError):
    """A QMP command failed."""


class UnsafeDevice(VmError):
    """A device or disk would write guest memory unseen, or be in no checkpoint that works."""


class VmLost(VmError):
    """The VM cannot go on; restore a checkpoint."""


class VmOff(VmLost):
    """The VM has ended in order; start it again, or restore a checkpoint."""


class ClusterError(DcresError):
    """Ray, or an actor on it."""


class ActorGone(ClusterError):
    """An actor has died or is being restarted; what it was doing may or may not be done."""


class OperationFailed(ClusterError):
    """An operation over several hosts failed; `failures` maps host → what went wrong there.

    One that was cancelled has `CANCELLED` in the place of a host. `types` maps host → the name of
    the error's class there, a ClusterError where it is left out.
    """

    def __init__(
        self, message: str, failures: dict[str, str], types: dict[str, str] | None = None
    ) -> None:
        super().__init__(message, failures, types)
        self.message = message
        self.failures = failures
        self.failed_on = tuple(
            HostFailure(host, (types or {}).get(host, ClusterError.__name__), why)
            for host, why in sorted(failures.items())
            if host != CANCELLED
        )

    @classmethod
    def of(cls, message: str, failed: Iterable[HostFailure]) -> OperationFailed:
        """With what went wrong on each host."""
        every = list(failed)
        return cls(
            message,
            {each.host: each.message for each in every},
            {each.host: each.kind for each in every},
        )

    def __str__(self) -> str:
        parts = "; ".join(f"{host}: {why}" for host, why in sorted(self.failures.items()))
        return f"{self.message} ({parts})" if parts else self.message


def _class_named(name: str) -> type[DcresError]:
    """The class of that name; ClusterError for one that there is not."""
    fresh: list[type[DcresError]] = [DcresError]
    while fresh:
        kind = fresh.pop()
        if kind.__name__ == name:
            return kind
        fresh += kind.__subclasses__()
    return ClusterError
