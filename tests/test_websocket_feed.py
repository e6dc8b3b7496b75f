"""uvicorn's WebSockets are fed whole messages: wherever bytes are cut, and whatever comes among them."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Close, Frame, Opcode
from websockets.streams import StreamReader

from copyover.worker.served import Course
from copyover.worker.transport import READ_BYTES
from inside import Line, enter, serving, turns, until

UPGRADE = (
    b"GET /chat HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: %s\r\n%s\r\n"
)
HEAD_BYTES = len(UPGRADE % (base64.b64encode(bytes(16)), b""))
DEFLATE = b"sec-websocket-extensions: permessage-deflate\r\n"


class Application:
    """Notes what it receives; it waits before each message while *is_held*."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.entries = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.accepts = asyncio.Event()
        self.accepts.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        assert (await receive())["type"] == "websocket.connect"
        self.entries += 1
        await self.accepts.wait()
        await send({"type": "websocket.accept"})
        while True:
            await self.gate.wait()
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self.received.append(message.get("code"))
                return
            found = message.get("text")
            self.received.append(message.get("bytes") if found is None else found)


class Browser:
    """The client's end, frame by frame."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._reader = StreamReader()

    def connect(self, headers: bytes = b"") -> None:
        self.line.send(UPGRADE % (base64.b64encode(bytes(16)), headers))

    async def connected(self) -> bytes:
        answer = await self.line.receive(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101")
        return answer

    def frames(self) -> list[Frame]:
        """Return the frames that came meanwhile."""
        self._reader.feed_data(self.line.received())
        found = []
        while True:
            parsing = Frame.parse(self._reader.read_exact, mask=False)
            try:
                next(parsing)
            except StopIteration as parsed:
                found.append(parsed.value)
                continue
            return found

    def send(self, *frames: Frame) -> None:
        self.line.send(data_of(*frames))


def data_of(*frames: Frame, deflate: PerMessageDeflate | None = None) -> bytes:
    extensions = None if deflate is None else [deflate]
    return b"".join(bytes(frame.serialize(mask=True, extensions=extensions)) for frame in frames)


def text(data: bytes, *, fin: bool = True) -> Frame:
    return Frame(Opcode.TEXT, data, fin=fin)


def more(data: bytes, *, fin: bool = False) -> Frame:
    return Frame(Opcode.CONT, data, fin=fin)


def ping(data: bytes) -> Frame:
    return Frame(Opcode.PING, data)


Scene = Callable[[Line, Browser, Application], Coroutine[Any, Any, None]]


def play(scene: Scene, *, resume: tuple[str, ...] = ("websocket",), headers: bytes = b"", **options: Any) -> None:
    """Play one scene on a WebSocket that is open."""

    async def whole() -> None:
        app = Application()
        async with serving(app, resume=resume, ws_ping_interval=None, **options) as host:
            line = Line(host)
            enter(line)
            browser = Browser(line)
            browser.connect(headers)
            try:
                await browser.connected()
                await scene(line, browser, app)
            finally:
                app.gate.set()
                line.served.abort()
                await turns()
                line.close()

    asyncio.run(whole())


CONVERSATION = [
    text(b"one"),
    text(b"t", fin=False),
    ping(b"among"),
    more(b"w"),
    ping(b""),
    more(b""),
    more("ö".encode(), fin=True),
    Frame(Opcode.PONG, b"unasked"),
    Frame(Opcode.BINARY, bytes(300)),
    Frame(Opcode.BINARY, b"a", fin=False),
    more(b"b", fin=True),
]
MESSAGES = ["one", "twö", bytes(300), b"ab"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(data_of(*CONVERSATION))), max_size=8))
def test_messages_arrive_wherever_they_are_cut(places: list[int]) -> None:
    """Each once, in order; each ping is answered, in order, among the fragments too."""
    data = data_of(*CONVERSATION)
    edges = [0, *sorted(places), len(data)]

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                line.send(data[start:stop])
                await until(lambda stop=stop: line.transport.received >= HEAD_BYTES + stop)  # type: ignore[misc]  # bound early
                await turns(2)
        await until(lambda: app.received == MESSAGES)
        await turns()
        assert not line.transport.input
        assert [frame.data for frame in browser.frames()] == [b"among", b""]

    play(scene)


def test_it_moves_at_every_byte() -> None:
    """Wherever the client is in what it says, its connection can move, and nothing is lost, repeated or reordered."""
    data = data_of(*CONVERSATION)

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        pongs = []
        for place in range(len(data)):
            line.send(data[place : place + 1])
            await turns(4)
            pongs += [frame.data for frame in browser.frames()]
            await line.move()
            enter(line)
            await turns(4)
        await until(lambda: app.received == MESSAGES)
        assert pongs == [b"among", b""]
        assert app.entries == 1 + len(data)

    play(scene)


def test_what_is_left_is_what_was_not_given() -> None:
    """Fragments wait in the buffer, which travels; control frames among them do not, for they were answered."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        first, second, last = text(b"a", fin=False), more(b"b"), more(b"c", fin=True)
        browser.send(first, ping(b"1"), second, ping(b"2"))
        await until(lambda: line.transport.input == data_of_same(line, first, second))
        assert [frame.data for frame in browser.frames()] == [b"1", b"2"]
        assert line.served.is_at_boundary
        browser.send(last)
        await until(lambda: app.received == ["abc"])
        assert not line.transport.input

    def data_of_same(line: Line, *frames: Frame) -> bytes:
        """A mask differs each time: take the lengths of what is there, and its first bytes."""
        found = bytes(line.transport.input)
        wanted = data_of(*frames)
        return found if len(found) == len(wanted) and found[:2] == wanted[:2] else wanted

    play(scene)


def test_a_message_at_a_time() -> None:
    """While the application is at one, those after it wait in the buffer, so that there is a boundary; and move."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        await turns()
        app.gate.clear()
        browser.send(text(b"one"), text(b"two"), text(b"three"))
        await until(lambda: app.received == ["one"])
        await turns()
        assert app.received == ["one"]
        assert len(line.transport.input) == len(data_of(text(b"two")) + data_of(text(b"three")))
        halted: list[bool] = []
        assert not line.served.ask_to_halt(lambda: halted.append(True))
        assert line.served.reason == "its application is at a message"
        app.gate.set()
        await until(lambda: halted)
        assert app.received == ["one"]
        await line.move()
        enter(line)
        await until(lambda: app.received == ["one", "two", "three"])

    play(scene)


def test_it_stays_while_a_message_is_on_its_way() -> None:
    """From its last byte until the application asks for the next: a message is never given to two."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        await turns()
        app.gate.clear()
        browser.send(text(b"one"))
        await until(lambda: line.transport.received > HEAD_BYTES)
        assert app.received == []  # it is in its queue
        halted: list[bool] = []
        assert not line.served.ask_to_halt(lambda: halted.append(True))
        await until(lambda: app.received == ["one"])
        await turns()
        assert not halted  # it is at it
        assert not line.served.is_at_boundary
        app.gate.set()
        await until(lambda: halted)

    play(scene)


def test_frames_that_come_before_the_answer() -> None:
    """Who does not wait for it is served all the same, once it is given."""

    async def whole() -> None:
        app = Application()
        app.accepts.clear()
        async with serving(app, ws_ping_interval=None) as host:
            line = Line(host)
            enter(line)
            browser = Browser(line)
            browser.connect()
            browser.send(text(b"early"))
            await until(lambda: app.entries)
            await turns()
            app.accepts.set()
            await until(lambda: app.received == ["early"])
            line.served.abort()
            await turns()
            line.close()

    asyncio.run(whole())


# ---- the end


def test_a_close_among_fragments() -> None:
    """It is passed on with what it cuts off, of which websockets says that it is no message."""

    async def scene(_line: Line, browser: Browser, app: Application) -> None:
        browser.send(text(b"half", fin=False), Frame(Opcode.CLOSE, Close(4001, "bye").serialize()))
        await until(lambda: app.received == [1002])
        await turns()
        (close,) = browser.frames()
        assert close.opcode is Opcode.CLOSE

    play(scene)


def test_messages_before_a_close_and_an_end() -> None:
    """All that came whole is received, one after the other, though the client has gone since."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        await turns()
        app.gate.clear()
        browser.send(text(b"one"), text(b"two"), text(b"three"), Frame(Opcode.CLOSE, Close(4002, "").serialize()))
        line.finish()
        await until(lambda: app.received == ["one"])
        await turns()
        app.gate.set()
        await until(lambda: len(app.received) == 4)
        assert app.received == ["one", "two", "three", 4002]

    play(scene)


def test_messages_before_an_end_without_a_close() -> None:
    """A client that dies has said what it said."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        await turns()
        app.gate.clear()
        browser.send(text(b"one"), text(b"two"), text(b"thr", fin=False))
        line.finish()
        await until(lambda: line.transport.is_eof or len(app.received) == 1)
        app.gate.set()
        await until(lambda: len(app.received) == 3)
        assert app.received == ["one", "two", 1005]

    play(scene)


# ---- what is no message


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xc1\x85", 1002),  # a reserved bit
        (b"\x83\xfe\xff\xff", 1002),  # no such opcode, and more to come
        (b"\x81\x7e\xff\xff", 1002),  # not masked, and more to come
        (b"\x09\x80", 1002),  # a ping in fragments
        (b"\x89\xfe\x00\x7e" + bytes(126), 1002),  # a ping of 126 bytes
        (b"\x00\x80\0\0\0\0", 1002),  # a continuation of nothing, and more to come
        (b"\x01\x80\0\0\0\0\x01\x80\0\0\0\0", 1002),  # a message within a message, and more to come
        (b"\x82\xff\x00\x00\x00\x01\x00\x00\x00\x00", 1009),  # 4 GiB to come
        (b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff", 1009),
    ],
)
def test_what_is_refused_is_refused_at_once(data: bytes, code: int) -> None:
    """A header suffices: nobody waits for the rest of what no server would take."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        line.send(data + b"\x8a\x80" * 9)  # a mask, what is little, and the beginning of what comes next
        await until(lambda: app.received == [code])
        await turns()
        frame = browser.frames()[-1]
        assert frame.opcode is Opcode.CLOSE
        assert Close.parse(frame.data).code == code

    play(scene)


def test_text_that_is_none() -> None:
    """It is whole, and refused by what it says."""

    async def scene(_line: Line, browser: Browser, app: Application) -> None:
        browser.send(text(b"\xff"))
        await until(lambda: app.received == [1007])

    play(scene)


# ---- sizes


@pytest.mark.parametrize("size", [READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES])
@pytest.mark.parametrize("fragments", [1, 2, 7])
def test_a_message_larger_than_what_is_read_ahead(size: int, fragments: int) -> None:
    """It is read until it is whole: what is read ahead grows with what is waited for."""
    piece = -(-size // fragments)
    frames = [
        Frame(Opcode.CONT if place else Opcode.BINARY, bytes(min(piece, size - place)), fin=place + piece >= size)
        for place in range(0, size, piece)
    ]

    async def scene(line: Line, _: Browser, app: Application) -> None:
        data = data_of(*frames, text(b"next"))
        await pour(line, data)
        await until(lambda: app.received == [bytes(size), "next"], "a message does not arrive")

    play(scene)


@pytest.mark.parametrize("early", [0, 1, 3])
def test_a_fragment_as_large_as_what_is_read_ahead(early: int) -> None:
    """It is whole and its message is not: the next one is read, though its length is not known yet."""
    first = Frame(Opcode.BINARY, bytes(READ_BYTES - 8 - early), fin=False)

    async def scene(line: Line, _: Browser, app: Application) -> None:
        data = data_of(first, more(bytes(200), fin=True))
        await pour(line, data[:READ_BYTES])
        await until(lambda: len(line.transport.input) == READ_BYTES)
        await turns()
        await pour(line, data[READ_BYTES:])
        await until(lambda: app.received == [bytes(READ_BYTES + 192 - early)], "a message does not arrive")

    play(scene)


def test_many_small_fragments() -> None:
    """Their headers are larger than what they say, and all of them wait for the last."""

    async def scene(line: Line, _: Browser, app: Application) -> None:
        count = 30_000
        await pour(line, data_of(text(b"a", fin=False)) + data_of(more(b"a")) * count + data_of(more(b"", fin=True)))
        await until(lambda: app.received == ["a" * (count + 1)], "a message does not arrive")

    play(scene)


def test_a_large_message_moves_in_its_middle() -> None:
    """Half of it is read here and travels, the rest is read there."""

    async def scene(line: Line, _: Browser, app: Application) -> None:
        data = data_of(Frame(Opcode.BINARY, bytes(5 * READ_BYTES)), text(b"next"))
        half = 3 * READ_BYTES
        await pour(line, data[:half])
        await until(lambda: len(line.transport.input) == half)
        await line.move()
        enter(line)
        await pour(line, data[half:])
        await until(lambda: app.received == [bytes(5 * READ_BYTES), "next"], "a message does not arrive")

    play(scene)


@pytest.mark.parametrize("fragments", [1, 10])
def test_a_message_over_the_limit(fragments: int) -> None:
    """It is refused before it is whole, and no more than the limit of it is kept."""

    async def scene(line: Line, _: Browser, app: Application) -> None:
        size = 200_000 // fragments
        frames = [Frame(Opcode.CONT if n else Opcode.BINARY, bytes(size), fin=False) for n in range(fragments)]
        data = data_of(*frames)
        at = 0
        while at < len(data) - 5000 and not app.received:
            line.send(data[at : at + 1000])
            at += 1000
            await turns(3)
            assert len(line.transport.input) <= 101_000
        await until(lambda: app.received == [1009])
        assert at < 110_000

    play(scene, ws_max_size=100_000)


@pytest.mark.parametrize("fragments", [1, 100])
def test_a_message_at_the_limit(fragments: int) -> None:
    """It is none too many, whatever the headers of its frames add: it arrives, and its connection can move."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        last = fragments - 1
        size = 100_000 // fragments
        frames = [Frame(Opcode.CONT if n else Opcode.BINARY, bytes(size), fin=n == last) for n in range(fragments)]
        await pour(line, data_of(*frames) + data_of(*frames))
        await until(lambda: app.received == [bytes(100_000)] * 2)
        await line.move()
        enter(line)
        browser.send(text(b"next"))
        await until(lambda: app.received[2:] == ["next"])

    play(scene, ws_max_size=100_000)


async def pour(line: Line, data: bytes) -> None:
    """Send more than a socket takes at once."""
    view, done = memoryview(data), 0

    def is_sent() -> bool:
        nonlocal done
        while done < len(view):
            try:
                done += line.socket.send(view[done : done + (1 << 16)])
            except BlockingIOError:
                return False
        return True

    await until(is_sent, f"of {len(data)} bytes it reads {done}")


# ---- compression


def test_compressed_messages_move_at_every_byte() -> None:
    """Each refers to what came before; with the window they are understood after each move."""
    client = PerMessageDeflate(False, False, 12, 12, {})
    said = [b"copyover moves connections", b"connections that copyover moves", b"moves moves moves"]
    data = b"".join(
        data_of(text(message[:9], fin=False), ping(b"among"), more(message[9:], fin=True), deflate=client)
        for message in said
    )

    async def scene(line: Line, _: Browser, app: Application) -> None:
        for place in range(len(data)):
            line.send(data[place : place + 1])
            await turns(4)
            await line.move()
            enter(line)
            await turns(4)
        await until(lambda: app.received == [message.decode() for message in said])

    play(scene, headers=DEFLATE)


# ---- consent


def test_without_consent_it_stays() -> None:
    """And says why; nothing else of it is different."""

    async def scene(line: Line, browser: Browser, app: Application) -> None:
        await turns()
        assert not line.halt()
        assert line.served.reason == "its application has not said that it can be entered again"
        assert line.served.obstacle == line.served.reason
        line.served.go_on()
        browser.send(*CONVERSATION)
        await until(lambda: app.received == MESSAGES)
        assert line.served.course is Course.RUNNING

    play(scene, resume=())
