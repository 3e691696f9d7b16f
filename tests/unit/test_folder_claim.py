"""Whose a VM's folders on a host are, for two clusters that have them in common."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcres.actors.host.agent import HostAgent
from dcres.actors.host.folder_claim import FolderClaim
from dcres.actors.host.presence import MainPresence, SubPresence
from dcres.actors.host.vm_folder import VmFolder, marker
from dcres.actors.messages import Role
from dcres.actors.protocol import Presence
from dcres.actors.ray.fleet import end_what_is_left
from dcres.config import HostSettings
from dcres.errors import Conflict
from dcres.linux.holding import hold, is_held
from dcres.linux.marks import MARK, Mark
from dcres.linux.process import ProcessId, spawn_detached


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostSettings:
    run, ram, store = (tmp_path / name for name in ("run", "ram", "store"))
    made = HostSettings(name="h0", run=run, ram=ram, store=store)
    for key, value in made.environ().items():
        monkeypatch.setenv(key, value)
    return made


def host(role: Role, settings: HostSettings, cluster: str) -> Presence:
    agent = HostAgent("vm", role, cluster=cluster, environ=settings.environ())
    return agent.composed.presence


def main_host(settings: HostSettings, cluster: str) -> Presence:
    return host(Role.MAIN, settings, cluster)


def sub_host(settings: HostSettings, cluster: str) -> Presence:
    return host(Role.SUB, settings, cluster)


@contextmanager
def running(settings: HostSettings, cluster: str = "theirs") -> Iterator[ProcessId]:
    """A process of another cluster's VM, whose actor has died before it wrote any state."""
    folder = VmFolder.of(settings, "vm", cluster)
    folder.make()
    for path in (folder.ram / "guest.ram", folder.run / "qmp.sock"):
        path.write_bytes(b"theirs")
    environ = {**os.environ, **marker(folder)}
    process = spawn_detached(["sleep", "600"], folder.run / "a.log", environ, inherited=folder.held)
    (folder.run / "pager.pid").write_text(
        json.dumps({"pid": process.pid, "start_time": process.start_time})
    )
    folder.release()
    try:
        yield process
    finally:
        process.end()


def files(settings: HostSettings) -> dict[Path, bytes]:
    places = (settings.run, settings.ram)
    return {path: path.read_bytes() for top in places for path in top.rglob("*") if path.is_file()}


def cleared(host: Presence) -> None:
    with pytest.raises(Conflict, match="of another cluster"):
        host.clear(False)
    with pytest.raises(Conflict, match="of another cluster"):
        host.clear(take_over=True)


ENDS: dict[str, Callable[[HostSettings], object]] = {
    "main.clear": lambda s: cleared(main_host(s, "ours")),
    "main.destroy": lambda s: main_host(s, "ours").destroy(),
    "sub.clear": lambda s: cleared(sub_host(s, "ours")),
    "sub.destroy": lambda s: sub_host(s, "ours").destroy(),
    "parts.destroy": lambda s: host(Role.PARTS, s, "ours").destroy(),
    "sweep": lambda s: end_what_is_left("vm", "ours"),
    "nameless sweep": lambda s: end_what_is_left("vm", ""),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_another_clusters_vm_is_left_alone(
    end: Callable[[HostSettings], object], settings: HostSettings
) -> None:
    with running(settings) as process:
        before = files(settings)
        end(settings)
        assert process.alive
        assert files(settings) == before


@pytest.mark.parametrize("make", [main_host, sub_host])
class TestActors:
    def test_one_of_another_cluster_sees_nothing_there(
        self, make: Callable[[HostSettings, str], Presence], settings: HostSettings
    ) -> None:
        with running(settings):
            VmFolder.of(settings, "vm").state.write_text('{"generation": 3}')
            assert make(settings, "ours").describe().present is False

    def test_what_is_dead_is_cleared(
        self, make: Callable[[HostSettings, str], Presence], settings: HostSettings
    ) -> None:
        with running(settings):
            pass
        host = make(settings, "ours")
        host.destroy()
        assert (settings.ram / "vm/guest.ram").exists(), "it was not to be used yet"
        host = make(settings, "ours")
        host.require_free(False)
        host.clear(False)
        assert not (settings.ram / "vm").exists()
        assert {path.name for path in (settings.run / "vm").iterdir()} == {MARK, "a.log"}
        with pytest.raises(Conflict, match="is in use on host h0"):
            make(settings, "theirs").clear(False)
        host.destroy()
        last = make(settings, "theirs")
        last.clear(False)
        last.destroy()

    def test_its_own_is_ended_whatever_was_written_down(
        self, make: Callable[[HostSettings, str], Presence], settings: HostSettings
    ) -> None:
        with running(settings, "ours") as process:
            host = make(settings, "ours")
            assert isinstance(host, MainPresence | SubPresence)
            assert len(host._site.folder.held) == 2
            host.clear(False)
            assert not process.alive
            host.destroy()

    def test_what_an_earlier_dcres_left_is_the_cluster_s(
        self, make: Callable[[HostSettings, str], Presence], settings: HostSettings
    ) -> None:
        with running(settings) as process:
            for place in (settings.run, settings.ram):
                Mark("files", "VM vm").put(place / "vm")
            process.end()
            host = make(settings, "ours")
            host.clear(False)
            assert not (settings.ram / "vm").exists()
            host.destroy()

    @pytest.mark.parametrize("boot", ["", "that boot"])
    def test_of_another_machine_s_nobody_knows(
        self,
        boot: str,
        make: Callable[[HostSettings, str], Presence],
        settings: HostSettings,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("dcres.actors.host.vm_folder.boot_id", lambda: boot)
            patch.setattr("dcres.actors.host.vm_folder.machine_id", lambda: "that machine")
            with running(settings):
                pass
        host, before = make(settings, "ours"), files(settings)
        for look in (host.require_free, host.clear):
            with pytest.raises(Conflict, match=r"cannot be seen .*DCRES_RUN.* add --take-over"):
                look(False)
        assert files(settings) == before
        host.require_free(True)
        host.clear(True)
        assert not (settings.ram / "vm").exists()
        host.destroy()


def test_memory_alone_in_common(settings: HostSettings, tmp_path: Path) -> None:
    """DCRES_RUN is another, and DCRES_RAM, with a default, is not."""
    own = settings.model_copy(update={"run": tmp_path / "other"})
    with running(settings) as process:
        before = files(settings)
        host = sub_host(own, "ours")
        for look in (host.require_free, host.clear):
            with pytest.raises(Conflict, match=r"ram/vm \(DCRES_RAM\).* another DCRES_RAM"):
                look(True)
        with pytest.raises(Conflict, match="another DCRES_RAM"):
            VmFolder.of(own, "vm", "ours").make()
        host.destroy()
        assert process.alive
        assert files(settings) == before


def test_a_restarted_actor_waits_for_who_only_looks(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = VmFolder.of(settings, "vm", "ours")
    folder.make()
    folder.release()
    fd = os.open(folder.run / MARK, os.O_RDWR)
    assert hold(fd, alone=True)

    def looked(_: float) -> None:
        os.close(fd)

    monkeypatch.setattr("dcres.actors.host.folder_claim.time.sleep", looked)
    assert folder.resume()
    assert len(folder.held) == 2
    folder.release()


def test_the_folder_that_is_held_is_the_one_that_is_there(settings: HostSettings) -> None:
    """Memory is removed and made anew between a VM's lives."""
    folder = VmFolder.of(settings, "vm", "ours")
    folder.make()
    folder.remove()
    other = VmFolder.of(settings, "vm", "theirs")
    assert "is in use" in other.trouble(take_over=True)
    folder.make()
    assert is_held(folder.ram / MARK)
    assert "is in use" in other.trouble(take_over=True)
    folder.release()
    assert other.trouble(take_over=False) == ""
    assert other.owner == "ours"


def test_two_who_make_it_at_once_both_hold_it_whole(settings: HostSettings) -> None:
    """As a boot and a part server of one restore do; 500 of them left 77 that nobody could use."""
    folder = VmFolder.of(settings, "vm", "ours")
    for _ in range(200):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: folder.make(), range(3)))
        for path in (folder.run, folder.ram):
            assert Mark.of(path) == Mark("files", "VM vm")
        assert (folder.owner, folder.is_ours, len(folder.held)) == ("ours", True, 2)
        folder.remove()
        shutil.rmtree(folder.run)
        folder.release()


def test_a_mark_whose_writer_was_killed_is_nobodys_until_it_is_made(settings: HostSettings) -> None:
    """An actor that begins looks there, and leaves it to be filled."""
    folder = VmFolder.of(settings, "vm", "ours")
    folder.run.mkdir(parents=True)
    (folder.run / MARK).touch()
    assert folder.resume()
    assert (folder.run / MARK).read_text() == ""
    folder.make()
    assert (folder.owner, len(folder.held)) == ("ours", 2)


def test_a_folder_that_goes_while_it_is_made_is_made_again(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sweep does, which the cluster had ordered before."""
    folder = VmFolder.of(settings, "vm", "ours")
    gone: list[bool] = []
    take = FolderClaim.take

    def late(claim: FolderClaim, **how: bool) -> bool:
        if not gone:
            gone.append(True)
            shutil.rmtree(folder.run)
        return take(claim, **how)

    monkeypatch.setattr(FolderClaim, "take", late)
    folder.make()
    assert (folder.owner, len(folder.held)) == ("ours", 2)
