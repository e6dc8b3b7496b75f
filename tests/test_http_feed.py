"""uvicorn's HTTP connections are fed one request at a time: each is answered once, by whoever has it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copyover.worker.served import Course
from copyover.worker.transport import READ_BYTES, Phase
from inside import Line, enter, serving, turns, until

BOTH = pytest.mark.parametrize("http", ["h11", "httptools"])


class Application:
    """
    Answers with the path and the body of each request.

    */early* answers before it reads, */held* when *gate* is open.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.answered: list[str] = []
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.begun.append(path)
        body = b""
        if path == "/held":
            await self.gate.wait()
        if path != "/early":
            is_more = True
            while is_more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message["body"]
                is_more = message["more_body"]
        answer = path.encode() + b" " + body
        headers = [(b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})
        self.answered.append(path)


class Agent:
    """The client's end: how many answers of its requests have come, and which."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._connection = h11.Connection(h11.CLIENT)
        self.answers: list[bytes] = []
        self._body = b""

    def look(self) -> list[bytes]:
        """Return the answers that have come so far."""
        data = self._line.received()
        if data:
            self._connection.receive_data(data)
        while True:
            if self._connection.our_state is h11.IDLE:
                self._connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
                self._connection.send(h11.EndOfMessage())
            event = self._connection.next_event()
            if event in (h11.NEED_DATA, h11.PAUSED):
                return self.answers
            if isinstance(event, h11.Data):
                self._body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.answers.append(self._body)
                self._body = b""
                if self._connection.their_state is not h11.DONE:
                    return self.answers
                self._connection.start_next_cycle()
            elif isinstance(event, h11.ConnectionClosed):
                return self.answers


def get(path: bytes, extra: bytes = b"") -> bytes:
    return b"GET %s HTTP/1.1\r\nhost: a\r\n%s\r\n" % (path, extra)


def post(path: bytes, body: bytes) -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (path, len(body), body)


def chunked(path: bytes, *pieces: bytes) -> bytes:
    body = b"".join(b"%x;a=b\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"POST %s HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n%s0\r\nx: y\r\n\r\n" % (path, body)


REQUESTS = [
    (get(b"/a"), b"/a "),
    (post(b"/b", b"hello"), b"/b hello"),
    (chunked(b"/c", b"he", b"llo\r\n\r\n"), b"/c hello\r\n\r\n"),
    (post(b"/early", b"unread"), b"/early "),
    (post(b"/d", b""), b"/d "),
    (chunked(b"/early", b"unread", b"\r\n0\r\n\r\n"), b"/early "),
    (get(b"/e", b"connection: keep-alive\r\n"), b"/e "),
]
WHOLE = b"".join(request for request, _ in REQUESTS)
ANSWERS = [answer for _, answer in REQUESTS]

Scene = Callable[[Line, Agent, Application], Coroutine[Any, Any, None]]


def play(http: str, scene: Scene, **options: Any) -> None:
    async def whole() -> None:
        app = Application()
        async with serving(app, http=http, **options) as host:
            line = Line(host)
            enter(line)
            try:
                await scene(line, Agent(line), app)
            finally:
                app.gate.set()
                line.served.abort()
                await turns()
                line.close()

    asyncio.run(whole())


# ---- cut, and moved


@BOTH
@settings(max_examples=30, deadline=None)
@given(places=st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_requests_are_answered_wherever_they_are_cut(http: str, places: list[int]) -> None:
    """Pipelined, with bodies of both kinds, some of them never read: each once, in order."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        for start, stop in itertools.pairwise([0, *sorted(places), len(WHOLE)]):
            line.send(WHOLE[start:stop])
            await turns(3)
        await until(lambda: agent.look() == ANSWERS)
        await turns()
        assert not line.transport.input
        assert line.served.is_at_boundary

    play(http, scene)


@BOTH
def test_it_moves_between_any_two_bytes(http: str) -> None:
    """As soon as it can: what has no answer yet travels, what has one does not; nothing is answered twice."""

    async def scene(line: Line, agent: Agent, app: Application) -> None:
        moves = 0
        for place in range(len(WHOLE)):
            line.send(WHOLE[place : place + 1])
            await turns(4)
            if line.halt():
                await line.move()
                enter(line)
                moves += 1
                await turns(2)
            else:
                line.served.go_on()
        await until(lambda: agent.look() == ANSWERS)
        heads = sum(request.index(b"\r\n\r\n") + 4 for request, _ in REQUESTS)
        assert moves >= heads - len(REQUESTS)
        assert app.begun == [answer.split()[0].decode() for answer in ANSWERS]

    play(http, scene)


@BOTH
def test_it_moves_after_each_answer(http: str) -> None:
    """All requests have come: each worker answers one, and the rest travels."""

    async def scene(line: Line, agent: Agent, app: Application) -> None:
        line.send(WHOLE)
        for count in range(1, len(REQUESTS)):
            halted: list[bool] = []
            await until(lambda count=count: len(app.begun) == count)  # type: ignore[misc]  # bound early
            if not line.served.ask_to_halt(lambda halted=halted: halted.append(True)):  # type: ignore[misc]
                await until(lambda halted=halted: halted)  # type: ignore[misc]
            assert bytes(line.transport.input) == b"".join(request for request, _ in REQUESTS[count:])
            await line.move()
            enter(line)
        await until(lambda: agent.look() == ANSWERS)

    play(http, scene)


# ---- what is left in the buffer


@BOTH
def test_what_is_left_is_what_has_no_answer(http: str) -> None:
    """A partial head stays though its parser has it; of a request under way, nothing does."""

    async def scene(line: Line, _: Agent, app: Application) -> None:
        request = get(b"/a")
        for place in range(1, len(request)):
            line.send(request[place - 1 : place])
            await until(lambda place=place: line.transport.received == place)  # type: ignore[misc]
            assert line.transport.input == request[:place]
            assert line.served.is_at_boundary
        line.send(request[-1:])
        await until(lambda: app.begun)
        assert not line.transport.input

    play(http, scene)


@BOTH
def test_a_pipelined_request_waits(http: str) -> None:
    """While one is answered the next is not begun; asked to halt, its connection halts before it."""

    async def scene(line: Line, agent: Agent, app: Application) -> None:
        line.send(get(b"/held") + get(b"/a") + post(b"/b", b"x")[:20])
        await until(lambda: app.begun)
        await turns()
        assert line.transport.input == get(b"/a") + post(b"/b", b"x")[:20]
        assert not line.halt()
        assert line.served.reason == "a request is being answered"
        app.gate.set()
        await until(lambda: line.served.course is Course.HALTED)
        assert app.begun == ["/held"]
        assert line.transport.input == get(b"/a") + post(b"/b", b"x")[:20]
        await line.move()
        enter(line)
        line.send(post(b"/b", b"x")[20:])
        await until(lambda: agent.look() == [b"/held ", b"/a ", b"/b x"])

    play(http, scene)


@BOTH
@pytest.mark.parametrize("request_", [post(b"/early", b"unread"), chunked(b"/early", b"unread")])
def test_an_early_answer_waits_for_the_rest_of_its_body(http: str, request_: bytes) -> None:
    """What is still to come belongs to it: not a boundary before, and no byte of the next request after."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        head = request_.index(b"\r\n\r\n") + 4
        line.send(request_[: head + 3])
        await until(lambda: agent.look() == [b"/early "])
        await turns()
        assert not line.halt()
        assert line.served.reason == "the rest of a request is still to come"
        line.send(request_[head + 3 :] + get(b"/a"))
        await until(lambda: line.served.course is Course.HALTED)
        assert line.transport.input == get(b"/a")
        line.served.go_on()
        await until(lambda: agent.look() == [b"/early ", b"/a "])

    play(http, scene)


# ---- sizes, and what is waited for


@BOTH
@pytest.mark.parametrize("size", [READ_BYTES - 1, READ_BYTES, 5 * READ_BYTES])
def test_a_large_body(http: str, size: int) -> None:
    """It is read as the application reads it, and the next request is answered."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        await pour(line, post(b"/a", bytes(size)) + chunked(b"/b", bytes(size)) + get(b"/c"))
        wanted = [b"/a " + bytes(size), b"/b " + bytes(size), b"/c "]
        await until(lambda: agent.look() == wanted, "a body does not arrive")

    play(http, scene)


@BOTH
def test_a_head_larger_than_what_is_read_ahead(http: str) -> None:
    """A server that takes it does so here too."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        await pour(line, get(b"/a", b"x-long: %s\r\n" % (b"a" * 3 * READ_BYTES)) + get(b"/b"))
        await until(lambda: agent.look() == [b"/a ", b"/b "], "a head does not arrive")

    play(http, scene, h11_max_incomplete_event_size=1 << 20)


@BOTH
def test_a_large_answer_to_a_slow_client(http: str) -> None:
    """The next request waits until this one is answered, not until its client has read all."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        size = 2 << 20
        await pour(line, post(b"/a", bytes(size)) + get(b"/b"))
        await until(lambda: agent.look() == [b"/a " + bytes(size), b"/b "], "an answer does not arrive")

    play(http, scene)


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

    await until(is_sent, "the client cannot send")


# ---- what is no request


@BOTH
@pytest.mark.parametrize(
    "data", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nhost a\r\n\r\n" + get(b"/a"), b"\x16\x03\x01"]
)
def test_what_is_no_request_is_refused(http: str, data: bytes) -> None:
    """At once, with 400, and its connection ends; what comes after it is not served."""

    async def scene(line: Line, _: Agent, app: Application) -> None:
        line.send(data)
        got = b""

        def is_ending() -> bool:
            nonlocal got
            got += line.received()
            return line.transport.phase is not Phase.OPEN

        await until(is_ending)
        got += line.received()
        assert got.startswith(b"HTTP/1.1 400")
        assert app.begun == []

    play(http, scene)


@BOTH
@pytest.mark.parametrize("size", [b"-6", b"g", b""])
def test_a_chunk_that_is_none(http: str, size: bytes) -> None:
    """Nobody is held up by it: its parser refuses it, and the connection ends."""

    async def scene(line: Line, _: Agent, app: Application) -> None:
        line.send(chunked(b"/a").replace(b"0\r\nx: y", size + b"\r\nhello!"))
        await until(lambda: line.transport.phase is not Phase.OPEN)
        await turns()
        assert app.answered == []

    play(http, scene)


@BOTH
@pytest.mark.parametrize("blank", [b"\r\n", b"\r\n\r\n", b"\r\n" * 3])
@pytest.mark.parametrize("is_apart", [False, True])
def test_blank_lines_between_requests(http: str, blank: bytes, *, is_apart: bool) -> None:
    """A parser that takes them as nothing must not leave them to be counted as a request's."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        line.send(get(b"/a"))
        await until(agent.look)
        line.send(blank)
        if is_apart:
            await turns()
            assert not line.transport.input
        if line.transport.phase is Phase.OPEN:
            line.send(get(b"/b"))
        await until(lambda: len(agent.look()) == 2 or line.transport.phase is not Phase.OPEN)
        if http == "httptools":  # h11 refuses them
            assert agent.look() == [b"/a ", b"/b "]
            assert not line.transport.input

    play(http, scene)


@BOTH
@pytest.mark.parametrize("tail", [1, 2, 3, 4])
def test_a_cut_in_the_end_of_a_head(http: str, tail: int) -> None:
    """Not a byte of what follows goes with it."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        line.send(get(b"/a")[:-tail])
        await turns()
        line.send(get(b"/a")[-tail:] + get(b"/b")[:9])
        await until(lambda: agent.look() == [b"/a "])
        await turns()
        assert line.transport.input == get(b"/b")[:9]
        line.send(get(b"/b")[9:])
        await until(lambda: agent.look() == [b"/a ", b"/b "])

    play(http, scene)


@BOTH
def test_lines_that_end_without_a_carriage_return(http: str) -> None:
    """h11 takes them: the head ends there, and its body and the next request are told apart."""

    async def scene(line: Line, agent: Agent, _: Application) -> None:
        head = post(b"/a", b"hello").replace(b"\r\n", b"\n")
        line.send(head[:-3])
        await turns()
        if line.transport.phase is not Phase.OPEN:  # httptools refuses them
            return
        assert not line.transport.input
        line.send(head[-3:] + get(b"/b")[:9])
        await until(lambda: agent.look() == [b"/a hello"])
        await turns()
        assert line.served.is_at_boundary
        assert line.transport.input == get(b"/b")[:9]

    play(http, scene)


# ---- the end


@BOTH
def test_requests_before_the_clients_end(http: str) -> None:
    """What came whole is begun, though the one before it was answered after the client's FIN."""

    async def scene(line: Line, agent: Agent, app: Application) -> None:
        line.send(get(b"/held") + get(b"/a") + get(b"/b"))
        line.finish()
        await until(lambda: app.begun and line.transport.is_eof)
        app.gate.set()
        await until(lambda: line.transport.phase is not Phase.OPEN)
        await turns()
        assert app.begun[:2] == ["/held", "/a"]
        assert agent.look()[:1] == [b"/held "]

    play(http, scene)


@BOTH
def test_a_client_that_asks_to_close(http: str) -> None:
    """It is answered, and what follows is not its request."""

    async def scene(line: Line, agent: Agent, app: Application) -> None:
        line.send(get(b"/a", b"connection: close\r\n") + get(b"/b"))
        await until(lambda: line.transport.phase is not Phase.OPEN)
        assert agent.look() == [b"/a "]
        assert app.begun == ["/a"]

    play(http, scene)
