"""The handshake of the paging protocol: who belongs gets in, nobody else does."""

from __future__ import annotations

import hashlib
import hmac
import struct
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import PagingError, Refused
from dcres.model import wire
from dcres.model.handshake import ClientHandshake, Identity, Role, ServerHandshake
from dcres.model.pages import PAGE_SIZE
from dcres.model.wire import Decoder, Frame, Kind

PAGES = 1000
VM, SECRET = b"v" * 16, b"s" * 32
NONCE, OTHER_NONCE = b"c" * 32, b"S" * 32
ME = Identity(VM, 7, SECRET)
HELLO = ME.hello(NONCE, Role.PAGER)
ONE_PAGE = wire.pack_run(0, 1)


def frame_of(data: bytes) -> Frame:
    """The one frame in `data`."""
    decoder = Decoder(memoryview(bytearray(2 << 20)))
    decoder.receive_into()[: len(data)] = data
    decoder.received(len(data))
    (frame,) = decoder.frames()
    return frame


def client(identity: Identity = ME, role: Role = Role.PAGER) -> ClientHandshake:
    return ClientHandshake(identity, NONCE, role)


def server(identity: Identity = ME, nonce: bytes = OTHER_NONCE) -> ServerHandshake:
    return ServerHandshake(identity, nonce, PAGES)


def shake(one: ClientHandshake, other: ServerHandshake) -> None:
    """The whole handshake; raises Refused as the side that refuses does."""
    said: bytes | None = one.hello()
    while said is not None:
        said = one.answer(frame_of(other.answer(frame_of(said))))


@pytest.mark.parametrize("role", Role)
def test_both_sides_prove_themselves(role: Role) -> None:
    one, other = client(role=role), server()
    shake(one, other)
    assert other.accepted
    assert other.role is role
    assert one.page_count == PAGES


def test_hello_and_proof_are_the_documented_bytes() -> None:
    one = client(role=Role.READER)
    hello = VM + struct.pack("<Q", 7) + NONCE + b"\x02"
    assert frame_of(one.hello()).payload == hello
    text = b"dcres-4 client" + hello + OTHER_NONCE
    answer = one.answer(frame_of(wire.frame(Kind.CHALLENGE, 0, OTHER_NONCE)))
    assert answer is not None
    assert frame_of(answer).payload == hmac.digest(SECRET, text, hashlib.sha256)
    assert {role.name: role.value for role in Role} == {"PAGER": 1, "READER": 2, "EXPRESS": 3}


def test_nobody_can_change_the_role_on_the_way() -> None:
    one, other = client(role=Role.READER), server()
    said = frame_of(one.hello())
    challenge = other.answer(frame_of(wire.frame(Kind.HELLO, 0, bytes(said.payload[:-1]) + b"\1")))
    proof = one.answer(frame_of(challenge))
    assert proof is not None
    with pytest.raises(Refused, match="does not know"):
        other.answer(frame_of(proof))
    assert not other.accepted


@pytest.mark.parametrize("role", [0, 4, 255])
def test_unknown_roles_are_refused(role: int) -> None:
    hello = VM + struct.pack("<Q", 7) + NONCE + bytes([role])
    with pytest.raises(Refused, match=f"role {role}"):
        server().answer(frame_of(wire.frame(Kind.HELLO, 0, hello)))


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (Identity(b"w" * 16, 7, SECRET), "asks for VM"),
        (Identity(VM, 6, SECRET), "generation 6, not 7"),
        (Identity(VM, 8, SECRET), "generation 8, not 7"),
        (Identity(VM, 7, b"t" * 32), "does not know the VM's secret"),
    ],
)
def test_who_does_not_belong_is_refused(identity: Identity, message: str) -> None:
    other = server()
    with pytest.raises(Refused, match=message):
        shake(client(identity), other)
    assert not other.accepted


def test_a_server_that_does_not_know_the_secret_is_refused() -> None:
    class Impostor(ServerHandshake):
        """Welcomes everyone, as a server would that wants to be handed pages."""

        def answer(self, received: Frame) -> bytes:
            if received.kind is Kind.HELLO:
                return super().answer(received)
            return wire.frame(Kind.WELCOME, 0, bytes(32) + struct.pack("<Q", PAGES))

    with pytest.raises(Refused, match="memory server does not know"):
        shake(client(), Impostor(ME, OTHER_NONCE, PAGES))


def test_a_proof_overheard_is_worth_nothing_in_another_connection() -> None:
    one, first = client(), server()
    overheard = one.answer(frame_of(first.answer(frame_of(one.hello()))))
    assert overheard is not None
    again = server(nonce=b"another nonce of the next server"[:32])
    again.answer(frame_of(client().hello()))
    with pytest.raises(Refused):
        again.answer(frame_of(overheard))
    assert not again.accepted


def test_a_server_s_own_proof_played_back_is_refused() -> None:
    other = server()
    other.answer(frame_of(client().hello()))
    mirrored = ME.proof(b"server", HELLO, OTHER_NONCE)
    with pytest.raises(Refused):
        other.answer(frame_of(wire.frame(Kind.PROOF, 0, mirrored)))


GOOD_PROOF = ME.proof(b"client", HELLO, OTHER_NONCE)
TO_SERVER = {
    "hello": client().hello(),
    "proof": wire.frame(Kind.PROOF, 0, GOOD_PROOF),
    "short proof": wire.frame(Kind.PROOF, 0, GOOD_PROOF[:-1]),
    "empty proof": wire.frame(Kind.PROOF, 0),
    "hello without a role": wire.frame(Kind.HELLO, 0, HELLO[:-1]),
    "long hello": wire.frame(Kind.HELLO, 0, HELLO + b"\0"),
    "page-in": wire.frame(Kind.PAGE_IN, 1, ONE_PAGE),
    "release": wire.frame(Kind.RELEASE, 1, ONE_PAGE),
    "welcome": wire.frame(Kind.WELCOME, 0, bytes(40)),
}


def test_a_memory_server_accepts_only_hello_and_then_proof() -> None:
    for order in product(TO_SERVER, repeat=3):
        other = server()
        for at, name in enumerate(order):
            frame = frame_of(TO_SERVER[name])
            if at < 2 and name == ("hello", "proof")[at]:
                other.answer(frame)
                continue
            with pytest.raises(Refused):
                other.answer(frame)
            assert other.accepted is (at == 2), order
            break


WELCOME = ME.proof(b"server", HELLO, OTHER_NONCE) + struct.pack("<Q", PAGES)
TO_CLIENT = {
    "challenge": wire.frame(Kind.CHALLENGE, 0, OTHER_NONCE),
    "short challenge": wire.frame(Kind.CHALLENGE, 0, OTHER_NONCE[:-1]),
    "welcome": wire.frame(Kind.WELCOME, 0, WELCOME),
    "long welcome": wire.frame(Kind.WELCOME, 0, WELCOME + b"\0"),
    "refused": wire.frame(Kind.REFUSED, 0),
    "pages": wire.frame(Kind.PAGES, 1, ONE_PAGE + bytes(PAGE_SIZE)),
    "error": wire.frame(Kind.ERROR, 0, b"PagesLost: no"),
}


def test_a_pager_accepts_only_challenge_and_then_welcome() -> None:
    for order in product(TO_CLIENT, repeat=2):
        one = client()
        for at, name in enumerate(order):
            frame = frame_of(TO_CLIENT[name])
            if name == ("challenge", "welcome")[at]:
                assert (one.answer(frame) is None) is (at == 1)
                continue
            with pytest.raises(Refused):
                one.answer(frame)
            break
        assert (one.page_count == PAGES) is (order == ("challenge", "welcome"))


@given(st.binary(max_size=120), st.sampled_from(Kind))
def test_no_frame_breaks_a_handshake(payload: bytes, kind: Kind) -> None:
    frame = frame_of(wire.frame(kind, 0, payload))
    for side in (client(), server()):
        try:
            side.answer(frame)
        except PagingError:
            continue
        assert kind in (Kind.HELLO, Kind.CHALLENGE)


def test_the_secret_is_not_in_anything_that_is_said() -> None:
    one, other = client(), server()
    said: bytes | None = one.hello()
    heard = b""
    while said is not None:
        answer = other.answer(frame_of(said))
        heard += said + answer
        said = one.answer(frame_of(answer))
    assert SECRET not in heard
