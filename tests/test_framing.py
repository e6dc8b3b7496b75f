"""Where messages end in bytes, against those who parse them: h11 for chunked bodies, websockets for frames."""

from __future__ import annotations

import itertools
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ProtocolError
from websockets.frames import CTRL_OPCODES, Frame, Opcode
from websockets.streams import StreamReader

from copyover.adapters.framing import Chunks, frame_header

HEAD = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\n\r\n"

NAMES = st.text("abcXYZ-", min_size=1, max_size=5).map(str.encode)
VALUES = st.text("abc \t;=:5", max_size=8).map(str.encode)
EXTENSIONS = st.just(b"") | VALUES.map(lambda value: b";" + value)
LINES = st.tuples(NAMES, VALUES).map(b": ".join)
FOLDED = st.tuples(LINES, VALUES).map(b"\r\n ".join)  # no new ones are made, and every parser takes them
TRAILERS = st.lists(LINES | FOLDED, max_size=3)
SPACES = st.sampled_from([b"", b" ", b"\t "])


@st.composite
def chunked(draw: st.DrawFn) -> bytes:
    """Return a valid body: hexadecimal digits of either case, leading zeros, extensions, trailers."""
    made = b""
    for data in draw(st.lists(st.binary(min_size=1, max_size=40), max_size=4)):
        size = draw(st.sampled_from([b"%x", b"%X", b"%04x"])) % len(data)
        made += size + draw(EXTENSIONS) + draw(SPACES) + b"\r\n" + data + b"\r\n"
    made += draw(st.sampled_from([b"0", b"000"])) + draw(EXTENSIONS) + b"\r\n"
    return made + b"".join(line + b"\r\n" for line in draw(TRAILERS)) + b"\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


def taken(pieces: list[bytes]) -> tuple[bytes, bytes, Chunks]:
    """Return what belongs to the body, what is left, and who says so."""
    chunks, buffer, body = Chunks(), bytearray(), b""
    for piece in pieces:
        buffer += piece
        count = chunks.take(buffer)
        body += bytes(buffer[:count])
        del buffer[:count]
    return body, bytes(buffer), chunks


def ends_for_h11(body: bytes) -> int | None:
    """Return how many bytes of *body* h11 takes before it sees its end; None if it never does, or refuses."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(HEAD)
    assert isinstance(connection.next_event(), h11.Request)
    connection.receive_data(body)
    try:
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return None
    except h11.RemoteProtocolError:
        return None
    return len(body) - len(connection.trailing_data[0])


@given(chunked(), st.lists(st.integers(0, 1 << 16), max_size=6))
def test_a_chunked_body_ends_where_h11_says(body: bytes, places: list[int]) -> None:
    """However it is cut: not a byte of the next request goes with it, none of it stays behind."""
    assert ends_for_h11(body + NEXT) == len(body)
    mine, left, chunks = taken(cut(body + NEXT, places))
    assert (mine, left) == (body, NEXT)
    assert chunks.is_over


@given(chunked())
def test_a_chunked_body_ends_at_its_last_byte(body: bytes) -> None:
    """One byte at a time, and over with the last one, not before."""
    chunks = Chunks()
    buffer = bytearray()
    for byte in body:
        assert not chunks.is_over
        buffer.append(byte)
        del buffer[: chunks.take(buffer)]
    assert chunks.is_over
    assert not buffer


@given(
    st.lists(st.sampled_from([b"5", b"0", b"-", b"+", b"_", b"x", b" ", b";a", b"a: b", b"\n", b"\r\n"]), max_size=12)
)
def test_nothing_waits_for_what_the_parser_has(pieces: list[bytes]) -> None:
    """
    Where h11 sees an end, so do we, or follow it no more: else a request would wait that its parser has.

    What is no chunked body is the parser's to refuse: whatever it is, it gets it, and we come back.
    """
    body = b"".join(pieces)
    mine, left, chunks = taken([body])
    assert mine + left == body
    end = ends_for_h11(body)
    if end is not None:
        assert chunks.is_lost or (chunks.is_over and len(mine) == end)


@pytest.mark.parametrize("size", [b"-6", b"-5", b"-ff", b"+5", b"0x5", b"1_0", b"", b"g", b"5 5"])
def test_a_size_that_is_none_is_passed_on(size: bytes) -> None:
    """The parser refuses it at once, and we follow it no more; a negative one must not lead back."""
    body, left, chunks = taken([size + b"\r\nhello\r\n", b"0\r\n\r\n"])
    assert body == size + b"\r\nhello\r\n0\r\n\r\n"
    assert not left
    assert chunks.is_lost
    assert not chunks.is_over


def test_a_line_without_end_is_passed_on() -> None:
    """Nothing is kept that its parser may have a limit for."""
    body, left, chunks = taken([b"5;" + b"a" * 3000])
    assert (body, chunks.is_lost) == (b"", False)
    assert left
    body, left, chunks = taken([b"5;" + b"a" * 3000, b"a" * 3000])
    assert (len(body), left, chunks.is_lost) == (6002, b"", True)


# ---- frames


def written(frame: Frame) -> bytes:
    return bytes(frame.serialize(mask=True))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    opcode = draw(st.sampled_from(Opcode))
    if opcode in CTRL_OPCODES:
        return Frame(opcode, draw(st.binary(max_size=125)), fin=True)
    length = draw(st.sampled_from([0, 1, 125, 126, 127, 65535, 65536, 70000]) | st.integers(0, 300))
    return Frame(opcode, bytes(length), fin=draw(st.booleans()))


@given(frames(), st.binary(max_size=9), st.binary(max_size=20))
def test_a_frame_is_as_long_as_its_writer_made_it(frame: Frame, before: bytes, after: bytes) -> None:
    """Wherever it stands in a buffer, and whatever follows."""
    data = written(frame)
    header = frame_header(bytearray(before + data + after), len(before), may_compress=False)
    assert header is not None
    assert (header.opcode, header.is_final, header.size_bytes) == (frame.opcode, frame.fin, len(data))
    assert header.is_ordinary
    assert header.is_control == (frame.opcode in CTRL_OPCODES)
    assert header.payload_bytes == len(frame.data)


@pytest.mark.parametrize(("length", "needed"), [(0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)])
def test_a_header_is_known_with_its_length(length: int, needed: int) -> None:
    """Not a byte sooner, and not a byte later: the key of its mask tells nothing."""
    data = written(Frame(Opcode.BINARY, bytes(length)))
    for count in range(needed):
        assert frame_header(bytearray(data[:count]), 0, may_compress=False) is None
    header = frame_header(bytearray(data[:needed]), 0, may_compress=False)
    assert header is not None
    assert header.size_bytes == len(data)


def is_refused(data: bytes, *, may_compress: bool) -> bool:
    """Whether websockets refuses a frame by its header alone."""
    reader = StreamReader()
    reader.feed_data(data)
    parsing = Frame.parse(reader.read_exact, mask=True, extensions=[_Flag()] if may_compress else None)  # type: ignore[list-item]  # it asks for decode only
    try:
        next(parsing)
    except ProtocolError:
        return True
    except StopIteration:
        return False
    return False


class _Flag:
    """Takes the flag of a compressed message away, and leaves the message alone."""

    def decode(self, frame: Frame, **_: Any) -> Frame:
        is_message = frame.opcode in {Opcode.TEXT, Opcode.BINARY}
        return Frame(frame.opcode, frame.data, frame.fin, frame.rsv1 and not is_message, frame.rsv2, frame.rsv3)


@pytest.mark.parametrize("may_compress", [False, True])
@pytest.mark.parametrize("length", [0, 1, 125, 126, 127])
def test_what_websockets_refuses_is_not_ordinary(length: int, *, may_compress: bool) -> None:
    """What it refuses at once must not be waited for; what it takes may be. Each first byte, masked and not."""
    extended = {126: (255).to_bytes(2, "big"), 127: (65536).to_bytes(8, "big")}.get(length, b"")
    for first in range(256):
        for second in (length, 0x80 | length):
            data = bytes([first, second]) + extended + bytes(4)
            header = frame_header(bytearray(data), 0, may_compress=may_compress)
            assert header is not None
            refused = is_refused(data + bytes(header.size_bytes), may_compress=may_compress)
            assert header.is_ordinary != refused, data
