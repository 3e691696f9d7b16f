"""Who is on the other end: both sides of a paging connection prove themselves. No I/O.

::

    HELLO expected ──HELLO──▶ PROOF expected ──PROOF──▶ accepted           (server)
    CHALLENGE expected ──CHALLENGE──▶ WELCOME expected ──WELCOME──▶ proved (client)

Anything else, from whom it may come, is Refused and ends the connection.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from dcres.errors import Refused
from dcres.model.wire import VERSION, Frame, Kind, frame

NONCE_BYTES = 32

_HELLO = struct.Struct("<16sQ32sB")
_WELCOME = struct.Struct("<32sQ")


class Role(IntEnum):
    """What a client is, and so what it may ask for."""

    PAGER = 1  # moves pages; a memory server serves one at a time
    READER = 2  # only looks; there may be several
    EXPRESS = 3  # a pager once more, for pages that its guest waits for: PAGE_IN alone


@dataclass(frozen=True, slots=True)
class Identity:
    """What a connection must prove: the VM, its generation, and knowledge of its secret."""

    vm: bytes
    generation: int
    secret: bytes

    def hello(self, client_nonce: bytes, role: Role) -> bytes:
        """The payload of HELLO."""
        return _HELLO.pack(self.vm, self.generation, client_nonce, role)

    def proof(self, side: bytes, hello: bytes, server_nonce: bytes) -> bytes:
        """HMAC-SHA256 over side, HELLO's payload and the server's nonce. The side keeps a proof
        of one from being played back as the other's."""
        text = b"dcres-%d " % VERSION + side + hello + server_nonce
        return hmac.digest(self.secret, text, hashlib.sha256)


class ClientHandshake:
    """The client's side: `hello`, then `answer` to each frame until it returns None."""

    def __init__(self, identity: Identity, nonce: bytes, role: Role) -> None:
        self._identity = identity
        self._hello = identity.hello(nonce, role)
        self._server_nonce = b""
        self.page_count = 0

    def hello(self) -> bytes:
        """The first frame."""
        return frame(Kind.HELLO, 0, self._hello)

    def answer(self, received: Frame) -> bytes | None:
        """The next frame to send, or None when both sides have proved themselves.

        Raises Refused.
        """
        payload = bytes(received.payload)
        match received.kind:
            case Kind.CHALLENGE if not self._server_nonce and len(payload) == NONCE_BYTES:
                self._server_nonce = payload
                return frame(Kind.PROOF, 0, self._proof(b"client"))
            case Kind.WELCOME if self._server_nonce and len(payload) == _WELCOME.size:
                theirs, self.page_count = _WELCOME.unpack(payload)
                if not hmac.compare_digest(self._proof(b"server"), theirs):
                    raise Refused("the memory server does not know this VM's secret")
                return None
            case Kind.REFUSED:
                raise Refused("the memory server refused this VM or its generation")
            case _:
                raise Refused(f"the memory server sent {received.kind.name} in the handshake")

    def _proof(self, side: bytes) -> bytes:
        return self._identity.proof(side, self._hello, self._server_nonce)


class ServerHandshake:
    """The server's side: `answer` each frame; once `accepted` is true, `role` is proved too."""

    def __init__(self, identity: Identity, nonce: bytes, page_count: int) -> None:
        self._identity = identity
        self._nonce = nonce
        self._page_count = page_count
        self._hello = b""
        self.role = Role.READER  # the least, until the client has said what it is
        self.accepted = False

    def answer(self, received: Frame) -> bytes:
        """The frame to send back. Raises Refused with the reason, which the peer never hears."""
        payload = bytes(received.payload)
        match received.kind:
            case Kind.HELLO if not self._hello and len(payload) == _HELLO.size:
                return self._challenge(payload)
            case Kind.PROOF if self._hello and not self.accepted:
                return self._welcome(payload)
            case _:
                raise Refused(f"{received.kind.name} came before the handshake was done")

    def _challenge(self, payload: bytes) -> bytes:
        vm, generation, _, role = _HELLO.unpack(payload)
        if vm != self._identity.vm:
            raise Refused(f"it asks for VM {vm.hex()}")
        if generation != self._identity.generation:
            raise Refused(f"it is of generation {generation}, not {self._identity.generation}")
        if role not in tuple(Role):
            raise Refused(f"it says that it has role {role}")
        self.role = Role(role)
        self._hello = payload
        return frame(Kind.CHALLENGE, 0, self._nonce)

    def _welcome(self, payload: bytes) -> bytes:
        theirs = self._identity.proof(b"client", self._hello, self._nonce)
        if not hmac.compare_digest(theirs, payload):
            raise Refused("it does not know the VM's secret")
        self.accepted = True
        mine = self._identity.proof(b"server", self._hello, self._nonce)
        return frame(Kind.WELCOME, 0, _WELCOME.pack(mine, self._page_count))
