"""
The cases of Autobahn's WebSocket test suite, by its numbers, as bytes: what a client sends, and what must come back.

They are data: who runs them, against what, is for test_websocket_cases.py. Sections 8, 11 and the timings of 9 are not
here: they are empty, or measure.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING

import attrs

from websocket_client import DEFLATE, TAIL, Deflater, Frame, Op, close_payload, frame

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AS_UVICORN = None  # the standard leaves it open, or uvicorn differs: only that the outcome is the same


@attrs.frozen
class Case:
    """
    *steps* but the last are each answered by one frame; the last may have any outcome.

    *expect* are the frames, or the codes of close frames, that answer the last step.
    """

    number: str
    title: str
    steps: tuple[bytes, ...]
    expect: tuple[Frame | int, ...] | None = AS_UVICORN
    offer: str | None = None
    chop: int | None = None  # sent in pieces of so many bytes
    is_cut_short: bool = False  # in the middle of a frame: nothing can follow

    @property
    def is_right(self) -> bool:
        """Whether the client does nothing wrong, and goes on."""
        return self.expect is not None and all(isinstance(answer, Frame) for answer in self.expect)


def text(data: str | bytes, **options: bool | int) -> bytes:
    return frame(Op.TEXT, data.encode() if isinstance(data, str) else data, **options)  # type: ignore[arg-type]


def echoed(data: bytes, op: Op = Op.TEXT) -> Frame:
    return Frame(op, data)


def fragments(op: Op, pieces: Sequence[bytes], between: bytes = b"", *, rsv: int = 0) -> bytes:
    """Return one message in pieces, with *between* between them."""
    last = len(pieces) - 1
    return between.join(
        frame(op if at == 0 else Op.CONT, piece, fin=at == last, rsv=rsv if at == 0 else 0)
        for at, piece in enumerate(pieces)
    )


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


PING = frame(Op.PING, b"between")
PONG = Frame(Op.PONG, b"between")
HELLO = text("Hello, world!")
FAILED = (1002,)


def framing() -> Iterator[Case]:
    """Section 1: sizes that need each form of the length."""
    for section, op, byte in ((1, Op.TEXT, b"*"), (2, Op.BINARY, b"\xfe")):
        for at, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), 1):
            data = byte * size
            yield Case(f"1.{section}.{at}", f"{size} bytes", (frame(op, data),), (echoed(data, op),))
        data = byte * 65536
        yield Case(f"1.{section}.8", "65536 bytes in chops of 997", (frame(op, data),), (echoed(data, op),), chop=997)


def pings() -> Iterator[Case]:
    """Section 2: pings are answered with their payload, pongs not at all."""
    binary = b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"
    for number, payload in ((1, b""), (2, b"Hello, world!"), (3, binary), (4, b"\xfe" * 125)):
        yield Case(f"2.{number}", f"ping of {len(payload)}", (frame(Op.PING, payload),), (Frame(Op.PONG, payload),))
    yield Case("2.5", "a ping that is too long", (frame(Op.PING, b"\xfe" * 126),), FAILED)
    yield Case("2.6", "octets", (frame(Op.PING, b"\xfe" * 125),), (Frame(Op.PONG, b"\xfe" * 125),), chop=1)
    yield Case("2.7", "a pong unasked for", (frame(Op.PONG),), ())
    yield Case("2.8", "a pong unasked for, with payload", (frame(Op.PONG, b"unasked"),), ())
    yield Case("2.9", "a pong unasked for, then a ping", (frame(Op.PONG, b"unasked") + PING,), (PONG,))
    ten = b"".join(frame(Op.PING, b"%d" % n) for n in range(10))
    answers = tuple([Frame(Op.PONG, b"%d" % n) for n in range(10)])
    yield Case("2.10", "ten pings", (ten,), answers)
    yield Case("2.11", "ten pings in octets", (ten,), answers, chop=1)


def reserved() -> Iterator[Case]:
    """Section 3: a reserved bit that no extension has taken fails the connection."""
    for number, rsv, op, payload in (
        (1, 1, Op.TEXT, b"x"),
        (2, 2, Op.TEXT, b"x"),
        (3, 3, Op.TEXT, b"x"),
        (4, 4, Op.TEXT, b"x"),
        (5, 5, Op.BINARY, b"x"),
        (6, 6, Op.PING, b"x"),
        (7, 7, Op.CLOSE, close_payload(1000)),
    ):
        bad = frame(op, payload, rsv=rsv)
        steps = (bad,) if number in (1, 7) else (HELLO, bad + PING)
        yield Case(f"3.{number}", f"reserved bits {rsv} of {op.name}", steps, FAILED)


def opcodes() -> Iterator[Case]:
    """Section 4: opcodes that nobody has defined."""
    for section, first in ((1, 3), (2, 11)):
        for at in range(5):
            bad = frame(first + at, b"payload" if at % 2 else b"")
            steps = (HELLO, bad + PING) if at > 1 else (bad,)
            yield Case(f"4.{section}.{at + 1}", f"opcode {first + at}", steps, FAILED)


def fragmentation() -> Iterator[Case]:
    """Section 5: messages in pieces, control frames between them, pieces out of place."""
    yield Case("5.1", "a ping in two", (frame(Op.PING, b"a", fin=False) + frame(Op.CONT, b"b"),), FAILED)
    yield Case("5.2", "a pong in two", (frame(Op.PONG, b"a", fin=False) + frame(Op.CONT, b"b"),), FAILED)
    two, five = (b"frag1", b"frag2"), (b"a", b"b", b"c", b"d", b"e")
    whole = echoed(b"frag1frag2")
    yield Case("5.3", "text in two", (fragments(Op.TEXT, two),), (whole,))
    yield Case("5.5", "text in two, in octets", (fragments(Op.TEXT, two),), (whole,), chop=1)
    yield Case("5.6", "a ping between", (fragments(Op.TEXT, two, PING),), (PONG, whole))
    yield Case("5.8", "a ping between, in octets", (fragments(Op.TEXT, two, PING),), (PONG, whole), chop=1)
    for number, fin, follows in ((9, True, HELLO), (10, True, b""), (12, False, HELLO), (13, False, b"")):
        bad = frame(Op.CONT, b"nothing to go on with", fin=fin) + follows
        yield Case(f"5.{number}", f"a piece of nothing, fin={fin}", (bad,), FAILED)
    bad = frame(Op.CONT, b"nothing to go on with", fin=False) + HELLO
    yield Case("5.15", "a message in two, then a piece of nothing", (fragments(Op.TEXT, two), bad), FAILED)
    bad = (frame(Op.CONT, b"a", fin=False) + fragments(Op.TEXT, two)) * 2
    yield Case("5.16", "a piece of nothing, a message in two, twice", (bad,), FAILED)
    yield Case("5.18", "text within text", (text("a", fin=False) + text("b"),), FAILED)
    yield Case("5.19", "five pieces, pings between", (fragments(Op.TEXT, five, PING),), (*[PONG] * 4, echoed(b"abcde")))
    yield Case("5.20", "the same in octets", (fragments(Op.TEXT, five, PING),), (*[PONG] * 4, echoed(b"abcde")), chop=1)
    whole = echoed(b"abcde", Op.BINARY)
    yield Case("5.21", "five binary pieces, empty pongs", (fragments(Op.BINARY, five, frame(Op.PONG)),), (whole,))


KAPPA = "\u03ba\u1f79\u03c3\u03bc\u03b5".encode()
SAMPLES = {
    "6.5": "Hello-\u00b5@\u00df\u00f6\u00e4\u00fc\u00e0\u00e1-UTF-8!!".encode(),
    "6.6": KAPPA,
    "6.7": b"\x00",
    "6.8": b"\xf8\x88\x80\x80\x80 \xfc\x84\x80\x80\x80\x80",
    "6.9": b"\x7f \xdf\xbf \xef\xbf\xbf \xf4\x8f\xbf\xbf",
    "6.10": b"\xf7\xbf\xbf\xbf",
    "6.11": b"\xed\x9f\xbf \xee\x80\x80 \xef\xbf\xbd",
    "6.12": b"\x80",
    "6.13": b"\xc0 \xc1",
    "6.14": b"\xc0",
    "6.14.2": b"\xe0\x80",
    "6.15": b"\xc0\xe0\x80\xf0\x80\x80",
    "6.16": b"\xfe",
    "6.16.2": b"\xff",
    "6.17": b"\xc0\xaf",
    "6.17.2": b"\xe0\x80\xaf",
    "6.17.3": b"\xf0\x80\x80\xaf",
    "6.18": b"\xc1\xbf",
    "6.18.2": b"\xe0\x9f\xbf",
    "6.18.3": b"\xf0\x8f\xbf\xbf",
    "6.19": b"\xc0\x80",
    "6.19.2": b"\xe0\x80\x80",
    "6.20": b"\xed\xa0\x80",
    "6.20.2": b"\xed\xad\xbf",
    "6.20.3": b"\xed\xbf\xbf",
    "6.21": b"\xed\xa0\x80\xed\xb0\x80",
    "6.21.2": b"\xed\xaf\xbf\xed\xbf\xbf",
    "6.22": b"\xef\xbf\xbe \xf0\x9f\xbf\xbe \xf4\x8f\xbf\xbf",
    "6.23": b"\xef\xbf\xbf",
}


def utf_8() -> Iterator[Case]:
    """Section 6: text is UTF-8, also where pieces cut a character; anything else is 1007."""
    yield Case("6.1.1", "empty text", (text(""),), (echoed(b""),))
    yield Case("6.1.2", "three empty pieces", (fragments(Op.TEXT, (b"", b"", b"")),), (echoed(b""),))
    yield Case("6.1.3", "a piece between empty ones", (fragments(Op.TEXT, (b"", b"mid", b"")),), (echoed(b"mid"),))
    good = SAMPLES["6.5"]
    yield Case("6.2.1", "good", (text(good),), (echoed(good),))
    yield Case("6.2.2", "cut between characters", (fragments(Op.TEXT, (good[:12], good[12:])),), (echoed(good),))
    yield Case("6.2.3", "pieces of one octet", (fragments(Op.TEXT, pieces_of(good, 1)),), (echoed(good),))
    yield Case("6.2.4", "characters cut", (fragments(Op.TEXT, pieces_of(KAPPA, 3)),), (echoed(KAPPA),))
    bad = KAPPA + b"\xed\xa0\x80" + b"edited"
    yield Case("6.3.1", "bad", (text(bad),), (1007,))
    yield Case("6.3.2", "bad in pieces of one octet", (fragments(Op.TEXT, pieces_of(bad, 1)),), (1007,))
    for number, third in (("6.4.1", b"edited"), ("6.4.2", b"\x80\x80")):
        parts = (KAPPA, b"\xf4\x90\x80\x80", third)
        yield Case(number, "bad in the second of three pieces", (fragments(Op.TEXT, parts),), (1007,))
    for number, sample in SAMPLES.items():
        try:
            sample.decode()
        except UnicodeDecodeError:
            yield Case(number, f"{sample.hex()} is not UTF-8", (text(sample),), (1007,))
        else:
            yield Case(number, f"{sample.hex()} is UTF-8", (text(sample),), (echoed(sample),))
            yield Case(f"{number}.p", "in octets", (fragments(Op.TEXT, pieces_of(sample, 1)),), (echoed(sample),))


def closing() -> Iterator[Case]:
    """Section 7: who closes is answered with the same code, and nothing comes after it."""
    bye = frame(Op.CLOSE, close_payload(1000))
    yield Case("7.1.1", "a message, then close", (HELLO, bye), (1000,))
    yield Case("7.1.2", "close twice", (bye + bye,), (1000,))
    yield Case("7.1.3", "a ping after close", (bye + PING,), (1000,))
    yield Case("7.1.4", "a message after close", (bye + HELLO,), (1000,))
    half = text("frag1", fin=False)
    yield Case("7.1.5", "close within a message", (half + bye + frame(Op.CONT, b"frag2"),))
    yield Case("7.1.6", "a large message, then close", (text("B" * (256 << 10)), bye), (1000,))
    yield Case("7.3.1", "no code", (frame(Op.CLOSE),), (Frame(Op.CLOSE),))
    yield Case("7.3.2", "half a code", (frame(Op.CLOSE, b"a"),), FAILED)
    yield Case("7.3.3", "a code", (bye,), (1000,))
    yield Case("7.3.4", "a reason", (frame(Op.CLOSE, close_payload(1000, b"Hello")),), (1000,))
    yield Case("7.3.5", "the longest reason", (frame(Op.CLOSE, close_payload(1000, b"*" * 123)),), (1000,))
    yield Case("7.3.6", "a reason too long", (frame(Op.CLOSE, close_payload(1000, b"*" * 124)),), FAILED)
    yield Case("7.5.1", "a reason not UTF-8", (frame(Op.CLOSE, close_payload(1000, b"\xce\xba\xed\xa0\x80")),), (1007,))
    for at, code in enumerate((*range(1000, 1004), *range(1007, 1012), 3000, 3999, 4000, 4999), 1):
        yield Case(f"7.7.{at}", f"code {code}", (frame(Op.CLOSE, close_payload(code)),), (code,))
    for at, code in enumerate((0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999), 1):
        yield Case(f"7.9.{at}", f"code {code}", (frame(Op.CLOSE, close_payload(code)),), FAILED)
    yield Case("7.13.1", "code 5000", (frame(Op.CLOSE, close_payload(5000)),))
    yield Case("7.13.2", "code 65535", (frame(Op.CLOSE, close_payload(65535)),))


def limits() -> Iterator[Case]:
    """Section 9, smaller, and 10: size, pieces, chops, number; and what is over uvicorn's limit."""
    for section, op, byte in ((1, Op.TEXT, b"*"), (2, Op.BINARY, b"\x00")):
        for at, kib in enumerate((64, 256, 1024), 1):
            data = byte * (kib << 10)
            yield Case(f"9.{section}.{at}", f"{kib} KiB", (frame(op, data),), (echoed(data, op),))
        data = byte * (256 << 10)
        for at, size in enumerate((64, 1024, 65536), 1):
            whole = fragments(op, pieces_of(data, size))
            yield Case(f"9.{section + 2}.{at}", f"in pieces of {size}", (whole,), (echoed(data, op),))
        yield Case(f"9.{section + 4}.1", "in chops of 1024", (frame(op, data),), (echoed(data, op),), chop=1024)
        many = frame(op, byte * 64) * 300
        yield Case(f"9.{section + 6}.1", "300 messages at once", (many,), (echoed(byte * 64, op),) * 300)
    data = b"*" * 65536
    yield Case("10.1.1", "pieces of 1300", (fragments(Op.TEXT, pieces_of(data, 1300)),), (echoed(data),))
    huge = frame(Op.BINARY, b"", length=17 << 20)
    yield Case("9.9.1", "a frame over the limit", (huge,), (1009,), is_cut_short=True)
    mib = b"\x00" * (1 << 20)
    yield Case("9.9.2", "pieces over the limit", (fragments(Op.BINARY, [mib] * 17),), (1009,), is_cut_short=True)
    yield Case("9.9.3", "a frame not masked", (frame(Op.TEXT, b"bare", mask=None),), FAILED)


def prose(size: int, seed: int = 0) -> bytes:
    """Return text that compresses as text does."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(200)]
    return " ".join(chance.choice(words) for _ in range(size // 2 + 1)).encode()[:size]


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def packed(deflater: Deflater, data: bytes, op: Op = Op.TEXT) -> bytes:
    return frame(op, deflater.message(data), rsv=4)


def compression() -> Iterator[Case]:
    """Section 12: sizes, and messages that refer to what was said before the move."""
    for at, size in enumerate((16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072), 1):
        for section, op, make in ((1, Op.TEXT, prose), (3, Op.BINARY, noise)):
            deflater = Deflater()
            messages = [make(size, seed) for seed in (1, 2, 1)]
            steps = tuple([packed(deflater, data, op) for data in messages])
            answer = (Frame(op, messages[-1], rsv1=True),)
            yield Case(f"12.{section}.{at}", f"{size} bytes of {make.__name__}", steps, answer, offer=DEFLATE)
    data = prose(8192)
    deflater = Deflater()
    parts = pieces_of(deflater.message(data), 128)
    answer = (Frame(Op.TEXT, data, rsv1=True),)
    yield Case("12.6", "compressed, in pieces", (fragments(Op.TEXT, parts, rsv=4),), answer, offer=DEFLATE)
    yield Case("12.7", "pings between", (fragments(Op.TEXT, [*parts[:5], b"".join(parts[5:])], PING, rsv=4),),
               (*[PONG] * 5, *answer), offer=DEFLATE)  # fmt: skip
    yield from compressed_wrongly()


def compressed_wrongly() -> Iterator[Case]:
    """What compression adds to the ways of being wrong, and to those of being right."""
    deflater = Deflater()
    first = packed(deflater, prose(3000))
    plain = (Frame(Op.TEXT, b"Hello, world!", rsv1=True),)
    yield Case("12.8.1", "not compressed", (first, HELLO), plain, offer=DEFLATE)
    yield Case("12.8.2", "empty", (first, packed(deflater, b"")), (Frame(Op.TEXT, b"", rsv1=True),), offer=DEFLATE)
    yield Case("12.8.3", "a compressed ping", (first, frame(Op.PING, b"x", rsv=4)), FAILED, offer=DEFLATE)
    parts = [deflater.message(prose(100))[:10], b"rest"]
    bad = frame(Op.TEXT, parts[0], fin=False, rsv=4) + frame(Op.CONT, parts[1], rsv=4)
    yield Case("12.8.4", "a piece that says compressed", (bad,), FAILED, offer=DEFLATE)
    yield Case("12.8.5", "not deflated", (first, frame(Op.TEXT, b"\xff" * 20, rsv=4)), offer=DEFLATE)
    yield Case("12.8.6", "not UTF-8", (packed(Deflater(), b"\xed\xa0\x80"),), (1007,), offer=DEFLATE)
    yield Case("12.8.7", "a bomb", (packed(Deflater(), b"\x00" * (17 << 20), Op.BINARY),), (1009,), offer=DEFLATE)
    finished = zlib.compressobj(wbits=-15)
    block = finished.compress(b"final") + finished.flush(zlib.Z_FINISH) + b"\x00"
    yield Case("12.8.8", "a final block", (frame(Op.TEXT, block, rsv=4),), offer=DEFLATE)
    stored = zlib.compressobj(level=0, wbits=-15)
    block = (stored.compress(b"stored") + stored.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
    yield Case("12.8.9", "a stored block", (frame(Op.TEXT, block, rsv=4),),
               (Frame(Op.TEXT, b"stored", rsv1=True),), offer=DEFLATE)  # fmt: skip
    yield Case("12.8.10", "other reserved bits", (first, frame(Op.TEXT, b"x", rsv=2)), FAILED, offer=DEFLATE)
    # Nothing was said of the client's window: it has 32 KiB, and the server must remember as much.
    far = noise(20_000)
    deflater = Deflater(15)
    steps: tuple[bytes, ...] = (packed(deflater, far, Op.BINARY), packed(deflater, far, Op.BINARY))
    answer = (Frame(Op.BINARY, far, rsv1=True),)
    yield Case("12.9.1", "20 KB back into history", steps, answer, offer=DEFLATE)
    deflater = Deflater(12)
    near = noise(3000)
    steps = (packed(deflater, near, Op.BINARY), packed(deflater, near, Op.BINARY))
    answer = (Frame(Op.BINARY, near, rsv1=True),)
    yield Case("12.9.2", "a window of 4 KiB", steps, answer, offer=f"{DEFLATE}; client_max_window_bits")
    deflater = Deflater(15)
    steps = tuple([packed(deflater, piece, Op.BINARY) for piece in (*pieces_of(far, 100)[:60], far[:6000])])
    answer = (Frame(Op.BINARY, far[:6000], rsv1=True),)
    yield Case("12.9.3", "history of sixty messages", steps, answer, offer=DEFLATE)


PARAMETERS: tuple[tuple[str, int, bool], ...] = (
    ("", 15, True),
    ("; client_no_context_takeover", 15, False),
    ("; server_no_context_takeover", 15, True),
    ("; client_no_context_takeover; server_no_context_takeover", 15, False),
    ("; server_max_window_bits=9", 15, True),
    ("; server_max_window_bits=15", 15, True),
    ("; client_max_window_bits=9", 9, True),
    ("; client_max_window_bits; server_max_window_bits=10", 12, True),
    ("; client_max_window_bits=10; client_no_context_takeover; server_no_context_takeover", 10, False),
    (f"; server_max_window_bits=9; bogus, {DEFLATE}; server_no_context_takeover, {DEFLATE}", 15, True),
)


def parameters() -> Iterator[Case]:
    """Section 13: what may be agreed on."""
    for at, (parameter, bits, has_context) in enumerate(PARAMETERS, 1):
        for size in (64, 16384):
            deflater = Deflater(bits, has_context=has_context)
            messages = [prose(size, seed) for seed in (1, 2, 1)]
            steps = tuple([packed(deflater, data) for data in messages])
            answer = (Frame(Op.TEXT, messages[-1], rsv1=True),)
            yield Case(f"13.{at}.{size}", parameter.strip("; ") or "none", steps, answer, offer=DEFLATE + parameter)
    for at, offer in enumerate(("x-unknown", f"{DEFLATE}; server_max_window_bits=7", f"{DEFLATE}; bogus"), 1):
        yield Case(f"13.20.{at}", f"declined: {offer}", (HELLO,), (echoed(b"Hello, world!"),), offer=offer)


CASES = [
    case
    for section in (
        *(framing, pings, reserved, opcodes, fragmentation, utf_8, closing, limits, compression, parameters),
    )
    for case in section()
]
