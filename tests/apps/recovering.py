"""Handlers whose worker is killed."""

import asyncio
from typing import Any

import copyover

Connection = copyover.Connection[dict[str, Any]]
everybody: set[Connection] = set()
door: list[asyncio.Event] = []


async def count(connection: Connection) -> None:
    """Answer each line with its number and itself."""
    async for line in connection.lines():
        connection.state["seen"] = connection.state.get("seen", 0) + 1
        await connection.write(b"%d %b\n" % (connection.state["seen"], line))


async def obey(connection: Connection) -> None:  # noqa: C901, PLR0912  # one case a word
    """Do what each line says; a client is told how it was entered."""
    if len(door) == 1:  # for one client
        door.append(asyncio.Event())
        await door[1].wait()
    how = "interrupted" if connection.interrupted else "resumed" if connection.resumed else "fresh"
    connection.push(f"{how} {connection.state.get('seen', 0)}\n".encode())
    everybody.add(connection)
    async for line in connection.lines():
        connection.state["seen"] = connection.state.get("seen", 0) + 1
        word, _, rest = line.decode().partition(" ")
        match word:
            case "say":
                await connection.write(b"said %b\n" % rest.encode())
            case "tell":
                for other in everybody - {connection}:
                    other.push(f"told {rest}\n".encode())
                await connection.write(b"done\n")
            case "half":
                await connection.write(b"half a ")
                await connection.read_exactly(1)
            case "fill":
                while not connection.transport.output:
                    await connection.write(b"0123456789" * 10)
            case "put":
                connection.state["much"] = "x" * int(rest)
                await connection.write(b"done\n")
            case "odd":
                connection.state["odd"] = {1, 2}
                await connection.write(b"done\n")
            case "wait":
                async with connection.pinned("it waits"):
                    await connection.boundary()
                    await asyncio.Event().wait()
            case "close":
                door.append(asyncio.Event())
                await connection.write(b"closed\n")
            case "bye":
                break
    everybody.discard(connection)


application = copyover.Application(handler=obey)
