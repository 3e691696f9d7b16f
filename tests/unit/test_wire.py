"""Frames of the paging protocol: what comes out went in, and nothing malformed gets through."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import (
    CheckpointCorrupt,
    DcresError,
    NoRoom,
    PagesLost,
    PagingError,
    ProtocolError,
    StoreFull,
)
from dcres.model import wire
from dcres.model.pages import EMPTY, PAGE_SIZE, Extents, extents_of_mask
from dcres.model.wire import HEADER, Decoder, Endpoint, Kind

PAGES = 1000

masks = st.lists(st.booleans(), min_size=1, max_size=200).filter(any).map(np.array)
extents_ = masks.map(extents_of_mask)


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
def test_pages_come_back_with_their_data(extents: Extents) -> None:
    pages = int((extents[:, 1] - extents[:, 0]).sum())
    data = bytes([1]) * (pages * PAGE_SIZE)
    packed = wire.pack_extents(extents) + b"".join(wire.pack_data([data]))
    assert len(packed) == 4 + 16 * len(extents) + (pages + 7) // 8 + len(data)
    found, back = wire.unpack_pages(memoryview(packed), PAGES)
    assert found.tolist() == extents.tolist()
    assert back == data
    assert back.obj is packed, "without zeros nothing is copied"


pieces_ = st.lists(
    st.lists(st.sampled_from(["zeros", "first", "last", "somewhere"]), min_size=1, max_size=9),
    min_size=1,
    max_size=6,
)


@given(pieces_, st.booleans())
def test_pages_of_zeros_are_a_bit_each(pieces: list[list[str]], views: bool) -> None:
    at = {"first": 0, "last": PAGE_SIZE - 1, "somewhere": 1234}
    given_: list[wire.Part] = []
    for kinds in pieces:
        pages = np.zeros((len(kinds), PAGE_SIZE), dtype=np.uint8)
        for page, kind in zip(pages, kinds, strict=True):
            if kind in at:
                page[at[kind]] = 7
        given_.append(memoryview(pages.tobytes()) if views else pages.tobytes())
    count = sum(map(len, pieces))
    others = sum(kind != "zeros" for kinds in pieces for kind in kinds)
    packed = b"".join(wire.pack_data(given_))
    assert len(packed) == (count + 7) // 8 + others * PAGE_SIZE
    assert wire.unpack_data(memoryview(packed), count) == b"".join(given_)
    for wrong in (packed + bytes(PAGE_SIZE), packed[:-1]):
        with pytest.raises(ProtocolError):
            wire.unpack_data(memoryview(wrong), count)


@given(extents_, st.integers(-3, 3).filter(bool))
def test_data_that_is_not_as_long_as_announced_is_refused(extents: Extents, off: int) -> None:
    pages = int((extents[:, 1] - extents[:, 0]).sum())
    flags = bytes((pages + 7) // 8)
    packed = wire.pack_extents(extents) + flags + bytes(max(0, pages * PAGE_SIZE + off))
    with pytest.raises(ProtocolError):
        wire.unpack_pages(memoryview(packed), PAGES)


def test_more_pages_than_a_frame_may_carry_are_refused() -> None:
    pages = wire.MAX_PAGES + 1
    packed = wire.pack_extents(np.array([[0, pages]])) + bytes(pages * PAGE_SIZE)
    with pytest.raises(ProtocolError, match="announces 257 pages"):
        wire.unpack_pages(memoryview(packed), PAGES)


def test_no_extents_cannot_be_said() -> None:
    with pytest.raises(ProtocolError):
        wire.unpack_extents(memoryview(wire.pack_extents(EMPTY)), PAGES)


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


@given(extents_, st.sampled_from(["127.0.0.1", "10.255.0.9", "::1", "fd00::1:2"]))
def test_a_fetch_comes_back(extents: Extents, address: str) -> None:
    packed = wire.pack_fetch(Endpoint(address, 65535), extents)
    assert packed[: 3 + len(address)] == b"\xff\xff" + bytes([len(address)]) + address.encode()
    source, found = wire.unpack_fetch(memoryview(packed), PAGES)
    assert source == Endpoint(address, 65535)
    assert found.tolist() == extents.tolist()


def fetch(address: bytes, port: int, rest: bytes) -> bytes:
    return struct.pack("<HB", port, len(address)) + address + rest


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        ("nothing", b""),
        ("half a port", b"\1"),
        ("the address is cut", fetch(b"127.0.0.1", 1, b"")[:7]),
        ("no address", fetch(b"", 1, raw((0, 1)))),
        ("a name, which would have to be looked up", fetch(b"localhost", 1, raw((0, 1)))),
        ("a zone, which may be a name", fetch(b"fe80::1%lo", 1, raw((0, 1)))),
        ("not ASCII", fetch(b"127.0.0.\xb2", 1, raw((0, 1)))),
        ("port 0", fetch(b"127.0.0.1", 0, raw((0, 1)))),
        ("no extents", fetch(b"127.0.0.1", 1, raw())),
        ("something behind", fetch(b"127.0.0.1", 1, raw((0, 1)) + b"x")),
        ("outside", fetch(b"127.0.0.1", 1, raw((0, PAGES + 1)))),
    ],
)
def test_a_malformed_fetch_is_refused(what: str, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack_fetch(memoryview(payload), PAGES)


def test_a_fetch_of_too_many_pages_is_refused() -> None:
    many = wire.MAX_FETCH_PAGES + 1
    for pages, fits in ((many - 1, True), (many, False)):
        payload = memoryview(fetch(b"127.0.0.1", 1, raw((0, pages))))
        if fits:
            wire.unpack_fetch(payload, many)
            continue
        with pytest.raises(ProtocolError, match=f"asks for {many} pages"):
            wire.unpack_fetch(payload, many)


@pytest.mark.parametrize(("extents", "fits"), [(4096, True), (4097, False)])
def test_a_release_of_too_many_extents_is_refused(extents: int, fits: bool) -> None:
    payload = memoryview(raw(*((2 * n, 2 * n + 1) for n in range(extents))))
    if fits:
        assert len(wire.unpack_release(payload, 2 * extents)) == extents
        return
    with pytest.raises(ProtocolError, match="a RELEASE of 4097 extents; 4096 at most"):
        wire.unpack_release(payload, 2 * extents)


def test_no_extents_are_understood_only_where_they_may_be() -> None:
    none = memoryview(wire.pack_extents(EMPTY))
    found, at = wire.unpack_extents(none, PAGES, may_be_none=True)
    assert (len(found), at) == (0, 4)
    pages, data = wire.unpack_pages(none, PAGES, may_be_none=True)
    assert (len(pages), len(data)) == (0, 0)
    for unpack in (wire.unpack_extents, wire.unpack_pages):
        with pytest.raises(ProtocolError):
            unpack(none, PAGES)
    assert len(wire.unpack_only_extents(none, PAGES, may_be_none=True)) == 0
    for more in (wire.unpack_only_extents, wire.unpack_pages):
        with pytest.raises(ProtocolError):
            more(memoryview(bytes(none) + b"x"), PAGES, may_be_none=True)


@pytest.mark.parametrize("kind", [CheckpointCorrupt, NoRoom, PagesLost, ProtocolError])
def test_an_error_comes_back_as_what_it_is(kind: type[DcresError]) -> None:
    found = wire.unpack_error(memoryview(wire.pack_error(kind("page 3: né"))), "h1")
    assert type(found) is kind
    assert str(found) == "h1 reports: page 3: né"


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (wire.pack_error(StoreFull("no")), "h1 reports: no"),
        (b"SystemExit: bye", "h1 reports: bye"),
        (b"no colon", "h1 reports: no colon"),
        (b"\xff\xfe", "h1 reports: ��"),
        (b"", "h1 reports: "),
    ],
)
def test_other_errors_are_paging_errors(payload: bytes, text: str) -> None:
    found = wire.unpack_error(memoryview(payload), "h1")
    assert (type(found), str(found)) == (PagingError, text)


@given(st.binary(max_size=200))
def test_no_payload_breaks_the_parsers(payload: bytes) -> None:
    """They give values that make sense or raise ProtocolError, and nothing else."""
    view = memoryview(payload)
    for unpack in (wire.unpack_extents, wire.unpack_pages, wire.unpack_range, unpack_fetch):
        try:
            found, at = unpack(view, PAGES)
        except ProtocolError:
            continue
        if not isinstance(found, int):
            assert isinstance(at, memoryview) or 0 < at <= len(payload)
            assert (found[:, 0] < found[:, 1]).all()
            assert (found[1:, 0] >= found[:-1, 1]).all()
            assert found.max() <= PAGES


def unpack_fetch(payload: memoryview, page_count: int) -> tuple[Extents, int]:
    source, extents = wire.unpack_fetch(payload, page_count)
    assert source.port > 0
    return extents, len(payload)


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
    assert 4 + wire.MAX_PAGES * (16 + PAGE_SIZE) + wire.MAX_PAGES // 8 <= wire.MAX_PAYLOAD
    assert wire.MAX_MAP_PAGES // 8 <= wire.MAX_PAYLOAD
    assert 4 + 16 * wire.MAX_RELEASE_EXTENTS <= wire.MAX_PAYLOAD
    assert 4 + 16 * wire.MAX_FETCH_PAGES <= wire.MAX_PAYLOAD


# Frames


def test_a_header_is_16_bytes_as_documented() -> None:
    assert wire.frame(Kind.PAGE_IN, 0x01020304, b"ab") == (
        b"DCRP" + b"\x04" + b"\x12" + b"\0\0" + b"\x04\x03\x02\x01" + b"\x02\0\0\0" + b"ab"
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
        "PEEK": 24,
        "FETCH": 25,
        "FETCHED": 26,
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
        ("magic off by a bit", HEADER.pack(b"DCRQ", wire.VERSION, 1, 0, 0, 0), "does not speak"),
        ("the zero is not", HEADER.pack(b"DCRP", wire.VERSION, 1, 1, 0, 0), "does not speak"),
        ("version 0", HEADER.pack(b"DCRP", 0, 1, 0, 0, 0), "speaks version 0"),
        ("version 1", HEADER.pack(b"DCRP", 1, 1, 0, 0, 0), "speaks version 1 .* run the same"),
        ("version 2", HEADER.pack(b"DCRP", 2, 1, 0, 0, 0), "speaks version 2 .* run the same"),
        ("version 3", HEADER.pack(b"DCRP", 3, 1, 0, 0, 0), "speaks version 3 .* run the same"),
        ("version 5", HEADER.pack(b"DCRP", 5, 1, 0, 0, 0), "speaks version 5"),
        ("kind 0", HEADER.pack(b"DCRP", wire.VERSION, 0, 0, 0, 0), "frame kind 0"),
        ("kind 27", HEADER.pack(b"DCRP", wire.VERSION, 27, 0, 0, 0), "frame kind 27"),
        ("kind 255", HEADER.pack(b"DCRP", wire.VERSION, 255, 0, 0, 0), "frame kind 255"),
        (
            "too long",
            HEADER.pack(b"DCRP", wire.VERSION, 1, 0, 0, wire.MAX_PAYLOAD + 1),
            "longer than",
        ),
        ("far too long", HEADER.pack(b"DCRP", wire.VERSION, 1, 0, 0, 2**32 - 1), "longer than"),
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


def test_no_pages_are_packed_as_nothing() -> None:
    assert b"".join(wire.pack_data([])) == b""
    assert b"".join(wire.pack_data([b""])) == b"", "what a read of no pages gives"
