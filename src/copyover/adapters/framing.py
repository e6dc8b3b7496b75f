"""
Where messages end in a stream of bytes, without understanding them.

It tells what may be given to a parser and what has to wait; whether it is valid is the parser's business. A parser that
sees the end elsewhere is only given its bytes earlier.
"""

from __future__ import annotations

import enum
import re

import attrs

HEAD_END = re.compile(rb"\n\r?\n")  # h11 takes bare line feeds; a parser that does not refuses them
_LONGEST_SIZE_LINE = 4096
_SIZE = re.compile(rb"[0-9A-Fa-f]+")  # int() would take a sign too, and a negative size leads back


class _Part(enum.Enum):
    SIZE = enum.auto()
    DATA = enum.auto()  # with the CRLF after it
    TRAILER = enum.auto()
    OVER = enum.auto()


class Chunks:
    """Follows a chunked body. RFC 9112, 7.1"""

    def __init__(self) -> None:
        self._part = _Part.SIZE
        self._left = 0
        self.is_lost = False  # it is none, or none that can be followed

    @property
    def is_over(self) -> bool:
        return self._part is _Part.OVER

    def take(self, buffer: bytearray) -> int:
        """Return how many bytes at the front of *buffer* belong to the body, as far as that can be said."""
        at = 0
        while at < len(buffer) and self._part is not _Part.OVER and not self.is_lost:
            if self._part is _Part.DATA:
                step = min(self._left, len(buffer) - at)
                self._left -= step
                at += step
                if self._left == 0:
                    self._part = _Part.SIZE
                continue
            end = buffer.find(b"\n", at)
            if end < 0:
                self.is_lost = len(buffer) - at > _LONGEST_SIZE_LINE
                break
            self._read_line(bytes(buffer[at:end]).removesuffix(b"\r"))
            at = end + 1
        return len(buffer) if self.is_lost else at

    def _read_line(self, line: bytes) -> None:
        if self._part is _Part.TRAILER:
            if not line:
                self._part = _Part.OVER
            return
        digits = line.partition(b";")[0].rstrip(b" \t")
        if not _SIZE.fullmatch(digits):
            self.is_lost = True
            return
        size = int(digits, 16)
        self._left = size + len(b"\r\n")
        self._part = _Part.DATA if size else _Part.TRAILER


CHUNKED, LENGTH, UNTIL_CLOSED = "chunked", "length", "close"


@attrs.frozen
class Response:
    """
    How the body of a response ends: *left* bytes from here, where it tells a length; *is_last*: with the connection.

    RFC 9112, 6.3
    """

    framing: str
    left: int
    is_last: bool

    @classmethod
    def of(cls, head: bytes) -> Response:
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        is_chunked = b"transfer-encoding: chunked" in lines
        framing = CHUNKED if is_chunked else UNTIL_CLOSED if length is None else LENGTH
        return cls(framing, length or 0, b"connection: close" in lines)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what makes another response end in the same way."""
        made = {CHUNKED: [(b"transfer-encoding", b"chunked")], LENGTH: [(b"content-length", b"%d" % self.left)]}
        return made.get(self.framing, []) + ([(b"connection", b"close")] if self.is_last else [])


@attrs.frozen
class FrameHeader:
    """
    The first bytes of a WebSocket frame. RFC 6455, 5.2

    *size_bytes* is that of the whole frame, *payload_bytes* of what it says. *is_ordinary*: nothing in it would make a
    server refuse it at once.
    """

    opcode: int
    is_final: bool
    is_ordinary: bool
    size_bytes: int
    payload_bytes: int

    @property
    def is_control(self) -> bool:
        return self.opcode >= 8


CONTINUATION, CLOSE = 0, 8
_OPCODES = frozenset({0, 1, 2, 8, 9, 10})


def frame_header(buffer: bytearray, at: int, *, may_compress: bool) -> FrameHeader | None:
    """Read the header of the client's frame that begins at *at*; None if more bytes must come."""
    if len(buffer) - at < 2:
        return None
    first, second = buffer[at], buffer[at + 1]
    opcode, length = first & 0x0F, second & 0x7F
    extended = {126: 2, 127: 8}.get(length, 0)
    if len(buffer) - at < 2 + extended:
        return None
    if extended:
        length = int.from_bytes(buffer[at + 2 : at + 2 + extended], "big")
    is_final, reserved = bool(first & 0x80), first & 0x70
    is_control = opcode >= 8
    may_be_set = 0x40 if may_compress and not is_control and opcode != CONTINUATION else 0
    return FrameHeader(
        opcode=opcode,
        is_final=is_final,
        is_ordinary=(
            opcode in _OPCODES
            and not reserved & ~may_be_set
            and bool(second & 0x80)
            and (not is_control or (is_final and not extended))
        ),
        size_bytes=2 + extended + 4 + length,
        payload_bytes=length,
    )
