"""Relative paths in extra_args, and what merely looks like one."""

from __future__ import annotations

import pytest

from dcres.errors import ConfigError
from dcres.vm.arguments import require_whole_paths


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("-cdrom", "seed.iso", "seed.iso"),
        ("--cdrom", "./seed.iso", "./seed.iso"),
        ("-bios", "fw/OVMF.fd", "fw/OVMF.fd"),
        ("-option-rom", "roms/efi.rom", "roms/efi.rom"),
        ("-pflash", "OVMF_CODE.fd", "OVMF_CODE.fd"),
        ("-pidfile", "box.pid", "box.pid"),
        ("-drive", "if=pflash,format=raw,readonly=on,file=OVMF.fd", "OVMF.fd"),
        ("-drive", "file.driver=file,file.filename=a,,b.iso,readonly=on", "a,b.iso"),
        ("-blockdev", "driver=raw,node-name=x,file.driver=file,file.filename=x.iso", "x.iso"),
        ("-blockdev", '{"driver": "raw", "file": {"driver": "file", "filename": "x"}}', "x"),
        ("-chardev", "socket,id=m,path=m.sock,server=on", "m.sock"),
        ("-chardev", "file,id=m,path=/tmp/m,logfile=m.log", "m.log"),
        ("-qmp", "unix:q,server=on,wait=off", "q"),
        ("-serial", "file:serial.log", "serial.log"),
        ("-monitor", "pipe:box", "box"),
        ("-virtfs", "local,path=share,mount_tag=s,security_model=none", "share"),
        ("-object", "rng-random,id=r,filename=urandom", "urandom"),
        ("-object", "secret,id=s,file=key", "key"),
        ("-smbios", "type=1,file=table.bin", "table.bin"),
        ("-netdev", "tap,id=n,script=up.sh", "up.sh"),
        ("-fw_cfg", "name=opt/a,file=a.txt", "a.txt"),
    ],
)
def test_a_relative_path_is_refused(option: str, value: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_whole_paths(["-smp", "2", option, value])
    said = str(caught.value)
    assert said.startswith(f"extra_args: {named} is a relative path (")
    assert f"{option} {value})" in said
    assert "write the whole path" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["-cdrom", "/vm/seed.iso"],
        ["-bios", "bios-microvm.bin"],
        ["-option-rom", "kvmvapic.bin"],
        ["-device", "virtio-net-pci,romfile=efi-virtio.rom,netdev=n"],
        ["-device", "virtio-blk-pci,drive=file"],
        ["-drive", "file=nbd:unix:/run/nbd.sock,readonly=on"],
        ["-drive", "file=ssh://host/dir/a.iso,readonly=on"],
        ["-drive", 'file=json:{"driver": "null-co"},readonly=on'],
        ["-drive", "file.driver=ssh,file.path=a.iso,file.host=h,readonly=on"],
        ["-blockdev", "driver=raw,node-name=x,file=y"],
        ["-blockdev", '{"driver": "raw", "file": "node"}'],
        ["-blockdev", "{no JSON"],
        ["-chardev", "socket,id=m,path=name,abstract=on,server=on"],
        ["-qmp", "unix:name,abstract=on,server=on"],
        ["-qmp", "tcp:localhost:4444,server=on"],
        ["-serial", "chardev:console"],
        ["-netdev", "tap,id=n,script=no,downscript=no"],
        ["-nic", "user,hostfwd=tcp::2222-:22"],
        ["-vnc", ":1"],
        ["-append", "file=a path=b"],
        ["-smp", "2", "-snapshot"],
    ],
)
def test_whole_paths_and_other_names_pass(arguments: list[str]) -> None:
    require_whole_paths(arguments)
