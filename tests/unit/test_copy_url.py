"""URLs of places for copies: what is refused, and that no secret is shown."""

from __future__ import annotations

import pickle

import pytest

from dcres.errors import ConfigError
from dcres.storage.store.copy_url import parse

SECRET = (
    "s3://AKIAUSER:very%2Fsecret@bucket/pre/?endpoint_override=http://127.0.0.1:1&region=r&k=hid"
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/mnt/backup", "write file:///mnt/backup"),
        ("h1,h2", "the place of a copy is a URL"),
        ("ftp://host/x", "ftp:// are not supported"),
        ("s3:///prefix", "names no bucket"),
        ("s3://bucket:80/x", "endpoint_override"),
        ("s3://bucket/x#y", "has a #"),
        ("file://mnt/backup", "three slashes"),
        ("file:///mnt?x=1", "three slashes"),
        ("s3://[bucket", "cannot be read"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace("?", r"\?")):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAUSER:very/secret@bucket/x",
        "s3://AKIAUSER:very#secret@bucket/x",
        "s3://AKIAUSER:very?secret@bucket/x",
        "AKIAUSER:secret@bucket/x",
        "ftp://AKIAUSER:secret@bucket/x",
        "s3://AKIAUSER:sec[ret@bucket/x",
    ],
)
def test_what_is_refused_is_not_shown(text: str) -> None:
    """A secret that is not encoded cuts the URL in other places: nothing of it is repeated."""
    with pytest.raises(ConfigError) as told:
        parse(text)
    assert "secret" not in str(told.value)
    assert "AKIA" not in str(told.value)


def test_what_is_shown() -> None:
    url = parse(SECRET)
    shown = "s3://bucket/pre?endpoint_override=http://127.0.0.1:1&region=r"
    assert url.shown == shown
    assert repr(url) == f"<{shown}>"
    assert url.of("demo/x") == shown.replace("pre", "pre/demo/x")
    assert parse(shown).shown == shown


@pytest.mark.parametrize("secret", ["AKIAUSER", "very%2Fsecret", "very/secret", "hid", SECRET])
def test_what_a_library_says_is_scrubbed(secret: str) -> None:
    url = pickle.loads(pickle.dumps(parse(SECRET)))
    said = url.scrubbed(f"cannot open {secret}, or {url.whole}")
    assert secret not in said
    assert "very" not in said


def test_a_folder() -> None:
    url = parse("file:///mnt/backup/")
    assert (url.whole, url.shown, url.secrets) == ("file:///mnt/backup", "file:///mnt/backup", ())
