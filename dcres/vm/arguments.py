"""Relative paths in ``extra_args``: they would be taken from an actor's working folder.

Only what clearly is the path of a file on this host is looked at. Left alone are names that QEMU
looks up in its own data folder as well (firmware, option ROMs), nodes and networks by name, paths
on other machines, and everything behind a protocol (``nbd:…``, ``ssh://…``, ``json:{…}``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dcres.errors import ConfigError

# Options whose whole value is a file or folder.
_FILES = frozenset(
    (
        *("cdrom", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash", "kernel"),
        *("initrd", "dtb", "mem-path", "pidfile", "D", "L", "readconfig", "chroot"),
    )
)
# Where QEMU looks into its data folder if the working folder has no such file.
_LOOKED_UP = frozenset({"bios", "option-rom"})
# Options with key=value,… in which these keys are files or folders.
_KEYS: dict[str, frozenset[str]] = {
    "drive": frozenset({"file"}),
    "chardev": frozenset({"path", "logfile", "input-path"}),
    "fsdev": frozenset({"path", "socket"}),
    "virtfs": frozenset({"path", "socket"}),
    "object": frozenset({"mem-path", "file", "dir"}),
    "smbios": frozenset({"file"}),
    "acpitable": frozenset({"file", "data"}),
    "fw_cfg": frozenset({"file"}),
    "tpmdev": frozenset({"path", "cancel-path"}),
    "audiodev": frozenset({"path"}),
    "trace": frozenset({"file", "events"}),
    "netdev": frozenset({"script", "downscript", "smb", "tftp", "sock"}),
    "nic": frozenset({"script", "downscript", "smb", "tftp", "sock"}),
    "net": frozenset({"script", "downscript", "smb", "tftp", "sock"}),
    "blockdev": frozenset(),  # filename, as everywhere; file is another node
    "device": frozenset({"file"}),  # of a loader
    "machine": frozenset({"kernel", "initrd", "dtb"}),
}
_CHARACTER = frozenset(
    ("serial", "parallel", "monitor", "qmp", "qmp-pretty", "gdb", "debugcon", "vnc")
)
_CHARACTER_PREFIX = re.compile(r"(file|unix|pipe):([^,]*)")
_PAIR = re.compile(r"(?:^|,)([^=,]+)=((?:[^,]|,,)*)")
_PROTOCOL = re.compile(r"[A-Za-z][\w+.-]*:")


def _is_relative(path: str) -> bool:
    return path not in ("", "no", "none") and path[0] != "/" and not _PROTOCOL.match(path)


def _in_json(value: object, keys: frozenset[str]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and (key == "filename" or key in keys):
                yield key, inner
            yield from _in_json(inner, keys)
    elif isinstance(value, list):
        for inner in value:
            yield from _in_json(inner, keys)


def _pairs(value: str, keys: frozenset[str]) -> Iterator[tuple[str, str]]:
    """What names files in an option's value, as key and path."""
    if value.startswith("{"):
        try:
            yield from _in_json(json.loads(value), keys)
        except ValueError:  # QEMU will say so
            return
    if "abstract=on" in value.split(","):  # a socket's name, and no file
        return
    for key, path in _PAIR.findall(value):
        if key in keys or key.rpartition(".")[2] == "filename":
            yield key, path.replace(",,", ",")


def _paths(option: str, value: str) -> Iterator[tuple[str, str]]:
    if option in _LOOKED_UP and "/" not in value:
        return
    if option in _FILES | _LOOKED_UP and "=" not in value:
        yield "", value
    if option in _CHARACTER and (found := _CHARACTER_PREFIX.match(value)) is not None:
        if "abstract=on" not in value.split(","):
            yield found[1], found[2]
    elif option in _KEYS:
        yield from _pairs(value, _KEYS[option])


def require_whole_paths(arguments: Sequence[str]) -> None:
    """ConfigError, naming the argument, for a relative path to a file of this host; pure."""
    for option, value in pairwise(arguments):
        if not option.startswith("-"):
            continue
        for key, path in _paths(option.lstrip("-"), value):
            if _is_relative(path):
                where = f"{key} in {option} {value}" if key else f"{option} {value}"
                raise ConfigError(
                    f"extra_args: {path} is a relative path ({where}), which QEMU would not take "
                    "from the VM file's folder; write the whole path"
                )
