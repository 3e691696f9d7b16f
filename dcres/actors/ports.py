"""How the coordinator sees the rest: hosts behind ports, and the fleet that provides them.

`dcres.actors.ray.gateway.ActorPort` and `tests.support.fleet.LocalPort` are both ports; the
contract tests hold them to the same behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from dcres.actors.control.room import Around
from dcres.actors.messages import PlanOrder, Role
from dcres.model.restore_plan import Flow

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Pending(Protocol[R_co]):
    """A call under way."""

    def result(self, timeout_s: float | None = None) -> R_co:
        """Wait for its result, as long as the order says by default.

        Raises what the call raised, ClusterError when time is over.
        """


class Port(Protocol):
    """An actor that can be called; `order` is a method of what it is, such as `Saving.copy`."""

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        """Start a call and return at once."""

    def call(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call and wait. Raises DcresError as raised there, ActorGone, ClusterError."""

    def within(self, timeout_s: float) -> Self:
        """The same actor, whose answers may take `timeout_s` whatever their orders say."""

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the actor answers, through a restart if need be."""


class Fleet(Protocol):
    """Hosts for one VM: reserved, with an actor on each."""

    def cluster(self) -> str:
        """Which cluster these hosts are of: no other has the same, and it keeps it."""

    def reserve(
        self,
        vm: str,
        shares: Sequence[int],
        hosts: Sequence[str] | None,
        roles: Sequence[Role] = (),
    ) -> list[str]:
        """Set memory aside and start the actors in these roles; the hosts in their order.

        Without `roles` the first is the main host and the others are sub hosts.

        Raises NoRoom, NotFound or Conflict, and then nothing is reserved.
        """

    def find(self, vm: str) -> list[Port]:
        """The ports of a VM's hosts, the main host first; empty when nothing is reserved."""

    def room_for(self, vm: str, extras: Mapping[int, int], shares: Sequence[int]) -> list[str]:
        """The hosts to `add` for `shares`, where they and what `extend` is to do have room.

        `extras` are bytes by the index of a host. Reserves nothing, so that another VM may
        have the room by the time it is. Raises NoRoom, NotFound for a host that is gone.
        """

    def require_room(self, vm: str, shares: Sequence[int], hosts: Sequence[str] | None) -> None:
        """NoRoom or NotFound unless `reserve` has room once what the VM holds is given back."""

    def extend(self, vm: str, index: int, extra: int) -> None:
        """Set `extra` bytes more aside on host `index`; 0 gives back what was set aside."""

    def add(self, vm: str, share: int, host: str, role: Role = Role.SUB) -> Port:
        """Set memory aside on `host`, which is not the VM's yet, and start its actor in that role.

        Raises NoRoom.
        """

    def dismiss(self, vm: str, index: int) -> None:
        """End the actor of host `index` and its reservation, as far as it has one of its own."""

    def indices(self, vm: str) -> list[int]:
        """The indices of the VM's hosts, in the order of `find`; 0 is the main host."""

    def alive(self, host: str) -> bool:
        """Whether the host of that name is there, as far as is known."""

    def driver_is_gone(self, driver: str) -> bool:
        """Whether the program that is the driver of that Ray job has ended. ClusterError."""

    def hosts_of(self, vm: str, indices: Sequence[int]) -> list[str]:
        """The hosts where these of the VM's are, as far as they are there."""

    def sweep(self, vm: str, host: str) -> None:
        """End what is left of the VM on a host, past its actor, which has ended. Repeatable.

        Another cluster's VM of that name stays.
        """

    def holders(self, manifest: str) -> dict[str, tuple[str, ...]]:
        """Live hosts that have parts of a checkpoint in their store: the parts, by host."""

    def look_around(self, vm: str, manifest: str, *, take_over: bool) -> Around:
        """All live hosts that answer: free memory, parts of the checkpoint, whose the name is.

        What the VM itself still holds counts as free: a restore gives it back first.
        """

    def flow_on(self, host: str, order: PlanOrder) -> Flow:
        """Pages per part and target, planned by a host that has the main host's part.

        Raises NoRoom, CheckpointCorrupt.
        """

    def visit(self, vm: str, host: str) -> Port:
        """The port of an agent that has but parts, on a host that is none of the VM's."""

    def leave(self, vm: str) -> None:
        """End all that `visit` began. Repeatable."""

    def release(self, vm: str) -> None:
        """End the actors and the reservation. Repeatable."""
