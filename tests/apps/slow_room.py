"""A room whose members are slow to come back to their boundary, so that whole lines travel unread."""

import asyncio

import copyover

members: list[copyover.Connection] = []


async def chat(connection: copyover.Connection) -> None:
    members.append(connection)
    async for line in connection.lines():
        for member in members:
            member.push(line + b"\n")
        if line == b"one":
            await asyncio.sleep(0.7)


async def straggle(connection: copyover.Connection) -> None:
    members.append(connection)
    async for line in connection.lines():
        for member in members:
            member.push(line + b"\n")
        if line == b"wait":
            late = await connection.read_until(b"\n")
            for member in members:
                member.push(b"said: " + late)
