"""Each version of the manifest is read as when it was new, whatever a manifest learns later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcres.errors import CheckpointCorrupt
from dcres.model.formats import MemoryFormat
from dcres.storage import layout
from dcres.storage.format import manifest as manifests
from dcres.storage.format.manifest import HostPart, Manifest, dumps, loads
from dcres.storage.format.versions import VERSIONS, Version, framed
from dcres.storage.store.store import Store
from tests.support import earlier

PATH = Path("store/kept/manifest.json")
versions = pytest.mark.parametrize("version", earlier.VERSIONS)


class LaterPart(HostPart):
    """What a host saved, as a later dcres may know it."""

    pages_skipped: int = 0


class Later(Manifest):
    """A manifest with keys that no version of today has; all have defaults."""

    parent: str | None = None
    hosts: tuple[LaterPart, ...]


@pytest.fixture(scope="module", params=earlier.VERSIONS)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest file of an earlier checkpoint."""
    store = Store(tmp_path_factory.mktemp("earlier") / "store")
    kept = earlier.unpacked(store, request.param)
    path = store.root / kept.vm / kept.checkpoint / layout.MANIFEST
    return path.read_bytes().decode("ascii")


@pytest.fixture(params=["today", "later"])
def manifest_class(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> type[Manifest]:
    """What manifests are: those of today, or of a later dcres."""
    if request.param == "later":
        monkeypatch.setattr(manifests, "Manifest", Later)
    return manifests.Manifest


@pytest.fixture
def version_99(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that has the keys of `Later`."""
    first = VERSIONS[1].keys
    host = {"__all__": {**first["hosts"]["__all__"], "pages_skipped": True}}
    keys = {**first, "parent": True, "hosts": host}
    monkeypatch.setitem(VERSIONS, 99, Version(keys, frozenset(MemoryFormat)))


def without_sum(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text)
    del values["checksum"]
    return values


@versions
def test_an_earlier_checkpoint_is_read_and_verified(tmp_path: Path, version: int) -> None:
    store = Store(tmp_path / "store")
    kept = earlier.unpacked(store, version)
    assert kept.format_version == version
    assert tuple(part.pages for part in kept.hosts) == earlier.PAGES
    report = store.verify(kept.checkpoint)
    assert (report.ok, report.pages) == (True, sum(earlier.PAGES))
    for path in sorted((store.root / kept.vm / kept.checkpoint).glob("*/*")):
        sound = path.read_bytes()
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]) if sound else b"\0")
        assert not store.verify(kept.checkpoint).ok, path
        path.write_bytes(sound)


def test_it_is_read_and_written_in_the_same_bytes(text: str, manifest_class: type) -> None:
    read = loads(text, PATH)
    assert type(read) is manifest_class
    assert dumps(read) == text


def test_every_flipped_byte_is_found(text: str, manifest_class: type) -> None:
    data = text.encode()
    for place in range(len(data)):
        flipped = bytes([data[place] ^ (1 << place % 7)])
        with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
            loads((data[:place] + flipped + data[place + 1 :]).decode(), PATH)


@pytest.mark.parametrize(
    "more",
    [
        lambda values: values.update(base=None),
        lambda values: values.update(base="kept-20260101-000000-0000"),
        lambda values: values.update(parent=None),
        lambda values: values.update(chain=[]),
        lambda values: values.update(pages_saved=0),
        lambda values: values["hosts"][1].update(segments=None),
        lambda values: values["hosts"][1].update(pages_skipped=0),
        lambda values: values.pop("rounds"),
        lambda values: values["hosts"][1].pop("memory_file"),
        lambda values: values["paging_during"].pop("pages_in"),
    ],
)
def test_a_version_takes_its_own_keys_and_no_others(
    text: str, manifest_class: type, more: Any
) -> None:
    values = without_sum(text)
    more(values)
    with pytest.raises(CheckpointCorrupt):
        loads(framed(values), PATH)


def places(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to each value in a JSON value."""
    pairs: Any = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


ANYTHING = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1,
        1 << 70,
        0.00004,
        1.5,
        "",
        "1",
        "\u2028",
        "../x",
        [],
        {},
        [None],
        {"a": 1},
    ]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_what_is_read_is_exactly_what_would_be_written(
    text: str, manifest_class: type, data: st.DataObject
) -> None:
    """Whatever another program puts into one place, with a right checksum."""
    values = without_sum(text)
    *way, last = data.draw(st.sampled_from(list(places(values))))
    inner: Any = values
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(ANYTHING | st.sampled_from([str(inner[last]), [inner[last]]]))
    forged = framed(values)
    try:
        read = loads(forged, PATH)
    except CheckpointCorrupt:
        return
    assert dumps(read) == forged


def test_a_later_version_has_its_own_keys(
    text: str, version_99: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "Manifest", Later)
    values = without_sum(text)
    values.update(format_version=99, parent="kept-20260101-000000-0000")
    for number, host in enumerate(values["hosts"]):
        host["pages_skipped"] = number
    newest = framed(values)
    read = loads(newest, PATH)
    assert isinstance(read, Later)
    assert (read.parent, read.hosts[2].pages_skipped) == ("kept-20260101-000000-0000", 2)
    assert dumps(read) == newest
    assert dumps(loads(text, PATH)) == text, "and the earlier ones theirs"
    for key in ("parent", "rounds"):
        short = {name: value for name, value in values.items() if name != key}
        with pytest.raises(CheckpointCorrupt, match="encoded differently"):
            loads(framed(short), PATH)


def test_what_a_newer_dcres_wrote_is_told_from_what_is_damaged(text: str) -> None:
    values = {**without_sum(text), "format_version": 99, "hosts": "of another shape"}
    with pytest.raises(CheckpointCorrupt, match=r"99: a newer dcres wrote it.* up to 3; use a"):
        loads(framed(values), PATH)
    with pytest.raises(CheckpointCorrupt, match="checksum differs"):
        loads(framed(values).replace("another", "anothen"), PATH)
    for number in (0, -1, True, 1.0, "1", None, [1]):
        with pytest.raises(CheckpointCorrupt, match="which no dcres wrote"):
            loads(framed({**values, "format_version": number}), PATH)
