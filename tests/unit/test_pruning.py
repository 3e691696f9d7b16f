"""Pruning in a real store."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from dcres.api.catalogue import StoreHere
from dcres.api.pruning import plan_pruning, prune
from dcres.cli import main
from dcres.config import vm_spec
from dcres.errors import ConfigError, NotFound, OperationFailed, StorageError
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.pins import Hold, pinned
from dcres.storage.store.store import Store
from tests.support.stored import NOW, PAGE_COUNT, memory, take


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def five(store: Store, tmp_path: Path) -> list[str]:
    """Checkpoints, an hour apart, the newest first; another VM has one as well."""
    taken = [one(store, tmp_path, hours) for hours in range(5)]
    one(store, tmp_path, 0, vm="other")
    return [each.checkpoint for each in reversed(taken)]


def one(store: Store, folder: Path, hours: int, vm: str = "demo", keep: object = None) -> Manifest:
    ram = memory(folder / "ram", np.ones(PAGE_COUNT, dtype=bool))
    manifest = take(store, ram, vm=vm, now=NOW + timedelta(hours=hours))
    if keep is not None:
        spec = {**manifest.vm_spec, "protect": {"keep": keep}}
        manifest = manifest.model_copy(update={"vm_spec": spec})
    store.publish(manifest)
    return manifest


def listed(store: Store, vm: str = "demo") -> list[str]:
    return [each.checkpoint for each in reversed(store.list(vm))]


def test_what_no_rule_keeps_is_removed_the_oldest_first(
    store: Store, five: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = StoreHere(store.root)
    planned = plan_pruning(here, "demo", "last=2")
    assert [each.checkpoint for each in planned.fates] == five == listed(store)
    assert [each.reasons for each in planned.fates] == [("last",), ("last",), (), (), ()]
    order: list[str] = []
    delete = StoreHere.delete

    def noted(here: StoreHere, checkpoint: str) -> None:
        order.append(checkpoint)
        delete(here, checkpoint)

    monkeypatch.setattr(StoreHere, "delete", noted)
    done = prune(here, planned)
    assert order == five[:1:-1]
    freed = sum(each.size_bytes for each in planned.going)
    assert done.to_dict()["freed_bytes"] == freed > 0
    assert listed(store) == five[:2]
    assert len(listed(store, "other")) == 1
    assert (done.problems, done.to_dict()["removed"]) == ((), five[2:])
    assert not plan_pruning(here, "demo", "last=2").going


def test_the_vm_file_of_the_newest_checkpoint_counts(
    store: Store, five: list[str], tmp_path: Path
) -> None:
    here = StoreHere(store.root)
    with pytest.raises(ConfigError, match=r"its VM file has no protect\.keep; give --keep"):
        plan_pruning(here, "demo")
    one(store, tmp_path, 7, keep={"last": 1, "hourly": 0})
    assert [each.reasons for each in plan_pruning(here, "demo").fates] == [("last",)] + [()] * 5
    with pytest.raises(ConfigError, match="keep: 'often' is no rule"):
        plan_pruning(here, "demo", "often=3")
    with pytest.raises(NotFound, match="VM nix has no checkpoint here"):
        plan_pruning(here, "nix", "last=1")
    assert len(listed(store)) == 6


def test_what_is_being_read_stays(store: Store, five: list[str]) -> None:
    here = StoreHere(store.root)
    hold = Hold()
    hold.take(five[4], pinned(store.root / "demo" / five[4]))
    done = prune(here, plan_pruning(here, "demo", "last=1"))
    assert listed(store) == [five[0], five[4]]
    assert [problem.split(":")[0] for problem in done.problems] == [five[4]]
    hold.drop()
    assert prune(here, plan_pruning(here, "demo", "last=1")).problems == ()
    assert listed(store) == five[:1]


def test_what_cannot_be_read_counts_for_no_rule_and_stays(store: Store, five: list[str]) -> None:
    (store.root / "demo" / five[0] / "manifest.json").write_text("{")
    here = StoreHere(store.root)
    planned = plan_pruning(here, "demo", "last=1")
    assert planned.fates[0].reasons == ("its manifest cannot be read; `dcres delete` removes it",)
    assert planned.fates[1].reasons == ("last",)
    prune(here, planned)
    assert listed(store) == five[:2]


def test_what_cannot_be_restored_counts_for_no_rule_and_stays(
    store: Store, five: list[str]
) -> None:
    """The disk of one of its hosts is gone: no reason to remove the last one that is whole."""
    shutil.rmtree(store.root / "demo" / five[0] / "h1")
    here = StoreHere(store.root)
    planned = plan_pruning(here, "demo", "last=1")
    assert planned.fates[0].reasons == ("its part on h1 is not to be found",)
    assert planned.fates[1].reasons == ("last",)
    prune(here, planned)
    assert listed(store) == five[:2]


def test_one_that_fails_does_not_keep_the_others(
    store: Store, five: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = StoreHere.delete

    def fail(here: StoreHere, checkpoint: str) -> None:
        if checkpoint == five[4]:
            raise StorageError("the disk is broken")
        delete(here, checkpoint)
        if checkpoint == five[3]:
            raise OperationFailed("not all of its files", {"h1": "it does not answer"})

    monkeypatch.setattr(StoreHere, "delete", fail)
    here = StoreHere(store.root)
    done = prune(here, plan_pruning(here, "demo", "last=1"))
    assert listed(store) == [five[0], five[4]]
    assert done.to_dict()["removed"] == five[1:4]
    assert done.problems == (
        f"{five[3]}: not all of its files (h1: it does not answer)",
        f"{five[4]}: the disk is broken",
    )


def test_what_somebody_else_removes_meanwhile_is_gone(store: Store, five: list[str]) -> None:
    here = StoreHere(store.root)
    planned = plan_pruning(here, "demo", "last=1")
    store.delete(five[2])
    assert prune(here, planned).problems == ()
    assert listed(store) == five[:1]


def test_the_command(store: Store, five: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--store", str(store.root), "prune", "demo", "--keep", "last=1,hourly=2"]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "last, hourly" in shown
    assert shown.count("would be removed") == 4, "three lines and the sum"
    assert "nothing was changed" in shown
    assert main(command) == 2, "nobody can be asked"
    assert "needs confirmation; give --yes" in capsys.readouterr().err
    assert listed(store) == five
    assert main([*command, "--yes", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["removed"] == five[2:]
    assert values["keep"]["hourly"] == 2
    assert [each["keep"] for each in values["checkpoints"]] == [True] * 2 + [False] * 3
    assert main([*command, "--json"]) == 0, "nothing goes, so nobody is asked"
    assert json.loads(capsys.readouterr().out)["removed"] == []
    assert main([*command[:-1], "last=none"]) == 2


def test_a_vm_file_says_what_to_keep() -> None:
    values = {"name": "box", "memory": "1GiB", "kernel": "/k", "layout": {"main": "1GiB"}}
    spec = vm_spec({**values, "protect": {"keep": {"last": 3}}})
    again = vm_spec(spec.model_dump(mode="json", by_alias=True))
    assert spec.protect is not None
    assert str(spec.protect.keep) == "last=3"
    assert again == spec
    assert vm_spec({**values, "protect": {"keep": "last=3"}}) == spec
    with pytest.raises(ConfigError, match=r"protect\.keep: 'often' is no rule"):
        vm_spec({**values, "protect": {"keep": {"often": 3}}})
