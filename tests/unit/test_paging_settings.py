"""What a paging process is told at its start comes to it as it was meant."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import ConfigError
from dcres.paging import settings
from dcres.paging.settings import SubAddress


@dataclass(frozen=True, slots=True)
class Some:
    folder: Path
    count: int
    host: SubAddress | None
    others: tuple[SubAddress, ...] = ()


HOST = SubAddress("h1", "127.0.0.1", 7, code=16)


@pytest.mark.parametrize(
    "some", [Some(Path("/a"), 3, HOST, (HOST, HOST)), Some(Path("b/c"), 0, None)]
)
def test_round_trip(tmp_path: Path, some: Some) -> None:
    settings.save(some, tmp_path / "some.json")
    assert settings.load(Some, tmp_path / "some.json") == some


def test_what_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        settings.save(Some(Path(), np.int64(3), None), tmp_path / "some.json")  # type: ignore[arg-type]
    assert not (tmp_path / "some.json").exists()


@pytest.mark.parametrize("change", [{"colour": "red"}, {"host": {"name": "h1"}}, {"count": None}])
def test_settings_of_another_version(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "some.json"
    settings.save(Some(Path("/a"), 3, HOST), path)
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: each for name, each in values.items() if each is not None}))
    with pytest.raises(ConfigError, match=r"some\.json is not of this version of dcres"):
        settings.load(Some, path)
