"""VM files, layouts, sizes and host settings: what is accepted, and how the rest is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.config import (
    MAX_SUBS,
    Accel,
    HostSettings,
    Layout,
    VmSpec,
    default_cache,
    default_home,
    format_size,
    layout_of,
    load_layout,
    load_vm_spec,
    named_folder,
    parse_size,
    store_of_environ,
    vm_spec,
)
from dcres.errors import ConfigError
from dcres.model.pages import PAGE_SIZE

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


def values(**changes: object) -> dict[str, Any]:
    """A good VM file, with some keys changed; None removes one."""
    good: dict[str, Any] = {
        "name": "demo",
        "memory": "512MiB",
        "kernel": "vmlinuz",
        "layout": {"main": "256MiB", "subs": ["128MiB", "128MiB"]},
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 * MIB),
        ("1.5 GiB", 1536 * MIB),
        ("4096", 4096),
        (8192, 8192),
        ("8 KiB", 8192),
        ("2tib", 2 << 40),
        (" 1 gib ", 1 << 30),
        ("4096B", 4096),
        ("0", 0),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4095", "multiple of 4096"),
        ("1.3MiB", "multiple of 4096"),
        ("512MB", "'MB' is not known"),
        ("much", "not a size"),
        ("-4096", "not a size"),
        ("", "not a size"),
        (True, "not a size"),
        (None, "not a size"),
        ("1e6", "is not known|not a size"),
    ],
)
def test_wrong_sizes(text: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 34), st.sampled_from(["", "KiB", "MiB", "TiB"]))
def test_every_whole_number_of_pages_is_a_size(pages: int, unit: str) -> None:
    factor = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "TiB": 1 << 40}[unit]
    assert parse_size(f"{pages * PAGE_SIZE}{unit}") == pages * PAGE_SIZE * factor


@pytest.mark.parametrize(
    ("length", "text"), [(0, "0 B"), (4096, "4 KiB"), (1536 * MIB, "1.5 GiB"), (1 << 40, "1 TiB")]
)
def test_sizes_for_people(length: int, text: str) -> None:
    assert format_size(length) == text
    assert parse_size(text) == length


def test_a_good_vm_file() -> None:
    spec = vm_spec(values(), base=Path("/vms"))
    assert spec.memory == 512 * MIB
    assert spec.layout.shares == (256 * MIB, 128 * MIB, 128 * MIB)
    assert spec.kernel == Path("/vms/vmlinuz")
    assert (spec.vcpus, spec.accel, spec.append) == (1, Accel.AUTO, "console=ttyS0")


def test_absolute_paths_stay() -> None:
    disks = [{"path": "/disks/a.qcow2"}, {"path": "b.qcow2", "format": "qcow2"}]
    spec = vm_spec(values(disks=disks), base=Path("/vms"))
    assert [disk.path for disk in spec.disks] == [Path("/disks/a.qcow2"), Path("/vms/b.qcow2")]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"memroy": "1GiB"}, "memroy: unknown key"),
        ({"layout": {"main": "512MiB", "sub": []}}, "layout.sub: unknown key"),
        ({"memory": None}, "memory"),
        ({"memory": "0"}, "memory"),
        ({"memory": "513MB"}, "memory: unit 'MB' is not known"),
        ({"name": "Demo!"}, "name"),
        ({"name": "../x"}, "name"),
        ({"vcpus": 0}, "vcpus"),
        ({"accel": "xen"}, "accel"),
        ({"kernel": None}, "nothing to boot"),
        ({"kernel": None, "disks": [{"path": "a"}], "initrd": "b"}, "an initrd needs a kernel"),
        ({"disks": [{"path": "a", "format": "raw"}]}, "disks.0.format"),
        ({"layout": {"main": "256MiB"}}, "give the hosts 256 MiB more"),
        ({"layout": {"main": "0", "subs": ["512MiB"]}}, "cannot be 0"),
        ({"layout": {"main": "512MiB", "subs": ["0"]}}, "cannot be 0"),
        ({"layout": {"main": "1GiB", "subs": ["4KiB"] * (MAX_SUBS + 1)}}, "at most 200"),
    ],
)
def test_a_wrong_vm_file_is_named_with_what_is_wrong(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        vm_spec(values(**changes), source="demo.yaml")
    assert str(raised.value).startswith("demo.yaml: ")


@pytest.mark.parametrize("given", [None, [], "name: demo", 3])
def test_something_else_than_a_vm_file(given: object) -> None:
    with pytest.raises(ConfigError, match="expected keys such as name"):
        vm_spec(given)


@pytest.mark.parametrize("missing", ["kernel", "initrd", "disk"])
def test_a_file_that_is_not_there(missing: str, tmp_path: Path) -> None:
    for name in {"kernel", "initrd", "disk"} - {missing}:
        (tmp_path / name).touch()
    spec = vm_spec(
        values(kernel="kernel", initrd="initrd", disks=[{"path": "disk"}]), base=tmp_path
    )
    with pytest.raises(ConfigError, match=f"{missing} {tmp_path / missing} .*does not exist"):
        spec.require_files()


def test_direct_disk_io_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    disk = {"path": "disk", "cache.direct": True}
    spec = vm_spec(values(kernel=None, disks=[disk]), base=tmp_path)
    with pytest.raises(ConfigError, match=r"cache\.direct=on"):
        spec.require_files()


def test_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").touch()
    vm_spec(values(), base=tmp_path).require_files()


def test_reading_a_vm_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.yaml"
    path.write_text("name: demo\nmemory: 1GiB\nkernel: vmlinuz\nlayout: {main: 1GiB}\n")
    spec = load_vm_spec(path)
    assert spec.kernel == tmp_path / "vmlinuz"
    assert spec.layout == Layout(main=1 << 30)


@pytest.mark.parametrize(
    ("content", "why"), [(b"a: [", "is not YAML"), (b"\xff\xfe", "is not YAML"), (b"", "expected")]
)
def test_reading_what_is_no_vm_file(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "vm.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        load_vm_spec(path)


def test_a_vm_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path / 'none.yaml'}"):
        load_vm_spec(tmp_path / "none.yaml")


def test_a_layout_of_numbers() -> None:
    assert layout_of(4096, [8192]) == Layout(main=4096, subs=(8192,))
    with pytest.raises(ConfigError, match=r"^a host's share cannot be 0$"):
        layout_of(0, [])
    with pytest.raises(ConfigError, match="at most 200 are supported"):
        layout_of(4096, [4096] * 201)


def test_reading_a_layout(tmp_path: Path) -> None:
    path = tmp_path / "layout.yaml"
    path.write_text("main: 64MiB\nsubs: [4KiB]\n")
    assert load_layout(path).shares == (64 * MIB, 4096)
    path.write_text("main: 64MiB\nextra: 1\n")
    with pytest.raises(ConfigError, match="extra: unknown key"):
        load_layout(path)


def test_room_that_is_just_enough() -> None:
    layout = Layout.model_validate({"main": "4KiB", "subs": ["4KiB"]})
    layout.require_room_for(8192)
    with pytest.raises(ConfigError, match=r"holds 8 KiB and the VM has 12 KiB; .* 4 KiB more"):
        layout.require_room_for(12288)


def test_host_settings_survive_the_environment() -> None:
    settings = HostSettings(
        name="h7", run=Path("/r"), ram=Path("/m"), store=Path("/s"), address="10.0.0.7"
    )
    assert HostSettings.from_environ(settings.environ()) == settings


def test_host_settings_by_default() -> None:
    settings = HostSettings.from_environ({"DCRES_HOME": "/home/x"}, address="10.0.0.1")
    assert settings.name
    assert settings.run == Path("/home/x/run")
    assert settings.store == Path("/home/x/store")
    assert settings.ram == Path("/dev/shm/dcres")
    assert settings.address == "10.0.0.1"


FOLDERS: dict[str, Callable[[], Path | None]] = {
    "DCRES_HOME": default_home,
    "DCRES_STORE": store_of_environ,
    "DCRES_CACHE": default_cache,
    "DCRES_RUN": lambda: HostSettings.from_environ(os.environ).run,
    "DCRES_RAM": lambda: HostSettings.from_environ(os.environ).ram,
}


@pytest.mark.parametrize("variable", FOLDERS)
class TestFoldersOfTheEnvironment:
    def test_named(self, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(variable, "/chosen")
        assert FOLDERS[variable]() == Path("/chosen")
        monkeypatch.setenv("HOME", "/home/x")
        monkeypatch.setenv(variable, "~/chosen")
        assert FOLDERS[variable]() == Path("/home/x/chosen")

    @pytest.mark.parametrize("empty", ["", " "])
    def test_empty_is_unset(
        self, variable: str, empty: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And not the folder that somebody happens to be in."""
        monkeypatch.delenv(variable, raising=False)
        usual = FOLDERS[variable]()
        monkeypatch.setenv(variable, empty)
        assert FOLDERS[variable]() == usual

    @pytest.mark.parametrize("text", ["relative", "./x", "~nobody-of-that-name/x"])
    def test_what_names_no_folder_for_good(
        self, variable: str, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, text)
        with pytest.raises(ConfigError, match=rf"^{variable} is '{text}'.*write its whole path"):
            FOLDERS[variable]()


def test_a_folder_that_a_caller_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert named_folder("~/store") == Path("/home/x/store")
    assert named_folder(Path("store")) == Path.cwd() / "store"
    assert named_folder("/data/{host}") == Path("/data/{host}")
    with pytest.raises(ConfigError, match="the name of the store is empty; write its path"):
        named_folder("", "the store")


def test_the_usual_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCRES_HOME", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/dcres")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_home() == Path("/state/dcres")
    monkeypatch.setenv("HOME", "/home/x")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert default_home() == Path("/home/x/.local/state/dcres")


@pytest.mark.parametrize("page", ["README.md", "docs/operators.md"])
def test_the_vm_file_that_people_are_shown(page: str, tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?memory:.*?)```", (ROOT / page).read_text(), re.DOTALL)
    path = tmp_path / "vm.yaml"
    path.write_text(shown)
    assert load_vm_spec(path).layout == Layout(main=256 * MIB, subs=(128 * MIB, 128 * MIB))
    if page == "docs/operators.md":
        for key in VmSpec.model_fields:
            assert re.search(rf"^{key}:", shown, re.MULTILINE), f"{key} is not explained"
