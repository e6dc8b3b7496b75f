"""
A WebSocket client that sends any bytes, right or wrong, and looks at each frame that comes back (RFC 6455, RFC 7692).

It decides nothing about the server: it says what came. Its masks are fixed, so that the same case is the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import struct
import zlib
from enum import IntEnum

import attrs

from clients import Client

MASK = b"\x37\xfa\x21\x3d"  # that of the examples in RFC 6455
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
DEFLATE = "permessage-deflate"
TAIL = b"\x00\x00\xff\xff"  # what a sync flush ends with, and a message leaves out. RFC 7692, 7.2.1


class Op(IntEnum):
    """Opcodes."""

    CONT = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


@attrs.frozen
class Frame:
    """A frame as it came; of a compressed message, the payload is what was compressed."""

    op: int
    payload: bytes = b""
    fin: bool = True
    rsv1: bool = False

    def __str__(self) -> str:
        shown = self.payload if len(self.payload) <= 64 else b"%d bytes" % len(self.payload)
        return f"{Op(self.op).name} {shown!r}{'' if self.fin else ' …'}{' compressed' if self.rsv1 else ''}"


def frame(
    op: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = MASK,
    length: int | None = None,
) -> bytes:
    """Return the bytes of one frame; *length* lies about the payload's, or spells it longer than need be."""
    stated = len(payload) if length is None else length
    first = (0x80 if fin else 0) | rsv << 4 | op
    masked = 0x80 if mask is not None else 0
    if stated < 126:
        head = struct.pack("!BB", first, masked | stated)
    elif stated < 1 << 16:
        head = struct.pack("!BBH", first, masked | 126, stated)
    else:
        head = struct.pack("!BBQ", first, masked | 127, stated)
    return head + payload if mask is None else head + mask + unmask(payload, mask)


def unmask(payload: bytes, mask: bytes = MASK) -> bytes:
    """Mask or unmask."""
    size = len(payload)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")


def close_payload(code: int, reason: bytes = b"") -> bytes:
    return struct.pack("!H", code) + reason


class Deflater:
    """Compresses messages as a client does, with one window for all of them, or without."""

    def __init__(self, bits: int = 15, *, has_context: bool = True) -> None:
        self._bits, self._has_context = bits, has_context
        self._begin()

    def _begin(self) -> None:
        self._compressor = zlib.compressobj(wbits=-self._bits)

    def message(self, data: bytes) -> bytes:
        whole = self._compressor.compress(data) + self._compressor.flush(zlib.Z_SYNC_FLUSH)
        if not self._has_context:
            self._begin()
        return whole.removesuffix(TAIL)


class WebSocketClient(Client):
    """One connection, from its handshake on."""

    def __init__(
        self,
        address: tuple[str, int] | str,
        path: str,
        *,
        offer: str | None = None,
        headers: str = "",
        handshake: bool = True,
    ) -> None:
        super().__init__(address)
        self.extensions = ""
        self.answer = ""
        self._inflater: zlib._Decompress | None = None
        key = base64.b64encode(os.urandom(16))
        extension = f"Sec-WebSocket-Extensions: {offer}\r\n" if offer else ""
        self._accept = base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()
        self.send(
            f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n{extension}{headers}\r\n".encode()
        )
        if handshake:
            self.shake_hands()

    def shake_hands(self) -> None:
        """
        Read the answer to the handshake.

        Raises:
            AssertionError: it is not the right one.

        """
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            more = self.socket.recv(1)
            assert more, f"the connection ended after {data!r}"
            data += more
        self.answer = data.decode("latin-1")
        assert self.answer.startswith("HTTP/1.1 101 "), self.answer
        assert self._accept in self.answer
        for line in self.answer.split("\r\n"):
            if line.lower().startswith("sec-websocket-extensions:"):
                self.extensions = line.partition(":")[2].strip()

    def _begin_inflating(self) -> None:
        """Take the window that was agreed on, and no larger: what the server sends must fit it."""
        found = re.search(r"server_max_window_bits=(\d+)", self.extensions)
        self._inflater = zlib.decompressobj(wbits=-int(found[1]) if found else -15)

    # ---- sending

    def send_frame(self, op: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> None:
        self.send(frame(op, payload, fin=fin, rsv=rsv))

    def send_text(self, text: str) -> None:
        self.send_frame(Op.TEXT, text.encode())

    # ---- receiving

    def receive_frame(self) -> Frame | None:
        """Return the next frame, or None at the end of the connection, by FIN or by RST."""
        try:
            head = self.receive(2)
            if not head:
                return None
            length = head[1]
            assert length < 128, "a server must not mask"
            if length >= 126:
                size = 2 if length == 126 else 8
                length = int.from_bytes(self._exactly(size), "big")
            payload = self._exactly(length)
        except ConnectionResetError:
            return None
        fin, rsv, op = bool(head[0] & 0x80), head[0] >> 4 & 7, head[0] & 15
        assert rsv in (0, 4), f"reserved bits {rsv:#x}"
        if rsv:
            assert self.extensions, "compressed, and nobody had agreed to it"
            assert fin, "uvicorn sends whole messages"
            if self._inflater is None or "server_no_context_takeover" in self.extensions:
                self._begin_inflating()
            assert self._inflater is not None
            payload = self._inflater.decompress(payload + TAIL)
        return Frame(op, payload, fin, bool(rsv))

    def message(self) -> str:
        """Return the next message, which must be text."""
        came = self.receive_frame()
        assert came is not None, "the connection has ended"
        assert came.op == Op.TEXT, came
        return came.payload.decode()

    def ask_text(self, text: str) -> str:
        self.send_text(text)
        return self.message()

    def frames_until_end(self, last: bytes | None = None) -> list[Frame]:
        """Return all frames up to the end of the connection, or up to the message that says *last*."""
        frames = []
        while (came := self.receive_frame()) is not None:
            if last is not None and came.op == Op.TEXT and came.payload == last:
                break
            frames.append(came)
        else:
            frames.append(END)
        return frames

    def _exactly(self, count: int) -> bytes:
        data = self.receive(count)
        if len(data) < count:
            raise ConnectionResetError("it ended in the middle of a frame")
        return data


END = Frame(Op.CLOSE, b"the end of the connection", fin=False)  # no frame that can come
