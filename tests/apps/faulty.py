"""Echo servers with one fault each: what verifying clients must catch."""

from typing import Any

import copyover

Connection = copyover.Connection[dict[str, Any]]

PERIOD = 7


def _is_turn(connection: Connection) -> bool:
    connection.state["lines"] = connection.state.get("lines", 0) + 1
    return bool(connection.state["lines"] % PERIOD == 0)


async def repeat(connection: Connection) -> None:
    """Send every seventh line twice."""
    async for line in connection.lines():
        await connection.write(line + b"\n")
        if _is_turn(connection):
            await connection.write(line + b"\n")


async def swallow(connection: Connection) -> None:
    """Send no answer to every seventh line."""
    async for line in connection.lines():
        if not _is_turn(connection):
            await connection.write(line + b"\n")


async def repeat_byte(connection: Connection) -> None:
    """Send one byte of every seventh line twice."""
    async for line in connection.lines():
        await connection.write((line[:1] if _is_turn(connection) else b"") + line + b"\n")


async def repeat_last(connection: Connection) -> None:
    """Send the last line once more when the client has ended its direction."""
    last = b""
    async for line in connection.lines():
        last = line
        await connection.write(line + b"\n")
    await connection.write(last + b"\n")


async def end(connection: Connection) -> None:
    """End the connection at the seventh line."""
    async for line in connection.lines():
        if _is_turn(connection):
            return
        await connection.write(line + b"\n")


async def reset(connection: Connection) -> None:
    """Reset the connection at the seventh line."""
    async for line in connection.lines():
        if _is_turn(connection):
            connection.abort()
            return
        await connection.write(line + b"\n")


async def hang(connection: Connection) -> None:
    """Answer nothing from the seventh line on."""
    async for line in connection.lines():
        if connection.state.get("lines") != PERIOD and not _is_turn(connection):
            await connection.write(line + b"\n")
