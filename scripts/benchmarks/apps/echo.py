"""Each line comes back once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import copyover


async def echo(connection: copyover.Connection[dict[str, Any]]) -> None:
    async for line in connection.lines():
        await connection.write(line + b"\n")
