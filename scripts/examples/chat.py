"""
A chat server in memory: rooms, broadcasts, and nobody notices a reload.

A client's first line is its name and its room; each further line goes to everybody in the room.
"""

import collections

import copyover

rooms: dict[str, list[copyover.Connection]] = collections.defaultdict(list)


async def chat(connection: copyover.Connection) -> None:
    if "room" in connection.state:  # entered again after a reload: its place in the room is in its state
        rooms[connection.state["room"]].append(connection)
    try:
        async for line in connection.lines():  # the top of the loop is a boundary
            if "room" not in connection.state:
                name, _, room = line.decode(errors="replace").strip().partition(" ")
                connection.state.update(name=name, room=room or "lobby")
                rooms[connection.state["room"]].append(connection)
                connection.push(f"* welcome to {connection.state['room']}, {name}\n".encode())
                continue
            said = connection.state["name"].encode() + b": " + line + b"\n"
            for member in rooms[connection.state["room"]]:
                member.push(said)
    finally:  # runs when the connection ends, never on a move
        if "room" in connection.state:
            rooms[connection.state["room"]].remove(connection)
