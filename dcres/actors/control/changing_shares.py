"""Changes of a VM's shares as a coordinator makes and plans them."""

from __future__ import annotations

from collections.abc import Callable

from dcres.actors.control.asking import describe
from dcres.actors.control.executor import Executor
from dcres.actors.control.replacing import Replacing, Reshaping, Shares
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.messages import Description, Foreseen
from dcres.actors.protocol import Presence
from dcres.config import VmSpec
from dcres.errors import Conflict, NotFound

Wanted = Callable[[VmSpec], Shares]  # what shares are to become, by what they are


class ChangingShares:
    """Changes of the shares of one VM."""

    def __init__(self, vm: VmHandle, unsettle: Callable[[], None]) -> None:
        self._vm, self._unsettle = vm, unsettle

    def run(self, wanted: Wanted, executor: Executor) -> None:
        """Change them; first, end what a change before could not undo. Raises what went wrong."""
        if not self._is_settled():
            self._vm.settle_shares(executor.journal)
        replacing = self._replacing(wanted)
        change, _ = replacing.check()
        hosts, error = Reshaping(replacing, change, executor, self._vm.concurrency).run()
        if not hosts:  # nobody knows which of them are the VM's
            self._unsettle()
        self._vm.know(hosts)
        if error is not None:
            raise error

    def foresee(self, wanted: Wanted) -> Foreseen:
        """What `run` would do. Raises Conflict where a change was left half-done."""
        if not self._is_settled():
            raise Conflict(
                f"the last change of shares of VM {self._vm.name} was not brought to an end; "
                "the next resize or drain begins with that"
            )
        return self._replacing(wanted).foresee()

    def without(self, host: str, spec: VmSpec) -> Shares:
        """As they are, but none for the sub host `host`. Raises NotFound."""
        shares = dict(zip(self._vm.hosts.subs, spec.layout.subs, strict=True))
        if host not in shares:
            raise NotFound(
                f"{host} is no sub host of VM {self._vm.name}; it has {', '.join(shares) or 'none'}"
            )
        return Shares(spec.layout.main, tuple({**shares, host: 0}.values()))

    def _is_settled(self) -> bool:
        main = describe(self._vm.main)
        return not main.reshaping and main.hosts == self._vm.names

    def _replacing(self, wanted: Wanted) -> Replacing:
        main = self._vm.main.call(Presence.describe)
        if main.moving:
            raise Conflict(
                f"VM {self._vm.name} is still being restored; wait until its pages are there"
            )
        spec = spec_of(main)
        vm, shares = self._vm, wanted(spec)
        return Replacing(vm.name, vm.fleet, spec, vm.hosts, shares, main.next_change)


def spec_of(main: Description) -> VmSpec:
    """The VM file that the main host knows. Raises NotFound."""
    if main.spec is None:
        raise NotFound(
            f"host {main.host} knows nothing of the VM; start it or restore a checkpoint"
        )
    return main.spec
