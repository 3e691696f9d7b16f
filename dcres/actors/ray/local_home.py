"""The home of local clusters: a folder with the record, the token and the files of one at a time.

``cluster.json`` is the record of the cluster that runs there; it is written first and removed last.
Nothing else of the home is touched: it may have other folders in it, such as the guest of dcres,
and what bears one of our names and is not ours is never taken for ours. The mark ``.dcres-home``
says which names are ours; it is also the file that the nodes of a cluster hold a lock on as long as
they live, so that it is known from any container and machine whether one does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dcres.actors.ray.local_node import CLUSTER_MARK, marked
from dcres.errors import ClusterError, Conflict, NotOurs
from dcres.linux import machine
from dcres.linux.files import opened
from dcres.linux.holding import hold, is_held
from dcres.linux.marks import HOME_MARK, MARK, Mark, may_be_marked
from dcres.linux.removal import OwnFolder, OwnNames
from dcres.model.whereabouts import Life, Place, life_of
from dcres.storage.atomic import write_durably
from dcres.storage.store import emptying

HOST_FIELD = "{host}"  # in the store's path: every host has a store of its own
RAM_MARK = "RAM"

_HOSTS_MARK = "files of hosts"
_STATE, _TOKEN, _HOSTS, _STORE = "cluster.json", "token", "hosts", "store"
_OWN_NAMES = frozenset({_STATE, _TOKEN})
_PATIENCE_S = 5.0  # with who starts or ends a cluster
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class State:
    """What ``cluster.json`` holds; paths and addresses as text."""

    id: str
    boot: str
    address: str
    network: str
    temp: str
    ram: str
    store: str
    memory_per_host: int
    dashboard_port: int | None
    next_host: int
    hosts: dict[str, str]  # name → address
    launcher: tuple[str, ...] = ()  # see `local_node.Places`
    machine: str = ""
    host: str = ""
    pids: str = ""

    @property
    def place(self) -> Place:
        """Where it was started."""
        return Place(self.machine, self.host, self.boot, self.pids)


def this_place() -> Place:
    """Where this process is."""
    return Place(
        machine.machine_id(), os.uname().nodename, machine.boot_id(), machine.pid_namespace()
    )


@dataclass(frozen=True, slots=True)
class Home:
    """A home, whether it is there or not."""

    path: Path

    @property
    def state(self) -> Path:
        """The record of the cluster that runs."""
        return self.path / _STATE

    @property
    def token(self) -> Path:
        """The private file with the token that every process of the cluster must show."""
        return self.path / _TOKEN

    @property
    def hosts(self) -> Path:
        """A folder for each host's sockets, tables and logs."""
        return self.path / _HOSTS

    @property
    def store(self) -> Path:
        """The store of a cluster that was given no other."""
        return self.path / _STORE

    @property
    def is_marked(self) -> bool:
        """Whether a cluster was ever started here, and the home not purged since."""
        return (self.path / HOME_MARK).is_file()

    def read(self) -> State | None:
        """The record of the cluster there; None if there is none. Raises ClusterError."""
        try:
            values = json.loads(self.state.read_text())
            values.pop("owner", None)  # an earlier dcres's
            return State(**values)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, AttributeError):
            raise ClusterError(
                f"{self.state} is damaged, or of another version of dcres, or not dcres's; end "
                "the cluster with that version or by `dcres down --orphans`, and move the file "
                "away"
            ) from None
        except OSError as error:
            raise ClusterError(f"cannot read {self.state}: {error.strerror}") from None

    def write(self, state: State) -> None:
        """Replace the record, durably, as a private file. Raises StoreFull, OSError."""
        write_durably(self.state, json.dumps(asdict(state), indent=1).encode())

    def life(self, state: State) -> Life:
        """What is known of the cluster with this record."""
        seen = bool(marked({CLUSTER_MARK: state.id}))
        held = is_held(self.path / HOME_MARK)
        return life_of(state.place, this_place(), held=held, seen=seen)

    @property
    def none_runs(self) -> str:
        """The sentence that says so."""
        return f"no local cluster runs in {self.path}; start one with `dcres up`"

    def lives_elsewhere(self, state: State) -> str:
        """Why it can neither be ended nor changed from here."""
        return (
            f"the local cluster in {self.path} runs in another container or on another machine "
            f"({state.host}); end it there, or set DCRES_HOME to another folder"
        )

    def not_judged(self, state: State) -> str:
        """What to do about a cluster that may live where it cannot be seen."""
        where = f"on another machine ({state.host})" if state.host else "by an earlier dcres"
        return (
            f"{self.state} is of a local cluster that was started {where}; whether it has ended "
            "cannot be seen from here. Run `dcres down` there, set DCRES_HOME to another "
            f"folder, or, if nothing of it is left, remove that file, {self.token} and "
            f"{self.hosts} by hand"
        )

    def require_none_lives(self) -> None:
        """Raises Conflict unless it is sure that no cluster lives that was started here."""
        state = self.read()
        if state is None:
            return
        match self.life(state):
            case Life.HERE:
                raise Conflict(f"a local cluster runs in {self.path} already; `dcres down` ends it")
            case Life.ELSEWHERE:
                raise Conflict(self.lives_elsewhere(state))
            case Life.UNKNOWN:
                raise Conflict(self.not_judged(state))
            case Life.DEAD:
                return

    def require_usable(self, *, with_store: bool) -> None:
        """NotOurs if one of our names is taken by what is not ours. Changes nothing."""
        foreign = self._foreign()
        if with_store and os.path.lexists(self.store) and not _may_be_store(self.store.resolve()):
            foreign.append(self.store)
        if foreign:
            raise NotOurs(
                f"{' and '.join(map(str, foreign))} {'is' if len(foreign) == 1 else 'are'} not "
                "dcres's, and a cluster would put its own there; move that away, or set DCRES_HOME "
                "to another folder"
            )

    def _foreign(self) -> list[Path]:
        """What bears a name of ours and is not ours."""
        state = self.read()
        found = [self.token] if state is None and os.path.lexists(self.token) else []
        recorded = state is not None and not state.place.is_known  # by an earlier dcres
        ours = recorded or self.own_hosts() or may_be_marked(self.hosts)
        if os.path.lexists(self.hosts) and not ours:
            found.append(self.hosts)
        return found

    def own_hosts(self) -> OwnFolder | None:
        """The folder of hosts' files, of whichever cluster."""
        mark = Mark.of(self.hosts)
        return OwnFolder(self.hosts, mark) if mark and mark.what == _HOSTS_MARK else None

    def remains(self) -> tuple[list[Path], list[Path]]:
        """What clusters have put here, and what else is here. Changes nothing."""
        own = {path for path in (self.state, self.token) if self.read() is not None}
        if self.own_hosts() is not None:
            own.add(self.hosts)
        emptied = self.is_marked and may_be_marked(self.store)
        if not self.store.is_symlink() and (emptied or emptying.is_store(self.store)):
            own.add(self.store)
        there = [path for path in sorted(self.path.iterdir()) if path.name != HOME_MARK]
        return [path for path in there if path in own], [path for path in there if path not in own]

    @contextmanager
    def claimed(self) -> Iterator[Claim]:
        """Be alone in this home, which is there; no cluster lives that was started in it.

        Raises Conflict if one does, or is being started or ended.
        """
        fd = self._locked(alone=True)
        try:
            names = _OWN_NAMES - {path.name for path in self._foreign()}
            yield Claim(self, OwnNames.claim(self.path, names, fd), fd)
        finally:
            os.close(fd)

    def held(self) -> int:
        """A descriptor; while a copy of it is open the cluster of this home lives.

        The caller closes it. Raises Conflict while the cluster is being started or ended.
        """
        return self._locked(alone=False)

    def _locked(self, *, alone: bool) -> int:
        mark = self.path / HOME_MARK
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            fd = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                # Who purged the home meanwhile has removed the file that we have opened.
                if hold(fd, alone=alone) and mark.exists() and os.path.samefile(fd, mark):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            if time.monotonic() > deadline:
                raise Conflict(
                    f"a local cluster runs in {self.path} already, or is being started or ended; "
                    "`dcres down` ends it"
                )
            time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Claim:
    """A home that nobody else uses; `Home.claimed` gives it."""

    home: Home
    names: OwnNames
    lock: int

    def share(self) -> None:
        """From now on the processes that have inherited the lock make the cluster live."""
        hold(self.lock)

    def clear(self, state: State) -> None:
        """Remove all that the cluster of `state`, which has ended, has left but its store.

        The record goes last: what is interrupted is found and done again. Raises HostError.
        """
        for path, mark in own_folders(self.home, state).items():
            # An earlier dcres made no marks; there its private record is the proof.
            named = path == self.home.hosts or path.name == f"dcres-{state.id}"
            if named and not state.place.is_known and Mark.of(path) is None and _is_folder(path):
                mark.put(path)
            folder = OwnFolder.found(path, mark)
            if folder is not None:
                folder.remove()
        self.names.remove_file(_TOKEN)
        self.names.remove_file(_STATE)

    def clear_dead(self) -> bool:
        """Remove what a cluster left that has ended by itself; whether one did."""
        state = self.home.read()
        if state is not None:
            self.clear(state)
        hosts = self.home.own_hosts()
        if hosts is not None:
            hosts.remove()
        return state is not None

    def purge(self) -> None:
        """Remove what clusters have put here, checkpoints too, and the home if that was all.

        Raises HostError, Conflict for a checkpoint that is in use.
        """
        own, _ = self.home.remains()
        self.clear_dead()
        if self.home.store in own:
            emptying.empty(self.home.store)
        self.names.remove()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _may_be_store(folder: Path) -> bool:
    return may_be_marked(folder) or emptying.is_store(folder)


def own_folders(home: Home, state: State) -> dict[Path, Mark]:
    """The folders that a cluster makes for itself alone, and their marks."""
    whose = f"cluster {state.id}"
    return {
        Path(state.ram): Mark(RAM_MARK, whose),
        Path(state.temp): Mark("temporary files", whose),
        home.hosts: Mark(_HOSTS_MARK, whose),
    }


@contextmanager
def held_by_nodes(state: State, of_home: int) -> Iterator[tuple[int, ...]]:
    """Descriptors for nodes to hold, so that neither home nor memory is taken for a dead cluster's.

    `of_home` is closed in the end, too.
    """
    mark = Path(state.ram) / MARK
    with ExitStack() as stack:
        stack.callback(os.close, of_home)
        if not mark.exists():  # an earlier dcres made none
            yield (of_home,)
            return
        of_memory = stack.enter_context(opened(mark, os.O_RDWR))
        hold(of_memory)
        yield of_home, of_memory
