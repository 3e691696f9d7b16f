"""Copies of checkpoints, as commands make them; the hosts are played by folders."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dcres.actors.ray import gateway
from dcres.api import bringing_copies, catalogue, copying
from dcres.api.beside import Beside, Work, WorkHere
from dcres.api.bringing_copies import Stored, targets_of
from dcres.api.catalogue import StoreHere, StoresOfHosts
from dcres.api.operation import OperationProgress
from dcres.cli import main
from dcres.errors import ActorGone, ConfigError, NotFound, OperationFailed, StorageError
from dcres.linux.interrupt import OperationInterrupted
from dcres.model.formats import MemoryFormat
from dcres.model.rate import bytes_per_s
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import copy_url, download, upload
from dcres.storage.store.objects import Objects
from dcres.storage.store.pieces import Pace, PartCopied, Stopped, Worker
from dcres.storage.store.store import Store
from tests.support.stored import HOSTS, PAGE_COUNT, folder, memory, take

NOBODY: tuple[str, ...] = ()


def taken(store: Store, folder: Path) -> Manifest:
    ram = memory(folder / "ram", np.ones(PAGE_COUNT, dtype=bool))
    manifest = take(store, ram, memory_format=MemoryFormat.PACKED)
    store.publish(manifest)
    return manifest


@pytest.fixture
def place(tmp_path: Path) -> str:
    (tmp_path / "copies").mkdir()
    return f"file://{tmp_path}/copies"


# Hosts with stores of their own


class Hosts:
    """A store for each; what runs "on a host" finds that host's. Those of `gone` are dead."""

    def __init__(self, folder: Path) -> None:
        self.stores = {host: Store(folder / host) for host in (*HOSTS, "h3")}
        self.gone = {"h3"}
        self.sent: list[str] = []
        self._here = threading.local()

    @property
    def here(self) -> Store:
        return self.stores[self._here.host]

    def alive(self) -> list[str]:
        return [host for host in self.stores if host not in self.gone]

    def infos(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=host, alive=host not in self.gone) for host in self.stores]

    def run_on(
        self, host: str, function: Callable[..., Any], *args: Any, timeout_s: float = 0
    ) -> Any:
        if host in self.gone:
            raise ActorGone(f"{host} has died")
        self._here.host = host
        return function(*args)

    def stream(
        self, host: str, function: Callable[..., Iterator[Any]], *args: Any, timeout_s: float
    ) -> Work[Any]:
        def each() -> Iterator[Any]:
            self._here.host = host
            self.sent.append(host)
            yield from function(*args)

        return WorkHere(each())

    def share_out(self, manifest: Manifest) -> None:
        """Each host keeps its own part, and the main host the manifest."""
        whole = folder(self.stores["h0"], manifest)
        for host in HOSTS[1:]:
            mine = folder(self.stores[host], manifest)
            mine.mkdir(parents=True)
            shutil.move(whole / host, mine / host)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    made = Hosts(tmp_path / "disks")
    monkeypatch.setattr(catalogue, "_alive", made.alive)
    monkeypatch.setattr(catalogue, "_store", lambda: made.here)
    monkeypatch.setattr(bringing_copies, "_root", lambda: made.here.root)
    monkeypatch.setattr(gateway, "hosts", made.infos)
    monkeypatch.setattr(gateway, "run_on", made.run_on)
    monkeypatch.setattr(gateway, "run_apart", made.run_on)
    monkeypatch.setattr(gateway, "stream_apart", made.stream)
    return made


@pytest.fixture
def apart(hosts: Hosts, tmp_path: Path) -> Manifest:
    manifest = taken(hosts.stores["h0"], tmp_path)
    hosts.share_out(manifest)
    return manifest


def copied(manifest: Manifest, place: str) -> copying.Copied:
    return copying.copy(StoresOfHosts(), manifest.checkpoint, place, progress=False)


def brought(
    manifest: Manifest, place: str, wanted: tuple[str, ...] = NOBODY
) -> dict[str, PartCopied]:
    found, parts = bringing_copies.bring(manifest.checkpoint, place, wanted, progress=False)
    assert found == manifest
    return {part.host: part for part in parts}


def test_each_host_sends_its_own_part(hosts: Hosts, apart: Manifest, place: str) -> None:
    done = copied(apart, place)
    assert sorted(hosts.sent) == list(HOSTS)
    assert [part.host for part in done.parts] == list(HOSTS)
    (known,) = copying.known_copies(StoresOfHosts(), apart.checkpoint)
    assert (known.url, known.state) == (place, "whole")


def test_a_part_that_is_nowhere_is_told_before(
    hosts: Hosts, apart: Manifest, place: str, tmp_path: Path
) -> None:
    shutil.rmtree(hosts.stores["h2"].root)
    with pytest.raises(NotFound, match="on h2 is not to be found"):
        copied(apart, place)
    assert not list((tmp_path / "copies").iterdir())


@pytest.mark.parametrize("lost", [["h0"], ["h1"], [*HOSTS]])
def test_lost_disks_are_filled_again(
    hosts: Hosts, apart: Manifest, place: str, lost: list[str]
) -> None:
    copied(apart, place)
    for host in lost:
        shutil.rmtree(hosts.stores[host].root)
    parts = brought(apart, place)
    assert {host for host, part in parts.items() if part.sent_bytes} == set(lost)
    assert StoresOfHosts().verify(apart.checkpoint).ok
    assert hosts.stores["h0"].is_published(apart.checkpoint)
    for host in HOSTS:
        assert hosts.stores[host].parts_here(apart) == (host,)


def test_lost_hosts_are_replaced(hosts: Hosts, apart: Manifest, place: str) -> None:
    """Their parts go to others, and the manifest to the store with the main host's."""
    copied(apart, place)
    hosts.gone = {"h0", "h1"}
    brought(apart, place, ("h3",))
    assert hosts.stores["h3"].parts_here(apart) == ("h0", "h1")
    assert hosts.stores["h3"].is_published(apart.checkpoint)
    assert not StoresOfHosts().lacking(apart)
    assert StoresOfHosts().verify(apart.checkpoint).ok
    hosts.sent.clear()
    again = brought(apart, place, ("h3",))
    assert all(part.sent_bytes == 0 for part in again.values())


def test_what_is_damaged_on_a_host_is_replaced(hosts: Hosts, apart: Manifest, place: str) -> None:
    copied(apart, place)
    path = folder(hosts.stores["h1"], apart) / "h1" / "memory.pack"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    parts = brought(apart, place)
    assert [host for host, part in parts.items() if part.sent_bytes] == ["h1"]
    assert StoresOfHosts().verify(apart.checkpoint).ok


def test_one_host_that_fails_ends_no_other(
    hosts: Hosts, apart: Manifest, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(apart, place)
    for host in HOSTS:
        shutil.rmtree(hosts.stores[host].root)
    receive = download.receive_part

    def failing(root: Path, manifest: Manifest, host: str, url: Any) -> Iterator[PartCopied]:
        if host == "h1":
            raise StorageError("its disk is broken")
        yield from receive(root, manifest, host, url)

    monkeypatch.setattr(download, "receive_part", failing)
    with pytest.raises(OperationFailed, match="h1: its disk is broken") as told:
        brought(apart, place)
    assert list(told.value.failures) == ["h1"]
    assert hosts.stores["h2"].parts_here(apart) == ("h2",)
    assert not hosts.stores["h0"].is_published(apart.checkpoint)


def test_where_parts_go(hosts: Hosts, apart: Manifest) -> None:
    shared = {host: Stored("one", ("h0", "h1")) for host in HOSTS}
    assert targets_of(apart, shared, list(HOSTS)) == {each: (each, each) for each in HOSTS}
    twice = {"h0": Stored("a", ("h0",)), "h1": Stored("b", ()), "h3": Stored("c", ("h0", "h2"))}
    assert targets_of(apart, twice, ["h0", "h3"]) == {
        "h0": ("h0", "h0"),
        "h0 on h3": ("h3", "h0"),
        "h1 on h0": ("h0", "h1"),
        "h2 on h3": ("h3", "h2"),
    }


# Commands


def test_commands_about_copies(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store")
    checkpoint = taken(store, tmp_path).checkpoint
    here = ("--store", str(store.root), "--json")

    def answer(*arguments: str, status: int = 0) -> Any:
        assert main(arguments) == status
        return json.loads(capsys.readouterr().out)

    assert answer("copies", checkpoint, *here)["copies"] == []
    first = answer("copy", checkpoint, "--to", place, "--rate", "1GB/s", *here)
    assert [host["host"] for host in first["hosts"]] == list(HOSTS)
    assert (first["to"], first["bytes_there"]) == (place, 0)
    again = answer("copy", checkpoint, "--to", place, *here)
    assert (again["bytes_sent"], again["bytes_there"]) == (0, first["bytes_sent"])
    (known,) = answer("copies", checkpoint, *here)["copies"]
    assert (known["url"], known["state"]) == (place, "whole")
    shutil.rmtree(store.root)
    (listed,) = answer("checkpoints", "--from", place, "--json")["checkpoints"]
    assert listed["checkpoint"] == checkpoint
    (found,) = answer("copies", checkpoint, "--from", place, "--json")["copies"]
    assert found["state"] == "whole"
    shutil.rmtree(tmp_path / "copies" / "demo" / checkpoint / "h1" / "memory.pack")
    (found,) = answer("copies", checkpoint, "--from", place, "--json", status=1)["copies"]
    assert found["state"] == "incomplete"
    gone = answer("copies", "demo-20260101-000000-ffff", "--from", place, "--json", status=2)
    assert "there is no copy of" in gone["message"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("copy", "--to", "s3://b:1/x"), "endpoint_override"),
        (("copy", "--to", "file://TMP/none"), "there is no folder file:///"),
        (("copy", "--to", "file://TMP", "--rate", "fast"), "is no rate"),
        (("restore", "--from", "file:///", "--dry-run"), "leave one out"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, arguments: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store")
    checkpoint = taken(store, tmp_path).checkpoint
    command, *rest = (each.replace("TMP", str(tmp_path)) for each in arguments)
    assert main([command, checkpoint, *rest, "--store", str(store.root)]) == 2
    assert why in capsys.readouterr().err


def test_a_copy_is_shown(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "store")
    checkpoint = taken(store, tmp_path).checkpoint
    assert main(["copy", checkpoint, "--to", place, "--store", str(store.root)]) == 0
    shown = capsys.readouterr().out
    assert f"{checkpoint}  at {place}, in" in shown
    assert all(host in shown for host in HOSTS)
    assert main(["copies", checkpoint, "--store", str(store.root)]) == 0
    assert "whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        (None, None),
        ("100MB/s", 1e8),
        ("12 MiB/s", 12 * 1024.0**2),
        ("1.5k", 1500.0),
        (4096, 4096.0),
        ("7B/s", 7.0),
    ],
)
def test_rates(text: str | int | None, rate: float | None) -> None:
    assert bytes_per_s(text) == rate


@pytest.mark.parametrize("text", ["", "0", "-1", "fast", "1 furlong", "100Mbit/s", True])
def test_what_is_no_rate(text: Any) -> None:
    with pytest.raises(ConfigError, match="100MB/s"):
        bytes_per_s(text)


# Watching, pacing, and ending before the end


def test_one_machine_that_sends_all_parts_shares_its_rate(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, limits, send = Store(tmp_path / "store"), list[float](), upload.send_part

    def sending(store: Store, manifest: Manifest, host: str, url: Any, limit: float) -> Any:
        limits.append(limit)
        return send(store, manifest, host, url)

    monkeypatch.setattr(upload, "send_part", sending)
    checkpoint = taken(store, tmp_path).checkpoint
    copying.copy(StoreHere(store.root), checkpoint, place, "3MB/s", progress=False)
    assert limits == [1e6, 1e6, 1e6]


def test_progress_is_told(tmp_path: Path, place: str) -> None:
    store, told = Store(tmp_path / "store"), list[OperationProgress]()
    manifest = taken(store, tmp_path)
    copying.copy(StoreHere(store.root), manifest.checkpoint, place, "40kB/s", told.append)
    assert {host.host for each in told for host in each.hosts} == set(HOSTS)
    last = told[-1]
    assert (last.vm, last.phase) == ("demo", "copying")
    assert 0 < last.done_bytes <= last.total_bytes


def test_an_interrupt_ends_all_and_says_that_it_can_be_repeated() -> None:
    ended: list[str] = []

    def work(name: str) -> Iterator[PartCopied]:
        try:
            while True:
                yield PartCopied(name, total_bytes=1)
        finally:
            ended.append(name)

    def interrupt(progress: OperationProgress) -> None:
        if len(progress.hosts) == 2:
            raise KeyboardInterrupt

    begin = {name: partial(WorkHere, work(name)) for name in "ab"}
    with pytest.raises(OperationInterrupted, match="repeated it goes on"):
        Beside[PartCopied]("copy", "demo", "copying").run(begin, interrupt)
    assert sorted(ended) == ["a", "b"]


def test_a_pace_lets_so_many_bytes_through() -> None:
    began, pace = time.monotonic(), Pace(1000.0)
    for _ in range(3):
        pace.take(50)
    assert time.monotonic() - began >= 0.1, "the first went at once, and two had to wait"
    pace.take(3_600_000)
    pace.stop()
    with pytest.raises(Stopped):  # and not in an hour
        pace.take(1)


def test_work_that_is_ended_does_not_do_the_rest() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        done.append(number)

    steps = Worker(work, range(10_000_000), lambda: done.append(-1)).run()
    next(steps)
    steps.close()
    count = len(done)
    assert -1 in done
    assert 0 < count < 10_000_000
    assert len(done) == count, "nothing is under way any more"


def test_what_an_object_store_says_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    url = copy_url.parse("s3://AKIAUSER:very%2Fsecret@bucket/x?region=r&endpoint_override=h:1")
    objects = Objects(url)

    def fail(path: str) -> None:
        raise OSError(f"the key AKIAUSER with very/secret is not known at {url.whole}.")

    monkeypatch.setattr(objects, "_fs", SimpleNamespace(get_file_info=fail))
    with pytest.raises(StorageError, match=r"is not known at ….*then repeat the command") as told:
        objects.length("demo/x")
    assert "s3://bucket/x/demo/x" in str(told.value)
    assert "AKIA" not in str(told.value)
    assert "secret" not in str(told.value)


def test_a_url_of_secrets_is_shown_without_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    checkpoint = taken(store, tmp_path).checkpoint
    to = "s3://AKIAUSER:very%2Fsecret@bucket/x?wrong=hidden"
    with pytest.raises(ConfigError, match="s3://bucket/x cannot be the place of copies") as told:
        copying.copy(StoreHere(store.root), checkpoint, to, progress=False)
    assert not any(word in str(told.value) for word in ("AKIA", "secret", "hidden"))
    assert copy_url.parse(to).whole == to
