"""A QEMU with mapped-ram (9.1 and newer) to compare with: the installed one, or Debian's backport.

On Debian 12 the backport is downloaded with a package list and a cache of its own, so that the
system's apt keeps its configuration and nothing is installed, and unpacked into dcres's cache
folder together with those libraries that the system lacks. It is run from there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dcres.errors import UnsupportedHost
from dcres.vm.command import QEMU

_PACKAGE = "qemu-system-x86"
_RELEASE = "bookworm"
_TIMEOUT_S = 300
_SOURCES = """\
deb [signed-by={keyring}] http://deb.debian.org/debian bookworm main
deb [signed-by={keyring}] http://deb.debian.org/debian bookworm-updates main
deb [signed-by={keyring}] http://deb.debian.org/debian-security bookworm-security main
deb [signed-by={keyring}] http://deb.debian.org/debian bookworm-backports main
"""
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_CONFIG = """\
Dir::State "{folder}/state";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{folder}/cache";
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
APT::Sandbox::User "root";
Debug::NoLocking "1";
"""


@dataclass(frozen=True, slots=True)
class QemuProgram:
    """A QEMU that can be run: its program, more arguments, and its environment."""

    path: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def knows(self, capability: str) -> bool:
        """Whether it has this migration capability, by asking it."""
        # -M none: nothing is emulated, and the answer is the same.
        said = subprocess.run(
            [self.path, *self.arguments, "-M", "none", "-display", "none", "-qmp", "stdio"],
            input='{"execute":"qmp_capabilities"}{"execute":"query-migrate-capabilities"}'
            '{"execute":"quit"}',
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
        return f'"{capability}"' in said.stdout


def with_mapped_ram(cache: Path) -> QemuProgram:
    """A QEMU that knows mapped-ram; the network is used once.

    Raises UnsupportedHost when the installed one does not and no other can be had.
    """
    installed = QemuProgram(QEMU)
    if shutil.which(QEMU) and installed.knows("mapped-ram"):
        return installed
    root = cache / "qemu-backport"
    if not root.is_dir():
        _fetch(root)
    unpacked = unpacked_at(root)
    if not unpacked.knows("mapped-ram"):
        raise UnsupportedHost(f"the QEMU in {root} does not run; remove that folder to fetch anew")
    return unpacked


def unpacked_at(root: Path) -> QemuProgram:
    """The QEMU whose packages were unpacked at `root`."""
    share = root / "usr" / "share"
    folders = [
        share / "qemu",
        share / "seabios",
        Path("/usr/share/qemu"),
        Path("/usr/share/seabios"),
    ]
    arguments = [word for folder in folders for word in ("-L", str(folder))]
    libraries = str(root / "usr" / "lib" / "x86_64-linux-gnu")
    program = str(root / "usr" / "bin" / QEMU)
    return QemuProgram(program, tuple(arguments), {"LD_LIBRARY_PATH": libraries})


def _fetch(root: Path) -> None:
    release = platform.freedesktop_os_release()
    if (release.get("ID"), release.get("VERSION_CODENAME")) != ("debian", _RELEASE):
        raise UnsupportedHost("no QEMU with mapped-ram is installed; install QEMU 9.1 or newer")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".fetch-") as name:
        folder = Path(name)
        for part in ("state/lists/partial", "cache/archives/partial", "root"):
            (folder / part).mkdir(parents=True)
        (folder / "sources.list").write_text(_SOURCES.format(keyring=_KEYRING))
        (folder / "apt.conf").write_text(_CONFIG.format(folder=folder))
        env = {"APT_CONFIG": str(folder / "apt.conf")}
        _run(["apt-get", "-qq", "update"], env)
        get = ["apt-get", "-qq", "-y", "--no-install-recommends", "--download-only"]
        _run([*get, "-t", f"{_RELEASE}-backports", "install", _PACKAGE], env)
        for archive in sorted((folder / "cache" / "archives").glob("*.deb")):
            _run(["dpkg", "-x", str(archive), str(folder / "root")], {})
        (folder / "root").rename(root)


def _run(argv: list[str], env: Mapping[str, str]) -> None:
    full = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **env}
    try:
        subprocess.run(
            argv, env=full, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except FileNotFoundError:
        raise UnsupportedHost(f"{argv[0]} is not here; install QEMU 9.1 or newer") from None
    except subprocess.CalledProcessError as error:
        words = " / ".join(error.stderr.strip().splitlines()[-3:])
        raise UnsupportedHost(f"{' '.join(argv)} failed: {words}") from None
    except subprocess.TimeoutExpired:
        raise UnsupportedHost(f"{' '.join(argv)} took over {_TIMEOUT_S} s") from None
