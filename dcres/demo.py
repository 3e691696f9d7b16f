"""The main job from one command: a VM over three hosts, lost and brought back.

Nothing here is played: Linux boots in stock QEMU, its witness fills memory that is mostly on
other hosts, a main host and a sub host are destroyed with all they had, and the witness goes
on from the checkpoint, on three hosts and then on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dcres.actors.ray.local_cluster import LocalCluster
from dcres.api.cluster import Cluster, local_cluster
from dcres.api.operation import OperationProgress
from dcres.api.status import VmStatus
from dcres.api.vm import Checkpoint, Vm, read_from
from dcres.config import Accel, default_cache, default_home, format_size
from dcres.errors import ClusterError, ConfigError, VmError, VmLost
from dcres.model.pages import PAGE_SIZE
from dcres.vm import accel, guest, witness
from dcres.vm.witness import WitnessReport

NAME = "demo"
LEAST_MEMORY_BYTES = 512 << 20
_FILL = 0.6  # of the guest's memory; its kernel and what it boots from take a fifth more
_CHUNK_BYTES = 4 << 20  # of the witness's files
_CHECKS = 25  # that the guest passes before the checkpoint
_ROUND_TIMEOUT_S = 20.0  # a slow machine need not check every file after a restore
_SILENCE_TIMEOUT_S = 60.0  # without any progress of the guest
_HOST_LOSS_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 0.4
_TICK = "WITNESS tick="


class Stage(Protocol):
    """Where the demonstration is shown while it runs."""

    def begin(self, step: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """What is being waited for, and how it stands."""

    def end(self, step: Step) -> None:
        """The step is done."""


@dataclass(slots=True)
class Step:
    """One step: how long it took, and where the VM's pages are at its end."""

    step: str
    began: float  # on the monotonic clock
    seconds: float = 0.0
    detail: str = ""
    hosts: list[dict[str, Any]] = field(default_factory=list)
    pages_in_per_s: float | None = None
    pages_out_per_s: float | None = None
    page_in_median_us: float | None = None
    guest: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what was not measured is left out."""
        names = ("step", "seconds", "detail", "hosts", "pages_in_per_s", "pages_out_per_s")
        values = {name: getattr(self, name) for name in (*names, "page_in_median_us", "guest")}
        return {name: value for name, value in values.items() if value not in (None, "", [])}


@dataclass(frozen=True, slots=True)
class Life:
    """The witness's console from a start or restore on.

    `first` is its first report there; the line that a checkpoint cut in two is not one.
    """

    first: WitnessReport
    last: WitnessReport

    @classmethod
    def of(cls, console: str) -> Life:
        """From the console's whole text."""
        end = console.find("\n", console.find(_TICK)) + 1
        return cls(witness.parse(console[:end]), witness.parse(console))

    @property
    def checks(self) -> int:
        """Checks that the guest made in this life, as far as it told."""
        return self.last.checks - self.first.checks + 1 if self.last.tick else 0

    @property
    def ticks(self) -> int:
        """Reports in this life; as many as there are files mean that each was checked."""
        return self.last.tick - self.first.tick + 1 if self.last.tick else 0


@dataclass(slots=True)
class Story:
    """All that happened, and whether it went well."""

    accel: str
    accel_why: str
    memory_bytes: int
    steps: list[Step] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    restores: list[dict[str, Any]] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    home: Path | None = None  # of the cluster, where it was kept

    @property
    def checks(self) -> int:
        """The guest's own checks of its memory, in all lives."""
        return sum(life.checks for life in self.lives)

    @property
    def failures(self) -> int:
        """Checks that failed."""
        return sum(life.last.failures for life in self.lives)

    @property
    def ticks_lost(self) -> int:
        """Ticks that should have come, and did not, within a life or between two."""
        inside = sum(life.last.ticks_lost for life in self.lives)
        if not self.lives:
            return inside
        origin, *restored = self.lives
        # The first life went on after the checkpoint, so it knows a tick at or beyond it.
        return inside + sum(max(each.first.tick - origin.last.tick - 1, 0) for each in restored)

    @property
    def good(self) -> bool:
        """Whether the guest saw nothing wrong, and we neither."""
        return not self.problems and not self.failures and not self.ticks_lost

    def to_dict(self) -> dict[str, Any]:
        """What ``dcres demo --json`` prints."""
        return {
            "accel": self.accel,
            "memory_bytes": self.memory_bytes,
            "steps": [step.to_dict() for step in self.steps],
            "checkpoints": self.checkpoints,
            "restores": self.restores,
            "guest": {
                "checks": self.checks,
                "failures": self.failures,
                "ticks_lost": self.ticks_lost,
            },
            "problems": self.problems,
        }


def layout_for(memory_bytes: int) -> dict[str, Any]:
    """Half of the memory on the main host, a quarter on each of two sub hosts."""
    quarter = memory_bytes // 4 // PAGE_SIZE * PAGE_SIZE
    return {"main": memory_bytes - 2 * quarter, "subs": [quarter, quarter]}


def run(stage: Stage, memory_bytes: int = LEAST_MEMORY_BYTES, keep: bool = False) -> Story:
    """The whole demonstration. Raises DcresError when something cannot be done at all."""
    if memory_bytes < LEAST_MEMORY_BYTES:
        raise ConfigError(
            f"the demonstration needs at least {format_size(LEAST_MEMORY_BYTES)} of memory, "
            f"not {format_size(memory_bytes)}"
        )
    stage.begin("prepare the guest")
    began = time.monotonic()
    image = guest.prepare(default_home() / "guest")
    chosen, why = accel.choose(Accel.AUTO, image.kernel, default_cache())
    story = Story(str(chosen), why, memory_bytes)
    seconds = time.monotonic() - began
    prepared = Step("prepare the guest", began, seconds, f"Linux under {chosen.upper()}")
    story.steps.append(prepared)
    stage.end(prepared)
    fill_bytes = int(memory_bytes * _FILL) // _CHUNK_BYTES * _CHUNK_BYTES
    spec = {
        "name": NAME,
        "memory": memory_bytes,
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 witness={fill_bytes >> 20}",
        "accel": str(chosen),
        "layout": layout_for(memory_bytes),
    }
    _Play(stage, story, spec, fill_bytes).whole(keep)
    return story


class _Play:
    """The acts, one after the other; what happens is written into the story."""

    def __init__(self, stage: Stage, story: Story, spec: dict[str, Any], fill_bytes: int) -> None:
        self._stage = stage
        self._story = story
        self._spec = spec
        self._fill_bytes = fill_bytes

    def whole(self, keep: bool) -> None:
        memory, ending = self._story.memory_bytes, None
        starting = self._begin("start three hosts")
        with local_cluster(3, memory=memory, keep=keep) as cluster:
            self._end(starting)
            self._acts(cluster, _local(cluster))
            if keep:
                self._story.home = _local(cluster).home
            else:
                ending = self._begin("end everything")
        if ending is not None:
            self._end(ending)

    def _acts(self, cluster: Cluster, local: LocalCluster) -> None:
        vm = self._start(cluster)
        self._see(vm, "boot and fill memory", _checks(0))
        before = self._see(vm, "check memory under paging", _checks(_CHECKS))
        checkpoint = self._checkpoint(vm)
        name = "go on after it"
        self._story.lives.append(self._see(vm, name, _checks(before.last.checks + 2)))
        self._lose_hosts(cluster, local, vm)
        self._replace_hosts(local)
        vm = self._restore(checkpoint, single=False)
        self._witness_goes_on(vm, "go on from the checkpoint", before.last)
        self._kill(vm)
        vm = self._restore(checkpoint, single=True)
        self._witness_goes_on(vm, "go on, on one host", before.last)

    def _begin(self, name: str) -> Step:
        self._stage.begin(name)
        return Step(name, time.monotonic())

    def _end(self, step: Step, detail: str = "") -> None:
        step.seconds = time.monotonic() - step.began
        step.detail = step.detail or detail
        self._story.steps.append(step)
        self._stage.end(step)

    def _start(self, cluster: Cluster) -> Vm:
        step = self._begin("start the VM")
        vm = cluster.start(self._spec, progress=False)
        layout = self._spec["layout"]
        shares = "/".join(format_size(share) for share in (layout["main"], *layout["subs"]))
        self._end(step, f"{format_size(self._story.memory_bytes)} over {shares}")
        return vm

    def _checkpoint(self, vm: Vm) -> Checkpoint:
        step = self._begin("checkpoint")
        checkpoint = vm.checkpoint(progress=self._note_progress)
        facts = checkpoint.facts
        self._story.checkpoints.append(facts)
        step.hosts = _places(facts["hosts"])
        down = f"the guest was paused for {facts['downtime_seconds']:.2f} s"
        self._end(
            step, f"{format_size(facts['pages'] * PAGE_SIZE)} saved by all hosts at once; {down}"
        )
        return checkpoint

    def _lose_hosts(self, cluster: Cluster, local: LocalCluster, vm: Vm) -> None:
        main, sub = (host.host for host in vm.status().hosts[:2])
        step = self._begin(f"lose main {main} and sub {sub}")
        for host in (main, sub):
            local.kill_host(host)
        self._stage.note("Ray notices")
        deadline = time.monotonic() + _HOST_LOSS_TIMEOUT_S
        while {host.name for host in cluster.hosts() if host.alive} & {main, sub}:
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray does not notice that {main} and {sub} are gone; try again")
            time.sleep(_LOOK_EVERY_S)
        self._end(step, "processes and memory are gone")

    def _replace_hosts(self, local: LocalCluster) -> None:
        step = self._begin("add two hosts")
        self._end(step, ", ".join(local.add_hosts(2)))

    def _restore(self, checkpoint: Checkpoint, *, single: bool) -> Vm:
        step = self._begin("restore on one host" if single else "restore on three hosts")
        where = None if single else 3
        vm = checkpoint.restore(single=single, hosts=where, progress=self._note_progress)
        self._story.restores.append(vm.facts)
        step.hosts = _places(vm.facts["layout"])
        self._end(step, f"the guest runs after {vm.facts['seconds']:.1f} s")
        return vm

    def _kill(self, vm: Vm) -> None:
        step = self._begin("kill the VM")
        vm.kill()
        self._end(step)

    def _note_progress(self, progress: OperationProgress) -> None:
        done, total = format_size(progress.done_bytes), format_size(progress.total_bytes)
        self._stage.note(f"{progress.phase}, {done} of {total}")

    def _witness_goes_on(self, vm: Vm, name: str, before: WitnessReport) -> None:
        """Watch a restored guest; it must come after `before`, and must not have rebooted."""
        files, until = self._fill_bytes // _CHUNK_BYTES, time.monotonic() + _ROUND_TIMEOUT_S

        def whole_round(life: Life) -> bool:
            late = time.monotonic() > until and life.checks >= _CHECKS
            return late or life.ticks >= files

        step, life = self._watch(vm, name, whole_round)
        self._story.lives.append(life)
        checked = min(life.ticks * _CHUNK_BYTES, self._fill_bytes)
        self._end(step, f"it checked {format_size(checked)} of {format_size(self._fill_bytes)}")
        if life.last.boots:
            self._story.problems.append(f"the guest booted again instead of going on ({name})")
        if life.first.tick <= before.tick:
            self._story.problems.append(
                f"the guest went on at tick {life.first.tick}, before the checkpoint was "
                f"begun at tick {before.tick} ({name})"
            )

    def _see(self, vm: Vm, name: str, enough: Callable[[Life], bool]) -> Life:
        """A step of its own: `_watch`."""
        step, life = self._watch(vm, name, enough)
        self._end(step)
        return life

    def _watch(self, vm: Vm, name: str, enough: Callable[[Life], bool]) -> tuple[Step, Life]:
        """Wait until the witness has told enough. Raises VmLost, VmError when it falls silent."""
        step, patience = self._begin(name), _Patience()
        first = status = vm.status()
        while True:
            console = _console(status)
            life = Life.of(console)
            if enough(life):
                break
            patience.require((life.last.tick, status.pages, len(console)), console)
            self._stage.note(_news(life.last, status))
            time.sleep(_LOOK_EVERY_S)
            status = vm.status()
        self._measure(step, first, status, life.last)
        return step, life

    def _measure(self, step: Step, first: VmStatus, last: VmStatus, report: WitnessReport) -> None:
        seconds = max(time.monotonic() - step.began, 0.001)
        step.hosts = [{"host": h.host, "role": h.role, "pages": h.pages} for h in last.hosts]
        main, before = last.hosts[0], first.hosts[0]
        step.pages_in_per_s = (main.pages_in - before.pages_in) / seconds
        step.pages_out_per_s = (main.pages_out - before.pages_out) / seconds
        step.page_in_median_us = main.page_in_median_us or None
        step.guest = {
            "tick": report.tick,
            "checks": report.checks,
            "failures": report.failures,
        }


class _Patience:
    """Ends when nothing at all has changed for too long."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = time.monotonic()

    def require(self, seen: object, console: str) -> None:
        """VmError when `seen` is what it was for too long."""
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since > _SILENCE_TIMEOUT_S:
            words = " / ".join(console.strip().splitlines()[-3:]) or "nothing"
            raise VmError(
                f"the guest has been silent for {_SILENCE_TIMEOUT_S:.0f} s; its last words: {words}"
            )


def _local(cluster: Cluster) -> LocalCluster:
    if cluster.local is None:
        raise ClusterError("the demonstration needs a cluster on this machine")
    return cluster.local


def _checks(number: int) -> Callable[[Life], bool]:
    return lambda life: life.last.ready and life.last.checks >= number


def _console(status: VmStatus) -> str:
    if not status.answers:
        raise VmLost(f"VM {status.vm} is {status.phase}: {status.why}")
    return read_from(Path(status.console), 0).decode(errors="replace")


def _news(report: WitnessReport, status: VmStatus) -> str:
    if not report.tick:
        return f"{format_size(status.pages * PAGE_SIZE)} in use"
    return f"tick {report.tick}: {report.checks} checks, {report.failures} failures"


def _places(hosts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: host[name] for name in ("host", "role", "pages")} for host in hosts]
