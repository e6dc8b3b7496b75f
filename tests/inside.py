"""Connections of a worker without the worker: a real loop, a socket pair, and whoever serves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

from copyover.adapters.uvicorn import Uvicorn
from copyover.messages import Kind, Record
from copyover.worker.application import Asgi
from copyover.worker.host import Host
from copyover.worker.hosted import Hosted
from copyover.worker.outbox import Outbox
from copyover.worker.served import Course, Limits
from copyover.worker.transport import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from copyover.worker.served import Served

TURNS = 2000  # of the loop, after which what was waited for is not going to happen


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Turn the loop until *condition* holds."""
    for _ in range(TURNS):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError(f"it did not happen in {TURNS} turns: {what or condition}")


async def turns(count: int = 20) -> None:
    """Turn the loop, so that what must not happen would have."""
    for _ in range(count):
        await asyncio.sleep(0)


def listen(host: Host) -> Host:
    """Be the runtime to *host*; what it says of connections is kept in its own ``said``."""
    said: list[tuple[str, Served]] = []
    host.forward = lambda _cookie, _act, _data: False
    host.left = lambda: None
    host.became = lambda served: said.append(("became", served))
    host.cede = lambda served: said.append(("cede", served))
    host.__dict__["said"] = said
    return host


class Plain(Host):
    """Serves with whatever protocol a test gives."""

    interface = "asgi"
    kind = Kind.HTTP
    is_json = False
    schema = 1
    shares = False

    def __init__(self) -> None:
        self.readable = [1]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def build(self, transport: Transport, *, cookie: int, listener: str) -> Hosted:
        loop = asyncio.get_running_loop()
        outbox = Outbox(loop)
        return Hosted(loop, transport, cookie=cookie, listener=listener, limits=Limits(), host=self, outbox=outbox)

    def enter(self, served: Served) -> None:
        """Nothing: a test begins its connections itself."""

    def encode_state(self, state: Any) -> bytes:
        encoded: bytes = state.encode()
        return encoded

    def decode_state(self, record: Record) -> bytes:
        return record.state

    def put_to_sleep(self, served: Served) -> None: ...

    def forget(self, served: Served) -> None: ...

    def encode_shared(self) -> bytes | None: ...

    def decode_shared(self, parts: Iterable[bytes]) -> None: ...


class Line:
    """One connection: the worker's end is *served*, the client's is held here."""

    def __init__(self, host: Host, *, cookie: int = 1) -> None:
        near, self.socket = socket.socketpair()
        near.setblocking(False)
        self.socket.setblocking(False)
        self.host = host
        self._attach(near, cookie)

    def _attach(self, near: socket.socket, cookie: int) -> None:
        self.transport = Transport(asyncio.get_running_loop(), near)
        self.closed = 0
        self.transport.on_closed = self._note_closed
        served = self.host.build(self.transport, cookie=cookie, listener="web")
        assert isinstance(served, Hosted)
        self.served = served

    def _note_closed(self) -> None:
        self.closed += 1

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def finish(self) -> None:
        """Send the client's FIN."""
        self.socket.shutdown(socket.SHUT_WR)

    def received(self) -> bytes:
        """Return what came meanwhile."""
        got = b""
        try:
            while piece := self.socket.recv(1 << 20):
                got += piece
        except BlockingIOError:
            pass
        return got

    async def receive(self, ending: bytes) -> bytes:
        """Return what comes, up to *ending*."""
        got = bytearray()

        def has_come() -> bool:
            got.extend(self.received())
            return got.endswith(ending)

        await until(has_come, f"nothing ended with {ending!r}")
        return bytes(got)

    def halt(self) -> bool:
        """Ask it to halt; whether it stands at a boundary now."""
        return self.served.ask_to_halt(lambda: None)

    async def move(self, host: Host | None = None) -> None:
        """Freeze it, and thaw it in *host* on the same socket; its old protocol stays suspended."""
        if self.served.course is Course.RUNNING:
            self.halt()
        await until(lambda: self.served.course is Course.HALTED, self.served.reason)
        record = self.served.export(schema=self.host.schema, state=self.host.encode_state(self.served))
        near = self.transport.socket.dup()
        near.setblocking(False)
        self.host.put_to_sleep(self.served)
        self.transport.close()
        self.host = host or self.host
        self._attach(near, self.served.cookie)
        self.served.restore(record, self.host.decode_state(record))

    def close(self) -> None:
        self.transport.close()
        self.socket.close()


@contextlib.asynccontextmanager
async def serving(app: Any, *, resume: Iterable[str] = (), **options: Any) -> AsyncIterator[Uvicorn]:
    """Serve *app* as a worker does, with uvicorn's *options*."""
    loop = asyncio.get_running_loop()
    given = {"lifespan": "off", "log_config": None, "access_log": False} | options
    host = Uvicorn(loop, Asgi(app, "asgi"), Limits(), {"resume": tuple(resume), "uvicorn": given})
    listen(host)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()


def enter(line: Line) -> None:
    """Have a connection served, as the entrance does."""
    line.host.enter(line.served)
    line.transport.start()
