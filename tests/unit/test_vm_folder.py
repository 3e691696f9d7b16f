"""The folders of a VM on a host: another's of that name are neither used nor emptied."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcres.actors.host import orphans
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.presence import MainPresence, PartsPresence, SubPresence
from dcres.actors.host.roles import SubRole
from dcres.actors.host.vm_folder import VmFolder, marker
from dcres.actors.messages import Incarnation, Role, ServeOrder
from dcres.actors.ray.fleet import end_what_is_left
from dcres.actors.ray.local_node import CLUSTER_MARK
from dcres.config import HostSettings
from dcres.errors import HostError, NotOurs
from dcres.linux.marks import MARK, Mark
from dcres.linux.removal import OwnFolder

FOREIGN = ("state.json.txt", "photo.jpg", "work/thesis.tex")


def host(role: Role, settings: HostSettings) -> MainPresence | SubPresence | PartsPresence:
    return HostAgent("vm", role, environ=settings.environ()).composed.presence


ENDS: dict[str, Callable[[HostSettings], object]] = {
    "main.destroy": lambda s: host(Role.MAIN, s).destroy(),
    "main.clear": lambda s: host(Role.MAIN, s).clear(),
    "sub.destroy": lambda s: host(Role.SUB, s).destroy(),
    "sub.clear": lambda s: host(Role.SUB, s).clear(),
    "parts.destroy": lambda s: host(Role.PARTS, s).destroy(),
    "sweep": lambda s: end_what_is_left("vm", ""),
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostSettings:
    run, ram, store = (tmp_path / name for name in ("run", "ram", "store"))
    made = HostSettings(name="h0", run=run, ram=ram, store=store)
    for key, value in made.environ().items():
        monkeypatch.setenv(key, value)
    return made


def of_a_user(folder: Path) -> set[Path]:
    paths = {folder / name for name in FOREIGN}
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    return paths


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("vm", ["vm", "vm.parts"])
class TestEnding:
    def test_a_users_files_stay(
        self, vm: str, end: Callable[[HostSettings], object], settings: HostSettings
    ) -> None:
        own = of_a_user(settings.run / vm) | of_a_user(settings.ram / vm)
        end(settings)
        assert files(settings.run) | files(settings.ram) == own

    def test_what_a_link_leads_to_stays(
        self,
        vm: str,
        end: Callable[[HostSettings], object],
        settings: HostSettings,
        tmp_path: Path,
    ) -> None:
        own = of_a_user(tmp_path / "precious")
        for place in (settings.run, settings.ram):
            place.mkdir()
            (place / vm).symlink_to(tmp_path / "precious")
        end(settings)
        assert files(tmp_path / "precious") == own
        assert (settings.ram / vm).is_symlink()

    def test_other_vms_and_what_is_beside_them_stay(
        self, vm: str, end: Callable[[HostSettings], object], settings: HostSettings
    ) -> None:
        other = VmFolder.of(settings, "other")
        other.make()
        (other.ram / "guest.ram").touch()
        own = of_a_user(settings.ram)
        end(settings)
        assert files(settings.ram) == {*own, other.ram / "guest.ram", other.ram / MARK}


@pytest.fixture
def in_another_container(settings: HostSettings) -> Iterator[subprocess.Popen[str]]:
    """A process of a VM there, to which the folder at this path is another."""
    folder = VmFolder.of(settings, "vm")
    folder.make()
    (folder.run / "state.json").write_text("{}")
    hide = 'mount -t tmpfs none "$0" && mkdir "$0/vm" && echo ready && exec sleep 600'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", hide]
    with subprocess.Popen(
        [*argv, str(settings.run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **marker(folder), CLUSTER_MARK: "0ther"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if process.stdout.readline() != "ready\n":
                pytest.skip(f"no namespaces here: {process.stderr.read()}")
            yield process
        finally:
            process.kill()


class TestAnotherContainer:
    """Its processes are seen from here, and carry the mark of the VM that has this path here."""

    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
    def test_its_vm_runs_on(
        self,
        end: Callable[[HostSettings], object],
        in_another_container: subprocess.Popen[str],
        settings: HostSettings,
    ) -> None:
        end(settings)
        assert in_another_container.poll() is None
        with subprocess.Popen(
            ["sleep", "600"], env={**os.environ, **marker(VmFolder.of(settings, "vm"))}
        ) as ours:
            end_what_is_left("vm", "")
            assert ours.wait() == -signal.SIGTERM
        assert in_another_container.poll() is None

    def test_the_vm_here_keeps_its_files_when_what_is_left_there_is_ended(
        self, in_another_container: subprocess.Popen[str], settings: HostSettings
    ) -> None:
        (left,) = (each for each in orphans.find(settings.ram) if each.cluster == "0ther")
        assert [each.pid for each in left.processes] == [in_another_container.pid]
        assert orphans.end(left, settings.ram)
        assert in_another_container.wait() < 0, "by a signal"
        assert (settings.run / "vm" / "state.json").exists()


class TestFolder:
    def test_its_own_goes_but_logs(self, settings: HostSettings) -> None:
        folder = VmFolder.of(settings, "vm")
        folder.make()
        for path in (folder.run / "qemu.log", folder.run / "state.json", folder.ram / "guest.ram"):
            path.touch()
        folder.remove()
        assert {path.name for path in folder.run.iterdir()} == {MARK, "qemu.log"}
        assert not folder.ram.exists()
        folder.make()
        folder.remove()

    @pytest.mark.parametrize("place", ["run", "ram"])
    def test_a_users_is_refused(self, place: str, settings: HostSettings) -> None:
        own = of_a_user(getattr(settings, place) / "vm")
        with pytest.raises(NotOurs, match=r"vm is not the files of VM vm.* place by DCRES_R"):
            VmFolder.of(settings, "vm").make()
        assert files(getattr(settings, place)) - {settings.run / "vm" / MARK} == own

    def test_a_vm_is_not_started_on_a_users(self, settings: HostSettings) -> None:
        with tempfile.TemporaryDirectory(prefix="dcres-t-", dir="/dev/shm") as ram:
            settings = settings.model_copy(update={"ram": Path(ram)})
            own = of_a_user(settings.ram / "vm")
            host = HostAgent("vm", Role.SUB, environ=settings.environ()).composed
            assert isinstance(host, SubRole)
            host.presence.clear()
            with pytest.raises(NotOurs):
                host.server.serve(ServeOrder(Incarnation("vm", 1, "00" * 32), 16, 16))
            host.presence.destroy()
            assert files(settings.ram) == own

    def test_what_an_earlier_dcres_left_is_known_by_its_names(self, settings: HostSettings) -> None:
        folder = VmFolder.of(settings, "vm")
        for path in (folder.run / "qemu.log", folder.run / "pager.json", folder.ram / "guest.ram"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        folder.remove()
        assert {path.name for path in folder.run.iterdir()} == {MARK, "qemu.log"}
        assert not folder.ram.exists()

    def test_an_empty_one_that_is_not_ours_is_not_removed(self, settings: HostSettings) -> None:
        (settings.ram / "vm").mkdir(parents=True)
        VmFolder.of(settings, "vm").remove()
        assert (settings.ram / "vm").is_dir()

    def test_one_of_another_vm(self, settings: HostSettings) -> None:
        settings.ram.mkdir()
        OwnFolder.new(settings.ram / "vm", Mark("files", "VM other"))
        folder = VmFolder.of(settings, "vm")
        with pytest.raises(NotOurs, match="but the files of VM other"):
            folder.make()
        folder.remove()
        assert (settings.ram / "vm" / MARK).exists()

    def test_one_that_others_may_write_to(self, settings: HostSettings) -> None:
        folder = VmFolder.of(settings, "vm")
        folder.make()
        os.chmod(folder.ram, 0o770)
        with pytest.raises(HostError, match="others may write to it"):
            folder.make()
