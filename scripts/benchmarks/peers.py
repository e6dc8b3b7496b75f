"""
Echo servers to compare with, on the loop that is named: asyncio's own ways to serve, without copyover.

It prints its port and serves until it is killed. They answer lines and check nothing else.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable

BACKLOG = 4096
READ_BYTES = 64 << 10


# ---- asyncio's Streams


async def streams(listener: socket.socket) -> None:
    server = await asyncio.start_server(_answer, sock=listener, backlog=BACKLOG)
    await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    finally:
        writer.close()


# ---- asyncio's transport, with a protocol that has no coroutine


class _Echo(asyncio.Protocol):
    def __init__(self) -> None:
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        whole, _, self._unread = (self._unread + data).rpartition(b"\n")
        for line in whole.splitlines(keepends=False):
            self._transport.write(line + b"\n")


async def protocol(listener: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(_Echo, sock=listener, backlog=BACKLOG)
    await server.serve_forever()


# ---- the event loop's epoll and nothing between it and the handler


class _Bare:
    """A connection of the bare worker: what a handler needs of one, and no more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._input = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self.is_over = False
        loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        data = self._sock.recv(READ_BYTES)
        self._input += data
        self.is_over = not data
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def line(self) -> bytes:
        while b"\n" not in self._input and not self.is_over:
            self._waiter = self._loop.create_future()
            await self._waiter
        line, _, rest = self._input.partition(b"\n")
        self._input = rest
        return bytes(line)

    def write(self, data: bytes) -> None:
        self._sock.send(data)

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        self._sock.close()


async def _handle(connection: _Bare) -> None:
    while True:
        line = await connection.line()
        if connection.is_over:
            connection.close()
            return
        connection.write(line + b"\n")


async def bare(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            task = loop.create_task(_handle(_Bare(loop, sock)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    loop.add_reader(listener, accept)
    await loop.create_future()


def make_loop(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415  # only where it was asked for

    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made


def main(kind: str, loop: str) -> None:
    serve = {"streams": streams, "protocol": protocol, "bare": bare}[kind]
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setblocking(False)
        print(listener.getsockname()[1], flush=True)
        with asyncio.Runner(loop_factory=make_loop(loop)) as runner:
            runner.run(serve(listener))


if __name__ == "__main__":
    main(*sys.argv[1:])
