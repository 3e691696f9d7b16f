"""What is no Ray cluster that can be joined is told in seconds, and Ray's core never asked."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dcres.actors.ray.gateway import connection, looking
from dcres.errors import ClusterError


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of something that gives every connection to `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer = server.accept()[0]
                except OSError:
                    return
                with suppress(OSError):  # whoever only looks whether somebody listens goes at once
                    answer(peer)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)


def http_server(peer: socket.socket) -> None:
    with peer:
        http.server.SimpleHTTPRequestHandler(peer, ("127.0.0.1", 1), None)  # type: ignore[arg-type]


def ssh_server(peer: socket.socket) -> None:
    with peer:
        peer.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")
        peer.recv(1 << 16)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster's token, also none of this machine's."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what `connect` sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


class TestWhatListens:
    def refused(self, address: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
        sentence = f"what listens at {address} does not answer as a Ray cluster.*{words}"
        with pytest.raises(ClusterError, match=sentence):
            connection.connect(address)
        assert capfd.readouterr() == ("", ""), "nothing is printed past us"

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            (http_server, r"\(it speaks another protocol\); write host:port of the cluster's head"),
            (ssh_server, r"\(it speaks another protocol\)"),
            (socket.socket.close, "; write host:port"),
        ],
    )
    def test_something_else(
        self,
        answer: Callable[[socket.socket], None],
        words: str,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        with listening(answer) as address:
            self.refused(address, words, capfd)

    def test_something_silent(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(looking, "_ANSWER_TIMEOUT_S", 0.5)
        kept: list[socket.socket] = []
        with listening(kept.append) as address:
            self.refused(address, r"\(no answer in 0\.5 s\)", capfd)
        for each in kept:
            each.close()

    def test_nothing(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
                looking.require_listener(address)

    def test_at_an_ipv6_address(self) -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            looking.require_listener(f"[::1]:{server.getsockname()[1]}")


class TestTokens:
    """Ray's core aborts without one, with a stack on standard error."""

    def test_where_none_is_needed(self) -> None:
        looking.require_token()

    @pytest.mark.parametrize("text", [None, "", " \n"])
    @pytest.mark.parametrize("named", [True, False])
    def test_one_that_is_not_there(
        self, text: str | None, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / ".ray" / "auth_token"
        path.parent.mkdir()
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        if named:
            path = tmp_path / "token"
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        if text is not None:
            path.write_text(text)
        why = "No such file or directory" if text is None else "it is empty"
        with pytest.raises(ClusterError, match=rf"token from {path} \({why}\); set RAY_AUTH_TOKEN"):
            looking.require_token()
        path.write_text("a token")
        looking.require_token()
        path.unlink()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
        looking.require_token()
