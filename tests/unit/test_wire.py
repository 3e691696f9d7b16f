"""The paging protocol: what comes out is what went in, and nothing malformed gets through."""

from __future__ import annotations

import hashlib
import hmac
import struct
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import PagingError, ProtocolError, Refused
from dcres.model import wire
from dcres.model.pages import EMPTY, PAGE_SIZE, Extents, extents_of_mask
from dcres.model.wire import (
    HEADER,
    ClientHandshake,
    Decoder,
    Frame,
    Identity,
    Kind,
    ServerHandshake,
)

PAGES = 1000
VM, SECRET = b"v" * 16, b"s" * 32
NONCE, OTHER_NONCE = b"c" * 32, b"S" * 32
ME = Identity(VM, 7, SECRET)

masks = st.lists(st.booleans(), min_size=1, max_size=200).filter(any).map(np.array)
extents_ = masks.map(extents_of_mask)


def frame_of(data: bytes) -> Frame:
    """The one frame in `data`."""
    decoder = fed(data)
    (frame,) = decoder.frames()
    return frame


def fed(data: bytes) -> Decoder:
    decoder = Decoder(memoryview(bytearray(2 << 20)))
    decoder.receive_into()[: len(data)] = data
    decoder.received(len(data))
    return decoder


# Extents, ranges, maps


@given(extents_)
def test_extents_come_back(extents: Extents) -> None:
    packed = wire.pack_extents(extents)
    assert len(packed) == 4 + 16 * len(extents)
    found, at = wire.unpack_extents(memoryview(packed + b"data"), PAGES)
    assert found.dtype == np.int64
    assert found.tolist() == extents.tolist()
    assert at == len(packed)


@given(extents_)
def test_pages_come_back_with_the_place_of_their_data(extents: Extents) -> None:
    pages = int((extents[:, 1] - extents[:, 0]).sum())
    data = bytes(pages * PAGE_SIZE)
    found, at = wire.unpack_pages(memoryview(wire.pack_extents(extents) + data), PAGES)
    assert found.tolist() == extents.tolist()
    assert at == 4 + 16 * len(extents)


@given(extents_, st.integers(-3, 3).filter(bool))
def test_data_that_is_not_as_long_as_announced_is_refused(extents: Extents, off: int) -> None:
    pages = int((extents[:, 1] - extents[:, 0]).sum())
    packed = wire.pack_extents(extents) + bytes(max(0, pages * PAGE_SIZE + off))
    with pytest.raises(ProtocolError):
        wire.unpack_pages(memoryview(packed), PAGES)


def test_more_pages_than_a_frame_may_carry_are_refused() -> None:
    pages = wire.MAX_PAGES + 1
    packed = wire.pack_extents(np.array([[0, pages]])) + bytes(pages * PAGE_SIZE)
    with pytest.raises(ProtocolError, match="announces 257 pages"):
        wire.unpack_pages(memoryview(packed), PAGES)


def raw(*ranges: tuple[int, int]) -> bytes:
    return struct.pack("<I", len(ranges)) + b"".join(struct.pack("<QQ", *each) for each in ranges)


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        ("nothing", b""),
        ("half a count", b"\1\0"),
        ("no extents", raw()),
        ("fewer than announced", raw((0, 1), (2, 3))[:-1]),
        ("far fewer than announced", struct.pack("<I", 0xFFFFFFFF) + bytes(64)),
        ("an empty extent", raw((3, 3))),
        ("a backward extent", raw((4, 3))),
        ("outside", raw((0, PAGES + 1))),
        ("far outside", raw((0, 2**64 - 1))),
        ("begins outside, as a negative number would", raw((2**63, 2**63 + 1))),
        ("ends before zero", raw((2**64 - 1, 1))),
        ("overlapping", raw((0, 5), (4, 6))),
        ("descending", raw((4, 6), (0, 2))),
        ("the second is empty", raw((0, 1), (5, 5))),
        ("the second is outside", raw((0, 1), (PAGES, PAGES + 1))),
    ],
)
def test_malformed_extents_are_refused(what: str, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack_extents(memoryview(payload), PAGES)


@given(st.binary(max_size=200))
def test_no_payload_breaks_the_parsers(payload: bytes) -> None:
    """They give values that make sense or raise ProtocolError, and nothing else."""
    view = memoryview(payload)
    for unpack in (wire.unpack_extents, wire.unpack_pages, wire.unpack_range):
        try:
            found, at = unpack(view, PAGES)
        except ProtocolError:
            continue
        if not isinstance(found, int):
            assert 0 < at <= len(payload)
            assert (found[:, 0] < found[:, 1]).all()
            assert (found[1:, 0] >= found[:-1, 1]).all()
            assert found.max() <= PAGES


@given(masks)
def test_an_existence_map_comes_back(mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
    packed = wire.pack_mask(mask)
    assert wire.unpack_mask(memoryview(packed), mask.size).tolist() == mask.tolist()
    for wrong in (packed + b"\0", packed[:-1]):
        with pytest.raises(ProtocolError):
            wire.unpack_mask(memoryview(wrong), mask.size)


def test_the_first_page_is_the_lowest_bit() -> None:
    assert wire.pack_mask(np.array([True] + [False] * 8 + [True])) == b"\x01\x02"


@pytest.mark.parametrize(
    ("first", "count", "fits"),
    [
        (0, PAGES, True),
        (PAGES - 1, 1, True),
        (0, 0, False),
        (0, PAGES + 1, False),
        (PAGES, 1, False),
        (2**64 - 1, 2, False),
        (0, wire.MAX_MAP_PAGES + 1, False),
    ],
)
def test_ranges(first: int, count: int, fits: bool) -> None:
    payload = memoryview(wire.pack_range(first, count))
    if fits:
        assert wire.unpack_range(payload, PAGES) == (first, count)
        return
    with pytest.raises(ProtocolError):
        wire.unpack_range(payload, PAGES)


def test_a_range_of_the_wrong_length_is_refused() -> None:
    for payload in (b"", wire.pack_range(0, 1)[:-1], wire.pack_range(0, 1) + b"\0"):
        with pytest.raises(ProtocolError):
            wire.unpack_range(memoryview(payload), PAGES)


def test_limits_fit_each_other() -> None:
    """Every frame that may be sent fits what a receiver accepts."""
    assert 4 + wire.MAX_PAGES * (16 + PAGE_SIZE) <= wire.MAX_PAYLOAD
    assert wire.MAX_MAP_PAGES // 8 <= wire.MAX_PAYLOAD
    assert 4 + 16 * wire.MAX_RELEASE_EXTENTS <= wire.MAX_PAYLOAD


# Frames


def test_a_header_is_16_bytes_as_documented() -> None:
    assert wire.frame(Kind.PAGE_IN, 0x01020304, b"ab") == (
        b"DCRP" + b"\x01" + b"\x12" + b"\0\0" + b"\x04\x03\x02\x01" + b"\x02\0\0\0" + b"ab"
    )
    assert {kind.name: kind.value for kind in Kind} == {
        "HELLO": 1,
        "CHALLENGE": 2,
        "PROOF": 3,
        "WELCOME": 4,
        "REFUSED": 5,
        "EXISTENCE": 16,
        "EXISTENCE_MAP": 17,
        "PAGE_IN": 18,
        "PAGES": 19,
        "PAGE_OUT": 20,
        "STORED": 21,
        "RELEASE": 22,
        "RELEASED": 23,
        "ERROR": 31,
    }


frames = st.lists(
    st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=300)),
    max_size=20,
)


@given(frames, st.data())
def test_frames_come_back_however_they_are_cut(
    sent: list[tuple[Kind, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(wire.frame(*each) for each in sent)
    decoder = Decoder(memoryview(bytearray(HEADER.size + wire.MAX_PAYLOAD)))
    received = []
    while stream:
        room = decoder.receive_into()
        assert len(room) > 0
        cut = data.draw(st.integers(1, min(len(stream), len(room))))
        room[:cut], stream = stream[:cut], stream[cut:]
        decoder.received(cut)
        received += [(f.kind, f.request, bytes(f.payload)) for f in decoder.frames()]
    assert received == sent


def test_largest_frames_one_after_the_other_pass_a_buffer_of_one() -> None:
    decoder = Decoder(memoryview(bytearray(HEADER.size + wire.MAX_PAYLOAD)))
    stream = wire.frame(Kind.PAGES, 1, b"x" * wire.MAX_PAYLOAD) * 3
    count = 0
    while stream:
        room = decoder.receive_into()
        piece = stream[: min(len(room), 700_001)]
        room[: len(piece)], stream = piece, stream[len(piece) :]
        decoder.received(len(piece))
        count += sum(1 for _ in decoder.frames())
    assert count == 3


def test_a_buffer_smaller_than_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than a frame"):
        Decoder(memoryview(bytearray(HEADER.size + wire.MAX_PAYLOAD - 1)))


@pytest.mark.parametrize(
    ("what", "header", "message"),
    [
        ("another protocol", b"GET / HTTP/1.1\r\n", "does not speak"),
        ("magic off by a bit", HEADER.pack(b"DCRQ", 1, 1, 0, 0, 0), "does not speak"),
        ("the zero is not", HEADER.pack(b"DCRP", 1, 1, 1, 0, 0), "does not speak"),
        ("version 0", HEADER.pack(b"DCRP", 0, 1, 0, 0, 0), "speaks version 0"),
        ("version 2", HEADER.pack(b"DCRP", 2, 1, 0, 0, 0), "speaks version 2"),
        ("kind 0", HEADER.pack(b"DCRP", 1, 0, 0, 0, 0), "frame kind 0"),
        ("kind 24", HEADER.pack(b"DCRP", 1, 24, 0, 0, 0), "frame kind 24"),
        ("kind 255", HEADER.pack(b"DCRP", 1, 255, 0, 0, 0), "frame kind 255"),
        ("too long", HEADER.pack(b"DCRP", 1, 1, 0, 0, wire.MAX_PAYLOAD + 1), "longer than"),
        ("far too long", HEADER.pack(b"DCRP", 1, 1, 0, 0, 2**32 - 1), "longer than"),
    ],
)
def test_a_malformed_header_is_refused_before_its_payload_is_there(
    what: str, header: bytes, message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        list(fed(header).frames())


def test_what_came_before_a_malformed_frame_is_delivered() -> None:
    decoder = fed(wire.frame(Kind.STORED, 5) + bytes(16))
    frames = decoder.frames()
    assert next(frames).request == 5
    with pytest.raises(ProtocolError):
        next(frames)


@given(st.binary(max_size=400))
def test_no_stream_breaks_the_decoder(stream: bytes) -> None:
    try:
        for frame in fed(stream).frames():
            assert len(frame.payload) <= wire.MAX_PAYLOAD
    except ProtocolError:
        pass


# Handshake


def client(identity: Identity = ME, nonce: bytes = NONCE) -> ClientHandshake:
    return ClientHandshake(identity, nonce)


def server(identity: Identity = ME, nonce: bytes = OTHER_NONCE) -> ServerHandshake:
    return ServerHandshake(identity, nonce, PAGES)


def shake(one: ClientHandshake, other: ServerHandshake) -> None:
    """The whole handshake; raises Refused as the side that refuses does."""
    said: bytes | None = one.hello()
    while said is not None:
        said = one.answer(frame_of(other.answer(frame_of(said))))


def test_both_sides_prove_themselves() -> None:
    one, other = client(), server()
    shake(one, other)
    assert other.accepted
    assert one.page_count == PAGES


def test_the_proof_is_the_documented_text() -> None:
    text = b"dcres-1 client" + VM + struct.pack("<Q", 7) + NONCE + OTHER_NONCE
    assert ME.proof(b"client", NONCE, OTHER_NONCE) == hmac.digest(SECRET, text, hashlib.sha256)


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
    mirrored = ME.proof(b"server", NONCE, OTHER_NONCE)
    with pytest.raises(Refused):
        other.answer(frame_of(wire.frame(Kind.PROOF, 0, mirrored)))


GOOD_PROOF = ME.proof(b"client", NONCE, OTHER_NONCE)
TO_SERVER = {
    "hello": client().hello(),
    "proof": wire.frame(Kind.PROOF, 0, GOOD_PROOF),
    "short proof": wire.frame(Kind.PROOF, 0, GOOD_PROOF[:-1]),
    "empty proof": wire.frame(Kind.PROOF, 0),
    "long hello": wire.frame(Kind.HELLO, 0, bytes(57)),
    "page-in": wire.frame(Kind.PAGE_IN, 1, raw((0, 1))),
    "release": wire.frame(Kind.RELEASE, 1, raw((0, 1))),
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


WELCOME = ME.proof(b"server", NONCE, OTHER_NONCE) + struct.pack("<Q", PAGES)
TO_CLIENT = {
    "challenge": wire.frame(Kind.CHALLENGE, 0, OTHER_NONCE),
    "short challenge": wire.frame(Kind.CHALLENGE, 0, OTHER_NONCE[:-1]),
    "welcome": wire.frame(Kind.WELCOME, 0, WELCOME),
    "long welcome": wire.frame(Kind.WELCOME, 0, WELCOME + b"\0"),
    "refused": wire.frame(Kind.REFUSED, 0),
    "pages": wire.frame(Kind.PAGES, 1, raw((0, 1)) + bytes(PAGE_SIZE)),
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


def test_no_extents_cannot_be_said() -> None:
    with pytest.raises(ProtocolError):
        wire.unpack_extents(memoryview(wire.pack_extents(EMPTY)), PAGES)
