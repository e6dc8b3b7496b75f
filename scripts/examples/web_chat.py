"""
A chat page over WebSocket with a ticker of server-sent events: Starlette, and nobody notices a reload.

    copyover run --listen 127.0.0.1:8000 web_chat:app       # or, without the survival: uvicorn web_chat:app

The page counts what it would notice of a reload. What it counts by is here: each message of a room has a number, each
event of a stream has one, and each client numbers what it says.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from copyover.asgi import resumable, share, state

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

PAGE = Path(__file__).with_name("web_chat.html").read_text(encoding="utf-8")
SERVING = {"release": Path.cwd().name, "worker": os.getpid()}  # a release is named as its directory is
HISTORY = 200
LONGEST_TEXT = 2000


class Room:
    """What was said, numbered from 1, of which the last is remembered; and who is told of news."""

    def __init__(self, last: int = 0, said: list[dict[str, Any]] | None = None) -> None:
        self.last = last
        self.said = said or []
        self.members = 0
        self._news = asyncio.Event()

    def say(self, **message: Any) -> None:
        self.last += 1
        self.said = [*self.said[1 - HISTORY :], {"seq": self.last, **message}]
        self._news.set()
        self._news = asyncio.Event()

    async def wait_news(self, seen: int) -> list[dict[str, Any]]:
        """Return what was said after the message *seen*, once there is something."""
        while not (news := self.said[-(self.last - seen) :] if self.last > seen else []):
            await self._news.wait()
        return news

    def go_on_from(self, seen: int) -> None:
        """Number on from what a member has seen: after the death of a worker only its members know."""
        if seen > self.last:
            self.last, self.said = seen, []


rooms: dict[str, Room] = collections.defaultdict(Room)


def export() -> dict[str, Any]:
    """Give the replacement what was said in all rooms; the members come by themselves."""
    return {name: [room.last, room.said] for name, room in rooms.items()}


def import_(shared: dict[str, Any]) -> None:
    rooms.update({name: Room(last, said) for name, (last, said) in shared.items()})


share(export, import_, version=1)

# ---- what is served


async def page(_: Request) -> HTMLResponse:
    return HTMLResponse(PAGE, headers={"Cache-Control": "no-store"})


async def whoami(request: Request) -> JSONResponse:
    """Tell who serves, and repeat the number that the client gave its request."""
    return JSONResponse({**SERVING, "number": request.query_params.get("number")})


@resumable(version=1)
async def chat(websocket: WebSocket) -> None:
    """
    Serve one member of a room.

    Entered again after a reload, it finds in its state who it is, how much of the room it has seen, and how much of it
    the server has heard.
    """
    await websocket.accept()  # was done, if it is entered again
    mine = state(websocket)
    if not mine:
        asked = websocket.query_params
        room = rooms[asked.get("room", "lobby")[:40]]
        mine.update(
            room=asked.get("room", "lobby")[:40],
            name=asked.get("name", "somebody")[:40],
            who=asked.get("who", "")[:40],
            seen=number_of(asked.get("seen")) or max(room.last - HISTORY, 0),
            heard=number_of(asked.get("heard")),
        )
    room = rooms[mine["room"]]
    room.go_on_from(mine["seen"])
    await websocket.send_json({"kind": "serving", **SERVING, "seen": mine["seen"], "heard": mine["heard"]})
    room.members += 1
    telling = asyncio.create_task(tell(websocket, room, mine))
    try:
        await listen(websocket, room, mine)
    finally:  # when the connection ends, never when it moves
        telling.cancel()
        room.members -= 1


async def tell(websocket: WebSocket, room: Room, mine: dict[str, Any]) -> None:
    """Send what is said, each member at its own pace: a slow reader keeps nobody waiting."""
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            for message in await room.wait_news(mine["seen"]):
                mine["seen"] = message["seq"]
                await websocket.send_json({"kind": "said", **message})


async def listen(websocket: WebSocket, room: Room, mine: dict[str, Any]) -> None:
    async for text in websocket.iter_text():
        try:
            said = json.loads(text)
            number, words = int(said["number"]), str(said["text"])[:LONGEST_TEXT]
        except (ValueError, TypeError, KeyError) as problem:
            raise WebSocketException(1008, "say {number, text}") from problem
        if number != mine["heard"] + 1:
            await websocket.send_json({"kind": "amiss", "expected": mine["heard"] + 1, "number": number})
        mine["heard"] = number
        room.say(name=mine["name"], who=mine["who"], number=number, text=words, release=SERVING["release"])


@resumable(version=1)
async def events(request: Request) -> StreamingResponse:
    """Stream numbered events; entered again, it goes on after the last one, in the same response."""
    mine = state(request)
    mine.setdefault("event", number_of(request.headers.get("last-event-id")))
    every_s = min(max(number_of(request.query_params.get("every_ms")) or 500, 50), 10_000) / 1000
    ticker = tick(mine, rooms[request.query_params.get("room", "lobby")[:40]], every_s)
    return StreamingResponse(ticker, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def tick(mine: dict[str, Any], room: Room, every_s: float) -> AsyncIterator[str]:
    while True:
        mine["event"] += 1  # before it is sent: what was sent is never sent again
        data = json.dumps({**SERVING, "members": room.members})
        yield f"id: {mine['event']}\ndata: {data}\n\n"
        await asyncio.sleep(every_s)


def number_of(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


app = Starlette(
    routes=[
        Route("/", page),
        Route("/api/whoami", whoami),
        Route("/events", events),
        WebSocketRoute("/ws", chat),
    ]
)
