"""A room whose members are slow to come back to their boundary, so that whole lines travel unread."""

import asyncio
from pathlib import Path

import copyover

members: list[copyover.Connection] = []


async def chat(connection: copyover.Connection) -> None:
    members.append(connection)
    async for line in connection.lines():
        for member in members:
            member.push(line + b"\n")
        if line.startswith(b"wait "):
            # Whoever opens this FIFO for writing lets it go on.
            await asyncio.get_running_loop().run_in_executor(None, Path(line[5:].decode()).read_bytes)


async def straggle(connection: copyover.Connection) -> None:
    members.append(connection)
    async for line in connection.lines():
        for member in members:
            member.push(line + b"\n")
        if line == b"wait":
            late = await connection.read_until(b"\n")
            for member in members:
                member.push(b"said: " + late)
            if late == b"kick\n":
                await members[-1].close()
