"""A stream whose client is behind: it moves, or says at once that it will not, and holds up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from copyover.worker.hosted import HIGH_WATER_BYTES
from copyover.worker.served import Course
from inside import Line, enter, serving, turns, until

BOTH = pytest.mark.parametrize("http", ["h11", "httptools"])
PIECE = bytes(HIGH_WATER_BYTES)
BEHIND = "its client does not read what it is sent, and its application waits for that in send()"


class Stream:
    """Sends a piece each time that its *gate* is opened."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.sent = 0

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        extension = scope["extensions"]["copyover"]
        extension["resumable"]()
        state = extension["state"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"transfer-encoding", b"chunked")]})
        while True:
            await self.gate.wait()
            self.gate.clear()
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            state["sent"] = self.sent = state.get("sent", 0) + 1


Scene = Callable[[Line, Stream], Coroutine[Any, Any, None]]


def play(http: str, scene: Scene) -> None:
    async def whole() -> None:
        stream = Stream()
        async with serving(stream, http=http) as host:
            line = Line(host)
            enter(line)
            line.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            try:
                await until(lambda: line.received().endswith(b"\r\n\r\n"))
                await scene(line, stream)
            finally:
                line.served.abort()
                await turns()
                line.close()

    asyncio.run(whole())


async def fall_behind(line: Line, stream: Stream) -> None:
    """Send until the client is so far behind that the next ``send`` would wait."""
    while not line.served.is_full:
        before = stream.sent
        stream.gate.set()
        await until(lambda before=before: stream.sent > before)  # type: ignore[misc]  # bound early
        await turns(3)  # the kernel may have taken it


@BOTH
def test_an_application_that_waits_in_send_is_an_obstacle_at_once(http: str) -> None:
    """A cut does not wait for it; once its client has read, it is none any more, and moves."""

    async def scene(line: Line, stream: Stream) -> None:
        await fall_behind(line, stream)
        obstacles, before = [line.served.obstacle], stream.sent
        stream.gate.set()
        await turns()
        obstacles.append(line.served.obstacle)
        assert stream.sent == before
        assert not line.halt()
        await turns(40)
        assert line.served.course is Course.ASKED  # nobody knows on which side of its state it is
        got = 0
        while got < (before + 1) * len(PIECE):
            got += line.received().count(b"\0")
            await turns(1)
        obstacles.append(line.served.obstacle)
        assert obstacles == [None, BEHIND, None]
        await until(lambda: line.served.course is Course.HALTED)
        assert stream.sent == before + 1

    play(http, scene)


@BOTH
def test_an_application_that_waits_for_something_else_moves(http: str) -> None:
    """However far its client is behind: what is unsent travels, and the next piece follows it."""

    async def scene(line: Line, stream: Stream) -> None:
        await fall_behind(line, stream)
        line.halt()
        await until(lambda: line.served.course is Course.HALTED, line.served.reason)
        assert line.served.is_full
        assert line.transport.output
        before = stream.sent
        await line.move()
        enter(line)
        got = 0

        def has_read(count: int) -> bool:
            nonlocal got
            got += line.received().count(b"\0")
            return got >= count * len(PIECE)

        await until(lambda: has_read(before))
        stream.gate.set()
        await until(lambda: has_read(before + 1))
        assert stream.sent == before + 1

    play(http, scene)
