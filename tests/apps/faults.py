"""What the crowd talks to: a line per message, some in two parts, each numbered; states that must count along."""

from typing import Any

import copyover

Connection = copyover.Connection[dict[str, Any]]
shared: dict[str, int] = {"cuts": 0}


async def handler(connection: Connection) -> None:
    """Answer a line with itself, if it is the next one of this connection in the eyes of its state."""
    async for line in connection.lines():
        number = connection.state.get("n", 0) + 1
        connection.state["n"] = number
        if not line.startswith(b"%d " % number):
            await connection.write(b"line %d was expected: " % number)
        if b" parts " in line:
            await connection.write(b"go on\n")
            line += b"|" + (await connection.read_until(b"\n"))[:-1]  # noqa: PLW2901  # it is the rest of the line
        await connection.write(line + b"\n")


def export_shared() -> dict[str, int]:
    return {"cuts": shared["cuts"] + 1}


def import_shared(state: dict[str, int]) -> None:
    shared["cuts"] = max(shared["cuts"], state["cuts"])
