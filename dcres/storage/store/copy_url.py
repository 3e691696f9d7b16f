"""The URL of a place for copies: checked before anything is sent, and shown without secrets.

It may carry credentials, as pyarrow's file systems take them: a user and a password, and keys in
its query. Nothing of these gets into an error, a log or a record; `CopyUrl.shown` is what people
see, and `CopyUrl.scrubbed` is for what a library says.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from dcres.errors import ConfigError

_SCHEMES = ("s3", "gs", "file")
_TOLD = ("endpoint_override", "region", "scheme")  # query keys without secrets
_HIDDEN = "…"
_FORMS = "write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER"


@dataclass(frozen=True, slots=True)
class CopyUrl:
    """Where copies are; `parse` makes one. Its repr shows no secret either."""

    whole: str
    shown: str
    secrets: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<{self.shown}>"

    @property
    def is_file(self) -> bool:
        """Whether it is a folder, and no object store."""
        return self.whole.startswith("file:")

    def of(self, path: str) -> str:
        """How an object at `path` below it is named for people."""
        place, _, query = self.shown.partition("?")
        return f"{place}/{path}" + (f"?{query}" if query else "")

    def scrubbed(self, text: str) -> str:
        """`text` without what may be secret."""
        for secret in (self.whole, *self.secrets):
            text = text.replace(secret, _HIDDEN)
        return text


def parse(text: str) -> CopyUrl:
    """The URL in `text`, without looking at what is there. Raises ConfigError."""
    if "://" not in text:
        hint = f"write file://{text}" if text.startswith("/") else _FORMS
        raise ConfigError(f"the place of a copy is a URL; {hint}")
    # What cannot be taken apart is not shown: nobody knows which part of it is the secret.
    try:
        parts = urlsplit(text)
        port, user, password = parts.port, parts.username, parts.password
    except ValueError:
        raise ConfigError(
            "the URL of the copy cannot be read; percent-encode its user and password, and "
            f"{_FORMS}"
        ) from None
    if parts.scheme not in _SCHEMES:
        raise ConfigError(f"copies at {parts.scheme}:// are not supported; {_FORMS}")
    _require_place(parts, port)
    whole = text.partition("?")[0].rstrip("/") + (f"?{parts.query}" if parts.query else "")
    query = parse_qsl(parts.query, keep_blank_values=True)
    hidden = [value for key, value in query if not _may_be_told(key, value)]
    return CopyUrl(whole, _shown(parts, query), _every_form(user, password, *hidden))


def _require_place(parts: SplitResult, port: int | None) -> None:
    if parts.fragment or (parts.scheme != "file" and (port is not None or "@" in parts.path)):
        raise ConfigError(
            "the URL of the copy has a # or a port, or a user or password with a character that "
            "must be percent-encoded; encode it, and give another endpoint as "
            "?endpoint_override=http://HOST:PORT"
        )
    if parts.scheme == "file":
        if parts.netloc or parts.query or not parts.path.startswith("/"):
            raise ConfigError("the URL of a copy in a folder has three slashes: file:///FOLDER")
    elif not parts.hostname:
        raise ConfigError(f"the URL of the copy names no bucket; {_FORMS}")


def _may_be_told(key: str, value: str) -> bool:
    return key in _TOLD and "@" not in value


def _shown(parts: SplitResult, query: list[tuple[str, str]]) -> str:
    told = urlencode([each for each in query if _may_be_told(*each)], safe=":/")
    place = f"{parts.scheme}://{parts.hostname or ''}{parts.path.rstrip('/')}"
    return f"{place}?{told}" if told else place


def _every_form(*secrets: str | None) -> tuple[str, ...]:
    """As they were written and decoded, the longest first: one may be a part of another."""
    forms = {form for each in secrets if each for form in (each, unquote(each))}
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))
