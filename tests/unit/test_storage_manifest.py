"""The manifest: exactly what was written, or an error that names the file."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dcres import config
from dcres.errors import CheckpointCorrupt
from dcres.storage import layout
from dcres.storage.digest import FileSum
from dcres.storage.format.manifest import (
    HostPart,
    Manifest,
    Mode,
    Role,
    Segment,
    chain_upon,
    dumps,
    loads,
)
from dcres.storage.format.versions import canonical

PATH = Path("store/demo/manifest.json")
CORE = FileSum(name="vmcore", length_bytes=5, sha256="0" * 64)


def part(host: str, role: Role, pages: int = 1) -> HostPart:
    return HostPart(
        host=host,
        role=role,
        share_bytes=4096,
        pages=pages,
        bytes_written=4096,
        file_bytes_allocated=4096,
        seconds=0.5,
        files=(CORE,) if role is Role.MAIN else (),
    )


MAIN = part("h0", Role.MAIN)


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "checkpoint": "demo-20260301-120000-00ab",
        "vm": "demo",
        "created": "2026-03-01T12:00:00Z",
        "mode": Mode.STOP,
        "memory_bytes": 8192,
        "generation": 1,
        "vm_spec": {"name": "demo", "append": "ü", "list": [1, None, True]},
        "qemu_version": "7.2",
        "accel": "tcg",
        "tick": 3,
        "hosts": (part("h0", Role.MAIN), part("h1", Role.SUB)),
        "vmcore": CORE,
        "seconds": 1.000049,
        "downtime_seconds": 0.00002,
    }
    return Manifest(**values | changes)


def signed(values: dict[str, Any]) -> str:
    values.pop("checksum", None)
    values["checksum"] = hashlib.sha256(canonical(values)).hexdigest()
    return json.dumps(values, sort_keys=True, indent=2) + "\n"


def changed(**changes: Any) -> str:
    return signed(json.loads(dumps(manifest())) | changes)


def test_round_trip() -> None:
    text = dumps(manifest())
    assert text.isascii()
    assert loads(text, PATH) == manifest()
    assert text == changed()


def core(**changes: object) -> str:
    """The manifest with another VM core, where it is named and where it is listed."""
    sound = json.loads(dumps(manifest()))
    vmcore = {**sound["vmcore"], **changes}
    main, *subs = sound["hosts"]
    files = [vmcore if each == sound["vmcore"] else each for each in main["files"]]
    return changed(vmcore=vmcore, hosts=[{**main, "files": files}, *subs])


def test_strings_are_escaped_as_documented() -> None:
    """Another program that escapes otherwise would write what no reader takes."""
    text = '"\\/ ~\b\f\n\r\t\0\x1f\x7f\xe9\u2028\U0001f600'
    escaped = r'"\"\\/ ~\b\f\n\r\t\u0000\u001f\u007f\u00e9\u2028\ud83d\ude00"'
    written = dumps(manifest(vm_spec={"append": text}))
    assert f'"append": {escaped}\n' in written
    assert loads(written, PATH).vm_spec == {"append": text}


def test_durations_never_need_an_exponent() -> None:
    values = json.loads(dumps(manifest()))
    assert (values["seconds"], values["downtime_seconds"]) == (1.0, 0.0)
    assert "0.0001" in dumps(manifest(seconds=0.0001))


def test_every_flipped_bit_is_found() -> None:
    text = dumps(manifest()).encode()
    for place in range(len(text)):
        for bit in range(8):
            altered = text[:place] + bytes([text[place] ^ (1 << bit)]) + text[place + 1 :]
            with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
                loads(altered.decode("latin-1"), PATH)


def test_every_truncation_is_found() -> None:
    text = dumps(manifest())
    for length in range(len(text)):
        with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
            loads(text[:length], PATH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "checksum differs"),
        ("[" * 100_000, "not JSON"),
        ('{"seconds": NaN}', "not JSON"),
        (changed(colour="red"), "colour: Extra inputs"),
        (changed(format_version=4), "use a dcres that reads version 4"),
        (changed(machine={"run_state": "asleep"}), "run state is not known"),
        (changed(machine={"stopped": "yesterday"}), "when the VM was paused is missing"),
        (changed(format_version=2), "sparse memory files are not of this format version"),
        (changed(format_version="1"), "format version is '1'"),
        (changed(tick=-1), "tick: "),
        (changed(memory_bytes=5000), "memory_bytes: "),
        (changed(vm="../x"), "vm: "),
        (changed(tick="3"), "encoded differently"),
        (core(name="../x"), "files.0: .*cannot be the name of a file"),
        (core(length_bytes=-1), "files.0: .*cannot have -1 bytes"),
        (core(sha256="0" * 63), "files.0: .*is not a SHA-256"),
        (core(sha256=None), "sha256: "),
        (core(length_bytes="five"), "length_bytes: "),
        (core(length_bytes=5.0), "encoded differently"),
        (core(length_bytes="5"), "encoded differently"),
        (core(colour="red"), "files.0.colour: Unexpected"),
        (dumps(manifest()) + "\n", "encoded differently"),
        (dumps(manifest()).replace('"tick"', '"tick": 3, "tick"'), "encoded differently"),
    ],
)
def test_what_is_not_a_manifest(text: str, message: str) -> None:
    with pytest.raises(CheckpointCorrupt, match=message) as caught:
        loads(text, PATH)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hosts": ()}, "at least 1"),
        ({"hosts": (part("h0", Role.SUB),)}, "first host is the main host"),
        ({"hosts": (part("h0", Role.MAIN), part("h1", Role.MAIN))}, "the only one"),
        ({"hosts": (part("h0", Role.MAIN), part("h0", Role.SUB))}, "named twice"),
        ({"hosts": (part("h0", Role.MAIN, pages=3),)}, "more pages than the VM has"),
        ({"vmcore": FileSum(name="x", length_bytes=5, sha256="0" * 64)}, "VM core"),
        ({"seconds": float("inf")}, "finite"),
        ({"hosts": (MAIN.model_copy(update={"files": (CORE, CORE)}),)}, "h0 is listed twice"),
        ({"hosts": (MAIN.model_copy(update={"memory_file": "memory.pack"}),)}, "of sparse ones"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        manifest(**changes)


OWN, OLD, OLDEST = (f"demo-20260301-120000-00{token}" for token in ("ab", "aa", "a9"))


WHOLE: dict[str, Any] = {
    "memory_format": "sparse",
    "hosts": (MAIN,),
    "base": None,
    "chain": (),
    "pages_changed": 0,
    "pages_saved": 0,
}


def piece(checkpoint: str, pages: int = 1) -> Segment:
    return Segment(checkpoint=checkpoint, pages=pages, gone=0, places=pages)


def segmented(host: str, role: Role, *checkpoints: str, merged: int = -1) -> HostPart:
    pieces = [piece(each) for each in checkpoints or (OLDEST, OLD, OWN)]
    segments = tuple(
        each.model_copy(update={"merged": at == merged}) for at, each in enumerate(pieces)
    )
    values = part(host, Role.MAIN if role is Role.MAIN else Role.SUB).model_dump()
    return HostPart(**values | {"role": role, "segments": segments})


def increment(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "memory_format": "segmented",
        "hosts": (
            segmented("h0", Role.MAIN, OLDEST, OLD, OWN),
            segmented("h1", Role.PARTS, OLD, OWN),
        ),
        "base": OLD,
        "chain": (OLDEST, OLD, OWN),
        "pages_changed": 3,
        "pages_saved": 2,
    }
    return manifest(**values | changes)


def test_an_increment_has_keys_of_its_own() -> None:
    text = dumps(increment())
    assert loads(text, PATH) == increment()
    values = json.loads(text)
    assert values["format_version"] == 3
    assert (values["base"], values["chain"]) == (OLD, [OLDEST, OLD, OWN])
    assert values["hosts"][1]["role"] == "parts"
    assert values["hosts"][1]["segments"][0] == {
        "checkpoint": OLD,
        "gone": 0,
        "merged": False,
        "pages": 1,
        "places": 1,
    }
    assert "memory_file" not in values["hosts"][0]
    assert {part.memory_file for part in increment().hosts} == {"20260301-120000-00ab.pack"}
    older = json.loads(dumps(manifest()))
    new = {*values} - {*older}
    assert new == {"base", "chain", "pages_changed", "pages_saved"}
    assert {*older["hosts"][0]} - {*values["hosts"][0]} == {"memory_file"}
    for key in new:
        with pytest.raises(CheckpointCorrupt):
            loads(signed({**older, key: values[key]}), PATH)
        with pytest.raises(CheckpointCorrupt):
            loads(signed({name: each for name, each in values.items() if name != key}), PATH)
    wrong: tuple[dict[str, Any], ...] = (
        {"segments": None},
        {"segments": []},
        {"segments": "x"},
        {"segments": [{}]},
    )
    for change in wrong:
        hosts = [{**values["hosts"][0], **change}, values["hosts"][1]]
        with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
            loads(signed({**values, "hosts": hosts}), PATH)


def test_what_is_merged_comes_first() -> None:
    """And then the chain begins with what is left."""
    hosts = segmented("h0", Role.MAIN, OLD, OWN, merged=0), segmented("h1", Role.SUB, OWN)
    made = increment(hosts=hosts, chain=(OLD, OWN))
    assert loads(dumps(made), PATH) == made
    assert [segment.file("x") for segment in made.main.segments or ()] == [
        "20260301-120000-00aa.merged.x",
        "20260301-120000-00ab.x",
    ]
    assert (made.most_segments, increment().most_segments) == (2, 3)
    mixed = increment(hosts=(hosts[0], segmented("h1", Role.SUB, OLDEST, OWN)))
    assert mixed.chain == (OLDEST, OLD, OWN)
    assert chain_upon(mixed, "x", {OLDEST, OLD, OWN}) == (OLDEST, OLD, OWN, "x")
    assert chain_upon(mixed, "x", {OWN}) == (OWN, "x")
    assert chain_upon(None, "x", {OWN}) == ("x",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hosts": (segmented("h0", Role.MAIN, OLDEST, OLD, OWN, merged=1),)},
            "a merged segment of h0 is not its first",
        ),
        (
            {"hosts": (segmented("h0", Role.MAIN, OWN, merged=0),)},
            "a memory file does not have the name of segmented ones",
        ),
        (
            {"hosts": (segmented("h0", Role.MAIN, OLDEST, OWN),)},
            "the main host lacks segments of the chain",
        ),
        (
            {"hosts": (segmented("h0", Role.MAIN, OLD, OWN),)},
            "the main host lacks segments of the chain",
        ),
        ({"chain": ()}, "not of different checkpoints of this VM"),
        ({"chain": (OLD, OLD, OWN)}, "not of different checkpoints"),
        ({"chain": ("other-20260301-120000-0000", OLDEST, OLD, OWN)}, "checkpoints of this VM"),
        ({"chain": (OLD, OLDEST, OWN)}, "does not end with its base"),
        ({"chain": (OLDEST, OWN, OLD)}, "does not end with its base"),
        ({"base": None}, "does not end with its base"),
        ({"base": OWN}, "does not end with its base"),
        ({"chain": (OLD, OWN)}, "segments of h0 are not of the chain, in its order"),
        ({"hosts": (segmented("h0", Role.MAIN, OLD, OLDEST, OWN),)}, "in its order"),
        ({"hosts": (segmented("h0", Role.MAIN, OLD, OLD, OWN),)}, "in its order"),
        ({"hosts": (segmented("h0", Role.MAIN, OLD),)}, "of segmented ones"),
        ({"hosts": (MAIN,)}, "of segmented ones"),
        (
            {
                "hosts": (
                    segmented("h0", Role.MAIN),
                    segmented("h1", Role.PARTS),
                    segmented("h2", Role.SUB),
                )
            },
            "first host is the main host",
        ),
        ({"memory_format": "packed", "hosts": (MAIN,)}, "of packed ones"),
        *(
            ({**WHOLE, **change}, "only segmented checkpoints have a base, a chain and its pages")
            for change in (
                {"base": OLD},
                {"chain": (OWN,)},
                {"pages_changed": 1},
                {"pages_saved": 1},
            )
        ),
        (
            {**WHOLE, "hosts": (MAIN.model_copy(update={"segments": ()}),)},
            "only segmented checkpoints have segments",
        ),
        (
            {**WHOLE, "hosts": (MAIN, part("h1", Role.PARTS))},
            "only segmented checkpoints have hosts that are not the VM's",
        ),
    ],
)
def test_what_no_increment_can_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        increment(**changes)


def test_what_the_vm_was_in_is_kept_of_one_that_tells_it() -> None:
    old = manifest()
    assert (old.run_state, old.stopped_at.isoformat()) == ("running", "2026-03-01T12:00:00+00:00")
    new = manifest(machine={"run_state": "paused", "stopped": "2026-03-01T12:00:07Z"})
    assert loads(dumps(new), PATH) == new
    assert (new.run_state, new.stopped_at.second) == ("paused", 7)


def test_vm_names_are_those_of_vm_files() -> None:
    assert layout.VM_PATTERN == config.NAME_PATTERN
    assert re.fullmatch(layout.CHECKPOINT_PATTERN, "a-20260101-000000-0000")
