"""Hosts on this machine that are as far apart as machines: each with a link and a disk of its own.

::

    ┌ this process, head node ┐
    │        uplink           │
    └──────────┬──────────────┘
    ┌ namespace …-switch ─────┴───────────────────────────┐
    │ bridge ──── port-h0               port-h1           │
    └───────────────│ 1 Gbit each way ─────│──────────────┘
    ┌ namespace …-h0 ┐              ┌ namespace …-h1 ┐
    │ Ray node, QEMU │              │ Ray node, …    │
    └ disk group h0 ─┘              └ disk group h1 ─┘

A host's Ray node is started in its network namespace and its control group, and with it all that
ever runs there. The control groups limit every host to its own rate of the one disk below; what is
measured is written and read with O_DIRECT, since version 1 of control groups does not see buffered
writes (`dcres.linux.cgroup`). The switch is a namespace, too, so that no firewall rule or address
of this machine matters; addresses are from 198.18.0.0/15, which RFC 2544 sets aside for benchmarks.

Processors and memory are shared by all hosts.
"""

from __future__ import annotations

import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_home import HOST_FIELD
from dcres.actors.ray.local_node import Places
from dcres.bench.apart import apart
from dcres.bench.move import ONE_GBIT, Place, plain_copy, require_iproute, run_command
from dcres.bench.result import Row
from dcres.errors import UnsupportedHost
from dcres.linux.cgroup import DiskGroup, disk_group, disk_under

MIB = 1 << 20
_PROBE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Hosts:
    """Hosts h0, h1, … as `slow_hosts` made them; nothing runs on them yet."""

    folder: Path  # on the disk that is limited
    token: str
    network: str  # the first three numbers of its /24
    groups: dict[str, DiskGroup]

    @property
    def places(self) -> Places:
        """For `LocalCluster.start`."""
        name = f"dcres-{self.token}-{HOST_FIELD}"  # of control groups and namespaces alike
        entrance = next(iter(self.groups.values())).entrance
        return Places(
            self.network, _launcher(entrance.parent.with_name(name) / entrance.name, name)
        )

    def argv(self, host: str, *argv: str) -> list[str]:
        """A command that runs `argv` on `host`."""
        launcher = (word.replace(HOST_FIELD, host) for word in self.places.launcher)
        return [*launcher, *argv]

    def program(self, host: str, name: str) -> Path:
        """A program that is `name`, run on `host`."""
        script = self.folder / f"{name}-{host}"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(self.argv(host, name))} "$@"\n')
        script.chmod(0o755)
        return script

    def place(self, host: str) -> Place:
        """The host's address and namespace."""
        number = int(host.removeprefix("h"))
        return Place(f"{self.network}.{10 + number}", f"dcres-{self.token}-{host}")

    def limit(self, mb_per_s: int | None) -> None:
        """From now on every host's disk reads, and writes, so fast; None: without limit.

        The kernel lets each begin up to a tenth of a second ahead of that.
        """
        for group in self.groups.values():
            group.limit(None if mb_per_s is None else mb_per_s * 1_000_000)

    def rates(self, at: int) -> list[Row]:
        """What disks and links really do now: every host's disk at once, then a plain copy."""
        with ThreadPoolExecutor(len(self.groups)) as pool:
            seconds = list(pool.map(self._seconds_to_write, self.groups))
        disk = _PROBE_BYTES / 1e6 / max(seconds)
        one, other = list(self.groups)[:2]
        link = plain_copy(self.place(one), self.place(other), _PROBE_BYTES, "link", at)
        return [Row("disk_of_a_host", at, disk, "MB/s"), link]

    def _seconds_to_write(self, host: str) -> float:
        """For `_PROBE_BYTES`, once the start that the kernel gives is used up."""
        self._write(host)
        started = time.perf_counter()
        self._write(host)
        return time.perf_counter() - started

    def _write(self, host: str) -> None:
        probe = self.folder / f"probe-{host}"
        blocks = f"count={_PROBE_BYTES // (4 * MIB)} bs=4M oflag=direct conv=fsync status=none"
        run_command(*self.argv(host, "dd", "if=/dev/zero", f"of={probe}", *blocks.split()))
        probe.unlink()


def _launcher(entrance: Path, namespace: str) -> tuple[str, ...]:
    """Enters a control group and a network namespace, and then becomes what follows."""
    join = 'echo 0 >"$0" && exec "$@"'
    return "sh", "-c", join, str(entrance), "nsenter", f"--net=/run/netns/{namespace}", "--"


@contextmanager
def slow_hosts(folder: Path, hosts: int) -> Iterator[Hosts]:
    """`hosts` hosts with a link of 1 Gbit each and, once `Hosts.limit` was called, a slow disk.

    All of it is gone afterwards, and so is every process that is still on one of them. Raises
    UnsupportedHost where namespaces, tc(8) or control groups cannot be had.
    """
    require_iproute()
    token, disk = secrets.token_hex(3), disk_under(folder)
    third = secrets.randbelow(512)
    network = f"198.{18 + third // 256}.{third % 256}"
    names = [f"h{number}" for number in range(hosts)]
    with ExitStack() as made:
        groups = {
            name: made.enter_context(disk_group(f"dcres-{token}-{name}", disk)) for name in names
        }
        _switch(made, token, network)
        found = Hosts(folder, token, network, groups)
        for name in names:
            _plug_in(made, found.place(name), name, f"dcres-{token}-switch")
        yield found


def _ip(words: str) -> None:
    run_command("ip", *words.split())


def _namespace(made: ExitStack, name: str) -> None:
    """What is in a namespace goes with it, and so does the other end of every veth."""
    _ip(f"netns add {name}")
    made.callback(_ip, f"netns delete {name}")


def _switch(made: ExitStack, token: str, network: str) -> None:
    """A bridge in a namespace of its own, and this process's namespace plugged into it."""
    switch, uplink = f"dcres-{token}-switch", f"dcres-{token}"
    _require_unused(network)
    _namespace(made, switch)
    _ip(f"-n {switch} link add bridge type bridge")
    _ip(f"link add {uplink} type veth peer uplink netns {switch}")
    made.callback(_remove_link, uplink)
    _ip(f"-n {switch} link set uplink master bridge up")
    _ip(f"-n {switch} link set bridge up")
    _ip(f"address add {network}.1/24 dev {uplink}")
    _ip(f"link set {uplink} up")


def _require_unused(network: str) -> None:
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    if f"{network}.0/24" in routes:
        raise UnsupportedHost(f"the network {network}.0/24 is in use here; run it once more")


def _remove_link(name: str) -> None:
    """At once: a deleted namespace takes its links along only when the kernel gets to it."""
    _ip(f"link delete {name}")


def _plug_in(made: ExitStack, place: Place, name: str, switch: str) -> None:
    namespace = str(place.namespace)
    _namespace(made, namespace)
    _ip(f"-n {namespace} link set lo up")
    _ip(f"-n {namespace} link add eth0 type veth peer port-{name} netns {switch}")
    _ip(f"-n {namespace} address add {place.address}/24 dev eth0")
    _ip(f"-n {namespace} link set eth0 up")
    _ip(f"-n {switch} link set port-{name} master bridge up")
    for where, link in ((namespace, "eth0"), (switch, f"port-{name}")):
        run_command("tc", *f"-n {where} qdisc add dev {link} root {ONE_GBIT}".split())


@contextmanager
def slow_cluster(
    folder: Path, hosts: int, memory_per_host: int
) -> Iterator[tuple[Hosts, LocalCluster]]:
    """Such hosts and a cluster on them, with a store for each host; this process is connected."""
    with (
        slow_hosts(folder, hosts) as found,
        apart(folder / "c", hosts, memory_per_host, found.places) as cluster,
    ):
        yield found, cluster
