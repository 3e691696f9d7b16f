"""The paging protocol: frames, and who may say what when. No I/O; docs/protocol.md is its text.

::

    client                                        server
      HELLO {vm, generation, nonce, role}  ──▶
                                           ◀──    CHALLENGE {nonce}         or REFUSED
      PROOF {HMAC of the client}           ──▶
                                           ◀──    WELCOME {HMAC of the server, pages}  or REFUSED
      EXISTENCE {first, count}             ──▶
                                           ◀──    EXISTENCE_MAP {bits}
      PAGE_IN {extents}                    ──▶
                                           ◀──    PAGES {extents, pages}    the server keeps them
      RELEASE {extents}                    ──▶                              until released
                                           ◀──    RELEASED
      PAGE_OUT {extents, pages}            ──▶
                                           ◀──    STORED
      PEEK {extents}                       ──▶
                                           ◀──    PAGES {what of them is here}
      FETCH {source, extents}              ──▶    PEEKs at the source, writes
                                           ◀──    FETCHED {what of them it stored}

Pages are one flag each, which says that a page is all zeros, and then the data of the others.

The client is a PAGER, which may ask for everything; its EXPRESS connection, for PAGE_IN alone;
or a READER, which only looks: EXISTENCE and PEEK. Every request is answered with its request
number, and in order but for FETCHED, which may come later. After a malformed frame, or an ERROR,
the connection is closed: there is no way to find the next frame's start.
"""

from __future__ import annotations

import ipaddress
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np

from dcres.errors import (
    CheckpointCorrupt,
    DcresError,
    NoRoom,
    PagesLost,
    PagingError,
    ProtocolError,
)
from dcres.model.pages import (
    EMPTY,
    PAGE_SIZE,
    Extents,
    Mask,
    are_sound,
    count_pages,
    extents_of_mask,
)

Part: TypeAlias = bytes | memoryview
Shared: TypeAlias = "array[int]"

MAGIC = b"DCRP"
VERSION = 4
HEADER = struct.Struct("<4sBBHII")  # magic, version, kind, zero, request, payload length
MAX_PAGES = 256  # pages of data in one frame
MAX_PAYLOAD = 4 + MAX_PAGES * (16 + PAGE_SIZE) + MAX_PAGES // 8
MAX_MAP_PAGES = 1 << 22  # pages of one EXISTENCE_MAP
MAX_RELEASE_EXTENTS = 4096
MAX_FETCH_PAGES = 1 << 16  # so many that FETCHED fits a frame however they lie

# Of the numbers that a decoder and a connection keep where `dcres/paging/hot.c` can see them:
# start and stop of what was received, the last request's number, whether nothing waits to be sent,
# how many pages were served, and when pages were last put in place (monotonic ns).
START, STOP, NUMBER, MAY_SEND, SERVED, PUT_AT, SHARED = range(7)
NOT_NOW, NOW, HALF_SENT = range(3)  # values of MAY_SEND

_ZERO_PAGE = bytes(PAGE_SIZE)
_COUNT = struct.Struct("<I")
_RANGE = struct.Struct("<QQ")
_RUN = struct.Struct("<IQQ")
_SOURCE = struct.Struct("<HB")
_ERRORS = {kind.__name__: kind for kind in (CheckpointCorrupt, NoRoom, PagesLost, ProtocolError)}


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    EXISTENCE = 16
    EXISTENCE_MAP = 17
    PAGE_IN = 18
    PAGES = 19
    PAGE_OUT = 20
    STORED = 21
    RELEASE = 22
    RELEASED = 23
    PEEK = 24
    FETCH = 25
    FETCHED = 26
    ERROR = 31


@dataclass(frozen=True, slots=True)
class Frame:
    """One received frame; `payload` is valid until the decoder is fed again."""

    kind: Kind
    request: int
    payload: memoryview
    offset: int  # of the payload in the decoder's buffer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens: an IP address, so that connecting never waits for a name."""

    address: str
    port: int


def header(kind: Kind, request: int, length_bytes: int) -> bytes:
    """A frame's 16 first bytes."""
    return HEADER.pack(MAGIC, VERSION, kind, 0, request, length_bytes)


def frame(kind: Kind, request: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return header(kind, request, len(payload)) + payload


def pack_extents(extents: Extents) -> bytes:
    """Count, then first and stop of each extent, little-endian."""
    return _COUNT.pack(len(extents)) + extents.astype("<u8", copy=False).tobytes()


def pack_run(first: int, stop: int) -> bytes:
    """The same for a single extent: a tenth of the time, on the way that a guest waits for."""
    return _RUN.pack(1, first, stop)


def pack_runs(runs: list[tuple[int, int]]) -> bytes:
    """The same for a list of them."""
    if len(runs) == 1:
        return _RUN.pack(1, *runs[0])
    return pack_extents(np.array(runs, dtype=np.int64))


def data_of_runs(payload: memoryview, runs: list[tuple[int, int]], who: str) -> memoryview:
    """The data of `runs` in an answer; see `unpack_data`. Raises ProtocolError if it has others."""
    packed = pack_runs(runs)
    if payload[: len(packed)] != packed:
        raise ProtocolError(f"{who} sent pages that were not asked for")
    return unpack_data(payload[len(packed) :], sum([stop - first for first, stop in runs]))


def _zeros_of(piece: Part) -> Mask:
    """Which pages of a piece are all zeros."""
    words = np.frombuffer(piece, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
    zeros: Mask = (words[:, 0] | words[:, -1] | words[:, words.shape[1] // 2]) == 0
    for page in np.flatnonzero(zeros).tolist():  # most pages show in one of those words
        zeros[page] = not words[page].any()
    return zeros


def pack_data(pieces: Sequence[Part]) -> list[Part]:
    """Pages as a frame carries them: their zero flags, then those that are not all zeros.

    `pieces` are whole pages each; what is returned refers to them.
    """
    if not pieces:
        return []
    flags: list[bool] = []
    parts: list[Part] = []
    for piece in pieces:
        # Pages leave one by one for the most part, and numpy takes 5 µs for one.
        zeros = [piece == _ZERO_PAGE] if len(piece) == PAGE_SIZE else _zeros_of(piece).tolist()
        flags += zeros
        if True not in zeros:
            parts.append(piece)
            continue
        for first, stop in extents_of_mask(~np.array(zeros)).tolist():
            parts.append(memoryview(piece)[first * PAGE_SIZE : stop * PAGE_SIZE])
    packed = np.packbits(np.array(flags, dtype=np.bool_), bitorder="little")
    return [packed.tobytes(), *parts]


def unpack_data(payload: memoryview, pages: int) -> memoryview:
    """The data of `pages` pages that `pack_data` packed: the payload's own if none is flagged.

    Raises ProtocolError.
    """
    flags_bytes = (pages + 7) // 8
    flags, data = payload[:flags_bytes], payload[flags_bytes:]
    if pages > MAX_PAGES or len(flags) != flags_bytes:
        raise ProtocolError(f"a frame announces {pages} pages and holds {len(payload)} bytes")
    zeros = unpack_mask(flags, pages) if pages else np.zeros(0, dtype=np.bool_)
    count = int(np.count_nonzero(zeros))
    if len(data) != (pages - count) * PAGE_SIZE:
        raise ProtocolError(f"a frame announces {pages} pages and holds {len(payload)} bytes")
    if not count:
        return data
    whole = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
    whole[~zeros] = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    return whole.reshape(-1).data


def unpack_extents(
    payload: memoryview, page_count: int, *, may_be_none: bool = False
) -> tuple[Extents, int]:
    """Extents, and the offset behind them. Raises ProtocolError when they make no sense."""
    if len(payload) < _COUNT.size:
        raise ProtocolError("a frame ends inside its extents")
    (count,) = _COUNT.unpack_from(payload)
    stop = _COUNT.size + 16 * count
    if count == 0 and may_be_none:
        return EMPTY, stop
    if count == 0 or len(payload) < stop:
        raise ProtocolError(f"a frame announces {count} extents and holds {len(payload)} bytes")
    flat = np.frombuffer(payload[_COUNT.size : stop], dtype="<u8")
    if count == 1:
        sane = int(flat[0]) < int(flat[1]) <= page_count
    else:
        sane = are_sound(flat.astype(np.int64).reshape(-1, 2), page_count)
    if not sane:
        raise ProtocolError("a frame's extents are not ascending within the VM's memory")
    return flat.astype(np.int64).reshape(-1, 2), stop


def unpack_only_extents(
    payload: memoryview, page_count: int, *, may_be_none: bool = False
) -> Extents:
    """Extents of a frame that carries nothing else. Raises ProtocolError."""
    extents, at = unpack_extents(payload, page_count, may_be_none=may_be_none)
    if at != len(payload):
        raise ProtocolError(f"a frame holds {len(payload) - at} bytes behind its extents")
    return extents


def unpack_release(payload: memoryview, page_count: int) -> Extents:
    """Extents of a RELEASE. Raises ProtocolError, also for so many that others would wait long."""
    extents = unpack_only_extents(payload, page_count)
    if len(extents) > MAX_RELEASE_EXTENTS:
        raise ProtocolError(f"a RELEASE of {len(extents)} extents; {MAX_RELEASE_EXTENTS} at most")
    return extents


def unpack_pages(
    payload: memoryview, page_count: int, *, may_be_none: bool = False
) -> tuple[Extents, memoryview]:
    """Extents of a frame that carries their pages, and the data of all of these.

    Only PAGES that answers PEEK may carry none. Raises ProtocolError.
    """
    extents, at = unpack_extents(payload, page_count, may_be_none=may_be_none)
    return extents, unpack_data(payload[at:], count_pages(extents))


def pack_fetch(source: Endpoint, extents: Extents) -> bytes:
    """The payload of FETCH: the source's port, its address as text, the extents."""
    address = source.address.encode("ascii")
    return _SOURCE.pack(source.port, len(address)) + address + pack_extents(extents)


def unpack_fetch(payload: memoryview, page_count: int) -> tuple[Endpoint, Extents]:
    """Source and extents of a FETCH. Raises ProtocolError."""
    if len(payload) < _SOURCE.size:
        raise ProtocolError("a FETCH frame ends inside its source")
    port, length = _SOURCE.unpack_from(payload)
    at = _SOURCE.size + length
    try:
        text = bytes(payload[_SOURCE.size : at]).decode("ascii")
        address = str(ipaddress.ip_address(text))
        if "%" in text:  # a zone may be a name, and names are looked up
            raise ValueError(text)
    except ValueError:
        raise ProtocolError("the source of a FETCH frame is not an IP address") from None
    extents = unpack_only_extents(payload[at:], page_count)
    pages = count_pages(extents)
    if port == 0 or pages > MAX_FETCH_PAGES:
        raise ProtocolError(f"a FETCH frame asks for {pages} pages from port {port}")
    return Endpoint(address, port), extents


def pack_error(error: DcresError) -> bytes:
    """The payload of ERROR."""
    return f"{type(error).__name__}: {error}".encode()


def unpack_error(payload: memoryview, who: str) -> DcresError:
    """The error that `who` reports, of its class if that is one of the protocol's."""
    name, _, sentence = bytes(payload).decode(errors="replace").partition(": ")
    return _ERRORS.get(name, PagingError)(f"{who} reports: {sentence or name}")


def pack_range(first: int, count: int) -> bytes:
    """The payload of EXISTENCE."""
    return _RANGE.pack(first, count)


def unpack_range(payload: memoryview, page_count: int) -> tuple[int, int]:
    """First page and count of an EXISTENCE request."""
    if len(payload) != _RANGE.size:
        raise ProtocolError("an EXISTENCE frame has the wrong length")
    first, count = _RANGE.unpack(payload)
    if not 0 < count <= MAX_MAP_PAGES or first + count > page_count:
        raise ProtocolError("an EXISTENCE frame asks for pages outside the VM's memory")
    return first, count


def pack_mask(mask: Mask) -> bytes:
    """The payload of EXISTENCE_MAP: one bit a page, lowest bit first."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(payload: memoryview, count: int) -> Mask:
    """The mask of `count` pages in an EXISTENCE_MAP."""
    if len(payload) != (count + 7) // 8:
        raise ProtocolError("an EXISTENCE_MAP frame has the wrong length")
    bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8), count=count, bitorder="little")
    return bits.astype(np.bool_)


class Decoder:
    """Finds frames in received bytes, in a buffer that the caller receives into.

    `buffer` must hold at least one largest frame. ``receive_into`` gives the free part,
    `received` says how much of it was filled, `frames` yields what is complete.
    """

    def __init__(self, buffer: memoryview) -> None:
        if len(buffer) < HEADER.size + MAX_PAYLOAD:
            raise ValueError("the decoder's buffer is smaller than a frame")
        self._buffer = buffer
        self.shared = array("Q", bytes(8 * SHARED))
        """Start and stop of what the buffer holds; the rest is the connection's."""

    def receive_into(self) -> memoryview:
        """Where to receive next; empty only if frames fill it that were not taken.

        Invalidates the payloads of earlier frames.
        """
        at = self.shared
        if at[START] == at[STOP]:
            at[START] = at[STOP] = 0
        elif len(self._buffer) - at[START] < HEADER.size + MAX_PAYLOAD:
            left = at[STOP] - at[START]
            self._buffer[:left] = bytes(self._buffer[at[START] : at[STOP]])
            at[START], at[STOP] = 0, left
        return self._buffer[at[STOP] :]

    def received(self, length_bytes: int) -> None:
        """`length_bytes` were received into what `receive_into` gave."""
        self.shared[STOP] += length_bytes

    def frames(self) -> Iterator[Frame]:
        """Complete frames, in order. Raises ProtocolError at a malformed one."""
        cursor = self.shared
        while cursor[STOP] - cursor[START] >= HEADER.size:
            kind, request, length = _check_header(self._buffer, cursor[START])
            at = cursor[START] + HEADER.size
            if cursor[STOP] - at < length:
                return
            cursor[START] = at + length
            yield Frame(kind, request, self._buffer[at : at + length], at)


def _check_header(buffer: memoryview, at: int) -> tuple[Kind, int, int]:
    magic, version, kind, zero, request, length = HEADER.unpack_from(buffer, at)
    if magic != MAGIC or zero:
        raise ProtocolError("the peer does not speak the dcres paging protocol")
    if version != VERSION:
        raise ProtocolError(
            f"the peer speaks version {version} of the paging protocol and this is version "
            f"{VERSION}; run the same dcres on all hosts"
        )
    if length > MAX_PAYLOAD:
        raise ProtocolError(f"a frame of {length} bytes is longer than {MAX_PAYLOAD}")
    try:
        return Kind(kind), request, length
    except ValueError:
        raise ProtocolError(f"frame kind {kind} is not known") from None
