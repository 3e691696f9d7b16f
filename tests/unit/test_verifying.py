"""What verifying says of a file that several checkpoints share, and of one that is not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dcres.api import catalogue
from dcres.api.catalogue import StoreHere
from dcres.cli import main
from dcres.errors import NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.storage import layout
from dcres.storage.format.checks import FileState, VerifyReport
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store
from tests.support.chains import Chain, Change


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Three checkpoints, each with pages that those before do not have."""
    made = Chain(tmp_path)
    for first in (0, 16, 32):
        for host in range(3):
            made.change(Change("write", first + 4 * host, first + 4 * host + 4, host))
        made.take()
    return made


def pack_of(chain: Chain, origin: int, at: int, host: str = "h1") -> Path:
    """The pack that one checkpoint wrote, as another has it."""
    name = layout.by_origin(chain.taken[origin].checkpoint, layout.SEGMENT_PACK)
    return chain.folder(chain.taken[at], host) / name


def spoil(path: Path, offset_bytes: int = 7) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        was = file.read(1)
        file.seek(offset_bytes)
        file.write(bytes([was[0] ^ 1]))


def damaged(report: VerifyReport) -> dict[str, tuple[FileState, tuple[str, ...]]]:
    return {file.name: (file.state, file.also_in) for file in report.files if not file.ok}


def test_damage_names_every_checkpoint_that_has_the_file(chain: Chain) -> None:
    ids = [each.checkpoint for each in chain.taken]
    spoil(pack := pack_of(chain, 1, 2), PAGE_SIZE)
    assert chain.store.verify(ids[0]).ok
    for at in (1, 2):
        report = chain.store.verify(ids[at])
        assert damaged(report) == {pack.name: (FileState.CORRUPT, (ids[3 - at],))}


def test_a_copy_under_the_same_name_is_another_file(chain: Chain) -> None:
    pack = pack_of(chain, 0, 2)
    shutil.copy(pack, pack.with_name(".copy"))
    os.replace(pack.with_name(".copy"), pack)
    spoil(pack)
    assert damaged(chain.store.verify(chain.taken[2].checkpoint))[pack.name][1] == ()
    assert chain.store.verify(chain.taken[1].checkpoint).ok


def test_what_is_not_published_is_not_named(chain: Chain) -> None:
    ids = [each.checkpoint for each in chain.taken]
    spoil(pack := pack_of(chain, 0, 0))
    (chain.store.root / "vm" / ids[1] / layout.MANIFEST).unlink()
    report = chain.store.verify(ids[0])
    assert damaged(report)[pack.name][1] == (ids[2],)


def test_a_store_without_the_manifest_names_what_it_has(chain: Chain) -> None:
    """As a sub host's own store has it."""
    ids = [each.checkpoint for each in chain.taken]
    spoil(pack := pack_of(chain, 0, 0))
    for each in ids:
        (chain.store.root / "vm" / each / layout.MANIFEST).unlink()
    part = chain.store.verify_part(chain.taken[0], "h1")
    assert damaged(part.report)[pack.name][1] == (ids[1], ids[2])


def test_missing_is_not_corrupt(chain: Chain) -> None:
    pack_of(chain, 1, 2).unlink()
    report = chain.store.verify(chain.taken[2].checkpoint)
    assert damaged(report) == {pack_of(chain, 1, 2).name: (FileState.MISSING, ())}
    assert chain.store.verify(chain.taken[1].checkpoint).ok


def test_the_command(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [each.checkpoint for each in chain.taken]
    spoil(pack := pack_of(chain, 0, 0))
    command = ["--store", str(chain.store.root), "verify", ids[1]]
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert ids[0] in shown
    assert ids[2] in shown
    assert main([*command, "--json"]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    (bad,) = [each for each in files if not each["ok"]]
    assert (bad["host"], bad["name"], bad["state"]) == ("h1", pack.name, "corrupt")
    assert bad["also_in"] == [ids[0], ids[2]]
    whole = next(each for each in files if each["ok"])
    assert (whole["state"], whole["also_in"], whole["problem"]) == ("whole", [], None)


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_damaged(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, store = StoreHere(chain.store.root), chain.store
    verify_part: Callable[..., object] = Store.verify_part

    def late(self: Store, manifest: Manifest, host: str, *rest: object) -> object:
        if host == "h1":
            store.delete(manifest.checkpoint)
        return verify_part(self, manifest, host, *rest)

    monkeypatch.setattr(Store, "verify_part", late)
    with pytest.raises(NotFound, match="was deleted while it was read"):
        catalogue.verify(here, chain.taken[2].checkpoint, False)
