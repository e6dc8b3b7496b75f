"""Handlers that each need one promise of the contract."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import attrs

import copyover

Connection = copyover.Connection[dict[str, Any]]


def _frame(buffer: bytearray) -> bytes | None:
    """A message is one length byte and so many bytes."""
    if not buffer or len(buffer) <= buffer[0]:
        return None
    message = bytes(buffer[1 : 1 + buffer[0]])
    del buffer[: 1 + buffer[0]]
    return message


async def frames(connection: Connection) -> None:
    async for message in connection.messages(_frame):
        connection.state["n"] = connection.state.get("n", 0) + 1
        await connection.write(b"%d:%s;" % (connection.state["n"], message))


async def two_parts(connection: Connection) -> None:
    """A message is a line, and as many bytes as it says: no boundary in between."""
    while True:
        await connection.boundary()
        try:
            size = int(await connection.read_until(b"\n"))
        except asyncio.IncompleteReadError:
            return
        await connection.write(b"go on\n")
        body = await connection.read_exactly(size)
        await connection.write(b"got " + body + b"\n")


async def flood(connection: Connection) -> None:
    """Answer a line with so many bytes, in pieces that the reader is slow to take."""
    async for line in connection.lines():
        for piece in range(int(line)):
            await connection.write(b"%08d" % piece * 8192)
        await connection.write(b"end\n")


async def never(connection: Connection) -> None:
    """Read once, and never come to a boundary again until the client says so."""
    async for _ in connection.lines():
        await connection.write(b"busy\n")
        await connection.read_until(b"done\n")
        await connection.write(b"free\n")


async def pinned(connection: Connection) -> None:
    async with connection.pinned("a transaction is open"):
        async for line in connection.lines():
            await connection.write(line + b"\n")


async def until_end(connection: Connection) -> None:
    """Answer when the client has ended its direction, and then end ours."""
    total = 0
    async for line in connection.lines():
        connection.state["total"] = total = connection.state.get("total", 0) + len(line)
    total = connection.state.get("total", total)
    await connection.write(b"%d bytes in lines\n" % total)


async def unserialisable(connection: Connection) -> None:
    async for line in connection.lines():
        connection.state["when"] = {1, 2}
        await connection.write(line + b"\n")


async def aborts(connection: Connection) -> None:
    async for line in connection.lines():
        if line == b"abort":
            connection.abort()
            return
        await connection.write(line + b"\n")


async def raises(connection: Connection) -> None:
    async for line in connection.lines():
        await connection.write(line + b"\n")
        raise ValueError("the handler is broken")


queues: dict[str, asyncio.Queue[bytes]] = {}


async def mailbox(connection: Connection) -> None:
    """The first line names the mailbox; what others put into it comes out."""
    if "name" not in connection.state:
        line = await connection.read_until(b"\n")
        to, _, text = line.strip().decode().partition(" ")
        if text:
            queues[to].put_nowait(text.encode())
            await connection.write(b"sent\n")
            return
        connection.state["name"] = to
        await connection.write(b"open\n")
    queue = queues.setdefault(connection.state["name"], asyncio.Queue())
    while True:
        text = (await connection.idle(queue.get())).decode()
        await connection.write(f"{text}\n".encode())


@attrs.define
class Tally:
    """A state that is a class."""

    lines: int = 0
    last: str = ""


async def _tally(connection: copyover.Connection[Tally]) -> None:
    async for line in connection.lines():
        connection.state.lines += 1
        connection.state.last = line.decode()
        await connection.write(b"%d\n" % connection.state.lines)


tally = copyover.Application(handler=_tally, state=Tally)


members: list[Connection] = []
_history: list[str] = []


async def _room(connection: Connection) -> None:
    members.append(connection)
    async for line in connection.lines():
        if line == b"history":
            await connection.write(",".join(_history).encode() + b"\n")
            continue
        _history.append(line.decode())
        for member in members:
            member.push(line + b"\n")
    members.remove(connection)


def _export() -> list[str]:
    return _history


def _import(shared: list[str]) -> None:
    _history.extend(shared)


room = copyover.Application(handler=_room, export_shared=_export, import_shared=_import)


def broken_export() -> object:
    raise RuntimeError("the cache is being rebuilt")


room_that_cannot_share = copyover.Application(handler=_room, export_shared=broken_export, import_shared=_import)


def make_tally() -> copyover.Application[Tally]:
    return tally


class _Ticks:
    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1


ticks = _Ticks()
not_async = len


async def idle_timeout(connection: Connection) -> None:
    """Give a client half a second of silence; what comes after the time-out must never reach a client that moved."""
    try:
        async with asyncio.timeout(3.0 if not connection.resumed else 60):
            async for line in connection.lines():
                await connection.write(line + b"\n")
                if line == b"stay":
                    async with connection.pinned("stays"):
                        await connection.read_until(b"go\n")
    finally:
        connection.push(b"bye\n")


crowd: list[Connection] = []


async def kick(connection: Connection) -> None:
    """Any line ends everybody else, in the orderly way."""
    crowd.append(connection)
    try:
        async for _ in connection.lines():
            for other in crowd:
                if other is not connection:
                    await other.close()
            await connection.write(b"%d left\n" % len(crowd))
    finally:
        crowd.remove(connection)


def _lives() -> dict[str, Any]:
    return {"lives": 3}


async def _spend(connection: Connection) -> None:
    async for line in connection.lines():
        if line == b"clear":
            connection.state.clear()
        await connection.write(f"{sorted(connection.state)}\n".encode())


spend = copyover.Application(handler=_spend, state=_lives)


async def mixed(connection: Connection) -> None:
    async for line in connection.lines(limit=1 << 20):
        size = len(await connection.read_exactly(4))
        await connection.write(b"%d %d\n" % (len(line), size))


async def on_listener(connection: Connection) -> None:
    async for line in connection.lines():
        await connection.write(connection.listener.encode() + b" " + line + b"\n")
