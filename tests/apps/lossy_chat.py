"""The chat server of scripts/examples, with one fault a variant: what the demo must not overlook."""

import collections
import itertools
from collections.abc import Callable
from typing import Any

import copyover

Connection = copyover.Connection[dict[str, Any]]

FAULTY_LINE = 20

rooms: dict[str, list[Connection]] = collections.defaultdict(list)
spoken = itertools.count(1)


async def lose(connection: Connection) -> None:
    """Lose one line for one member of the room."""
    await chat(connection, lambda *_: None)


async def repeat(connection: Connection) -> None:
    """Repeat one line for one member of the room."""
    await chat(connection, lambda member, said: member.push(said + said))


async def drop(connection: Connection) -> None:
    """Drop the connection of one member of the room."""
    await chat(connection, lambda member, _: member.abort())


async def chat(connection: Connection, fault: Callable[[Connection, bytes], None]) -> None:
    if "room" in connection.state:
        rooms[connection.state["room"]].append(connection)
    try:
        async for line in connection.lines():
            if "room" not in connection.state:
                name, _, room = line.decode().partition(" ")
                connection.state.update(name=name, room=room)
                rooms[room].append(connection)
                connection.push(f"* welcome to {room}, {name}\n".encode())
                continue
            said = connection.state["name"].encode() + b": " + line + b"\n"
            first, *others = rooms[connection.state["room"]]
            for member in others:
                member.push(said)
            if next(spoken) == FAULTY_LINE:
                fault(first, said)
            else:
                first.push(said)
    finally:
        if "room" in connection.state:
            rooms[connection.state["room"]].remove(connection)
