"""The paging protocol: frames, and who may say what when. No I/O; docs/protocol.md is its text.

::

    pager (client)                                memory server
      HELLO {vm, generation, nonce}        ──▶
                                           ◀──    CHALLENGE {nonce}         or REFUSED
      PROOF {HMAC of the client}           ──▶
                                           ◀──    WELCOME {HMAC of the server, pages}  or REFUSED
      EXISTENCE {first, count}             ──▶
                                           ◀──    EXISTENCE_MAP {bits}
      PAGE_IN {extents}                    ──▶
                                           ◀──    PAGES {extents, data}     the server keeps them
      RELEASE {extents}                    ──▶                              until released
                                           ◀──    RELEASED
      PAGE_OUT {extents, data}             ──▶
                                           ◀──    STORED

Every request is answered in order, with its request number. After a malformed frame, or an
ERROR, the connection is closed: there is no way to find the next frame's start.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dcres.errors import ProtocolError, Refused
from dcres.model.pages import PAGE_SIZE, Extents, Mask, count_pages

MAGIC = b"DCRP"
VERSION = 1
HEADER = struct.Struct("<4sBBHII")  # magic, version, kind, zero, request, payload length
MAX_PAGES = 256  # pages of data in one frame
MAX_PAYLOAD = 4 + MAX_PAGES * (16 + PAGE_SIZE)
MAX_MAP_PAGES = 1 << 22  # pages of one EXISTENCE_MAP
MAX_RELEASE_EXTENTS = 4096
NONCE_BYTES = 32
PROOF_BYTES = 32

_COUNT = struct.Struct("<I")
_HELLO = struct.Struct("<16sQ32s")
_WELCOME = struct.Struct("<32sQ")
_RANGE = struct.Struct("<QQ")
_RUN = struct.Struct("<IQQ")


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
    ERROR = 31


@dataclass(frozen=True, slots=True)
class Frame:
    """One received frame; `payload` is valid until the decoder is fed again."""

    kind: Kind
    request: int
    payload: memoryview
    offset: int  # of the payload in the decoder's buffer


@dataclass(frozen=True, slots=True)
class Identity:
    """What a connection must prove: the VM, its generation, and knowledge of its secret."""

    vm: bytes
    generation: int
    secret: bytes

    def proof(self, role: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
        """HMAC-SHA256 over role, VM, generation and both nonces. The role keeps a proof of
        one side from being played back as the other's."""
        said = _HELLO.pack(self.vm, self.generation, client_nonce)
        return hmac.digest(self.secret, b"dcres-1 " + role + said + server_nonce, hashlib.sha256)


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


def unpack_extents(payload: memoryview, page_count: int) -> tuple[Extents, int]:
    """Extents, and the offset behind them. Raises ProtocolError when they make no sense."""
    if len(payload) < _COUNT.size:
        raise ProtocolError("a frame ends inside its extents")
    (count,) = _COUNT.unpack_from(payload)
    stop = _COUNT.size + 16 * count
    if count == 0 or len(payload) < stop:
        raise ProtocolError(f"a frame announces {count} extents and holds {len(payload)} bytes")
    flat = np.frombuffer(payload[_COUNT.size : stop], dtype="<u8")
    if count == 1:
        sane = int(flat[0]) < int(flat[1]) <= page_count
    else:
        sane = not (flat > page_count).any() and _ascending(flat.astype(np.int64))
    if not sane:
        raise ProtocolError("a frame's extents are not ascending within the VM's memory")
    return flat.astype(np.int64).reshape(-1, 2), stop


def _ascending(flat: Extents) -> bool:
    """Whether extents, laid out flat, are neither empty nor overlap nor go back."""
    steps = np.diff(flat)
    return bool((steps[::2] > 0).all() and (steps[1::2] >= 0).all())


def unpack_only_extents(payload: memoryview, page_count: int) -> Extents:
    """Extents of a frame that carries nothing else. Raises ProtocolError."""
    extents, at = unpack_extents(payload, page_count)
    if at != len(payload):
        raise ProtocolError(f"a frame holds {len(payload) - at} bytes behind its extents")
    return extents


def unpack_pages(payload: memoryview, page_count: int) -> tuple[Extents, int]:
    """Extents of a frame that carries their data, and the offset where the data starts."""
    extents, at = unpack_extents(payload, page_count)
    pages = count_pages(extents)
    if pages > MAX_PAGES or len(payload) - at != pages * PAGE_SIZE:
        raise ProtocolError(f"a frame announces {pages} pages and holds {len(payload) - at} bytes")
    return extents, at


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
        self._start = 0
        self._stop = 0

    def receive_into(self) -> memoryview:
        """Where to receive next; never empty. Invalidates the payloads of earlier frames."""
        if self._start == self._stop:
            self._start = self._stop = 0
        elif len(self._buffer) - self._start < HEADER.size + MAX_PAYLOAD:
            left = self._stop - self._start
            self._buffer[:left] = bytes(self._buffer[self._start : self._stop])
            self._start, self._stop = 0, left
        return self._buffer[self._stop :]

    def received(self, length_bytes: int) -> None:
        """`length_bytes` were received into what `receive_into` gave."""
        self._stop += length_bytes

    def frames(self) -> Iterator[Frame]:
        """Complete frames, in order. Raises ProtocolError at a malformed one."""
        while self._stop - self._start >= HEADER.size:
            kind, request, length = _check_header(self._buffer, self._start)
            at = self._start + HEADER.size
            if self._stop - at < length:
                return
            self._start = at + length
            yield Frame(kind, request, self._buffer[at : at + length], at)


def _check_header(buffer: memoryview, at: int) -> tuple[Kind, int, int]:
    magic, version, kind, zero, request, length = HEADER.unpack_from(buffer, at)
    if magic != MAGIC or zero:
        raise ProtocolError("the peer does not speak the dcres paging protocol")
    if version != VERSION:
        raise ProtocolError(f"the peer speaks version {version}, this is version {VERSION}")
    if length > MAX_PAYLOAD:
        raise ProtocolError(f"a frame of {length} bytes is longer than {MAX_PAYLOAD}")
    try:
        return Kind(kind), request, length
    except ValueError:
        raise ProtocolError(f"frame kind {kind} is not known") from None


class ClientHandshake:
    """The pager's side: `hello`, then `answer` to each frame until it returns None."""

    def __init__(self, identity: Identity, nonce: bytes) -> None:
        self._identity = identity
        self._nonce = nonce
        self._server_nonce = b""
        self.page_count = 0

    def hello(self) -> bytes:
        """The first frame."""
        me = self._identity
        return frame(Kind.HELLO, 0, _HELLO.pack(me.vm, me.generation, self._nonce))

    def answer(self, received: Frame) -> bytes | None:
        """The next frame to send, or None when both sides have proved themselves.

        Raises Refused.
        """
        payload = bytes(received.payload)
        match received.kind:
            case Kind.CHALLENGE if not self._server_nonce and len(payload) == NONCE_BYTES:
                self._server_nonce = payload
                mine = self._identity.proof(b"client", self._nonce, payload)
                return frame(Kind.PROOF, 0, mine)
            case Kind.WELCOME if self._server_nonce and len(payload) == _WELCOME.size:
                theirs, self.page_count = _WELCOME.unpack(payload)
                mine = self._identity.proof(b"server", self._nonce, self._server_nonce)
                if not hmac.compare_digest(mine, theirs):
                    raise Refused("the memory server does not know this VM's secret")
                return None
            case Kind.REFUSED:
                raise Refused("the memory server refused this VM or its generation")
            case _:
                raise Refused(f"the memory server sent {received.kind.name} in the handshake")


class ServerHandshake:
    """The memory server's side: `answer` each frame; done once `accepted` is true."""

    def __init__(self, identity: Identity, nonce: bytes, page_count: int) -> None:
        self._identity = identity
        self._nonce = nonce
        self._page_count = page_count
        self._client_nonce = b""
        self.accepted = False

    def answer(self, received: Frame) -> bytes:
        """The frame to send back. Raises Refused with the reason, which the peer never hears."""
        payload = bytes(received.payload)
        match received.kind:
            case Kind.HELLO if not self._client_nonce and len(payload) == _HELLO.size:
                return self._challenge(payload)
            case Kind.PROOF if self._client_nonce and not self.accepted:
                return self._welcome(payload)
            case _:
                raise Refused(f"{received.kind.name} came before the handshake was done")

    def _challenge(self, payload: bytes) -> bytes:
        vm, generation, self._client_nonce = _HELLO.unpack(payload)
        if vm != self._identity.vm:
            raise Refused(f"it asks for VM {vm.hex()}")
        if generation != self._identity.generation:
            raise Refused(f"it is of generation {generation}, not {self._identity.generation}")
        return frame(Kind.CHALLENGE, 0, self._nonce)

    def _welcome(self, payload: bytes) -> bytes:
        theirs = self._identity.proof(b"client", self._client_nonce, self._nonce)
        if not hmac.compare_digest(theirs, payload):
            raise Refused("it does not know the VM's secret")
        self.accepted = True
        mine = self._identity.proof(b"server", self._client_nonce, self._nonce)
        return frame(Kind.WELCOME, 0, _WELCOME.pack(mine, self._page_count))
