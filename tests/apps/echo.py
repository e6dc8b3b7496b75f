"""The server that most tests talk to: each line comes back once."""

from typing import Any

import copyover

Connection = copyover.Connection[dict[str, Any]]


async def echo(connection: Connection) -> None:
    async for line in connection.lines():
        await connection.write(line + b"\n")
