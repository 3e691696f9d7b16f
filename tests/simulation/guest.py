"""A VM in the simulation: its guest writes, pages move, and orders take time or end half-way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from dcres.errors import StoreFull
from dcres.model.run_state import RunState
from tests.simulation.clock import Killed, Simulated
from tests.support.world import World

_SECONDS = {  # the most that an order takes
    "serve": 8.0,
    "boot": 8.0,
    "run": 3.0,
    "plan": 2.0,
    "serve_parts": 2.0,
    "prepare": 0.5,
    "copy": 6.0,
    "stage": 1.0,
    "save": 4.0,
    "finish": 1.0,
    "publish": 6.0,
}
_WRITES_TO_THE_STORE = {"prepare", "copy", "stage", "save", "publish"}
_MOVES_PER_S = 20.0
_MOST_WRITES = 4


class SimulatedVm(World):
    """See the module. `dies` says whether an actor dies at a point that it has reached."""

    def __init__(self, vm: str, clock: Simulated, dies: Callable[[str], bool]) -> None:
        super().__init__()
        self.vm = vm
        self.clock = clock
        self.full = False  # the store
        self.maimed = False  # memory of a life was lost with a host
        self._dies = dies
        self._passed_s = 0.0

    def note(self, host: str, what: str) -> None:
        self.clock.require_process()
        self.clock.note(f"{self.vm} {host}.{what}")
        if self.full and what in _WRITES_TO_THE_STORE:
            raise StoreFull(f"no room in the store of {host}")

    def spend(self, host: str, what: str) -> None:
        name = what.split()[0]
        self.clock.sleep(self.clock.random.random() ** 2 * _SECONDS.get(name, 0.1))

    def reach(self, host: str, what: str) -> None:
        if self._dies(host):
            self.clock.note(f"{self.vm} {host}: its actor dies in {what}")
            raise Killed

    def utc(self) -> datetime:
        return self.clock.utc()

    def start_qemu(self, host: str) -> None:
        super().start_qemu(host)
        self.maimed = False

    def end(self, host: str) -> None:
        """What ends one of a VM's hosts takes it down; one that has left it has no page."""
        if self.memory.get(host) and self.qemus.keys() - {host}:
            if any(host in state["hosts"] for state in self.states.values()):
                self.maimed = True
                self.torn[host] = self.memory[host]
            else:
                self.wrong.append(f"{host} has left {self.vm} with pages")
        super().end(host)

    def lose(self, host: str) -> None:
        """The host is gone, with its memory and processes; the store is elsewhere."""
        self.maimed |= bool(self.memory.get(host)) or host in self.qemus
        self.end(host)
        self.forget(host)

    def pass_time(self) -> None:
        """Since the last look pages have come where they belong, and the guest has written."""
        seconds, self._passed_s = self.clock.now_s() - self._passed_s, self.clock.now_s()
        if seconds <= 0.0 or self.frozen or len(self.qemus) != 1:
            return
        ((main, state),) = self.qemus.items()
        for page in list(self.coming)[: int(seconds * _MOVES_PER_S) + 1]:
            self._bring(page, self.coming[page])
        if state is RunState.RUNNING and self.states.get(main, {}).get("running"):
            self._touch(main, min(_MOST_WRITES, int(seconds * 10) + 1))

    def _bring(self, page: int, host: str) -> None:
        there = any(page in pages for pages in self.memory.values())
        if host in self.memory and (there or self.serving_parts):
            del self.coming[page]
            self._place(page, host)

    def _touch(self, main: str, pages: int) -> None:
        """The guest writes to pages, which come for it; as many leave."""
        choose = self.clock.random.choice
        for page in [choose(sorted(self.guest)) for _ in range(pages) if self.guest]:
            if page in self.coming:
                self._bring(page, main)
            if any(page in there for there in self.memory.values()):
                self.write(page, main)
            elif page not in self.coming and not self.maimed:
                self.wrong.append(f"page {page} of {self.vm} is nowhere")
        subs = [each for each in self.states[main]["hosts"][1:] if self.capacities.get(each)]
        subs = [each for each in subs if each in self.serving]
        if subs and len(self.memory[main]) > len(self.guest) // 3:
            self._place(choose(sorted(self.memory[main])), choose(subs))
