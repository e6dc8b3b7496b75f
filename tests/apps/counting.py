"""A server that numbers its answers: the count is state, and travels."""

from typing import Any

import copyover

Connection = copyover.Connection[dict[str, Any]]


async def count(connection: Connection) -> None:
    if not connection.resumed:
        await connection.write(b"hello\n")
    async for line in connection.lines():
        connection.state["lines"] = connection.state.get("lines", 0) + 1
        await connection.write(b"%d %d\n" % (connection.state["lines"], len(line)))


async def forget(connection: Connection) -> None:
    """Count in a local variable, which does not travel."""
    lines = 0
    if not connection.resumed:
        await connection.write(b"hello\n")
    async for line in connection.lines():
        lines += 1
        await connection.write(b"%d %d\n" % (lines, len(line)))


async def stumble(connection: Connection) -> None:
    """Raise at the first line."""
    async for line in connection.lines():
        raise ValueError(line)
