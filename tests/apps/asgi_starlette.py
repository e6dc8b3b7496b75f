"""A Starlette application as people write them: streams, a WebSocket, a background task, a middleware."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from gated import note, state_of, wait_gate
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from copyover import asgi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.websockets import WebSocket

TICK_S = 0.005


class Marked(BaseHTTPMiddleware):
    """What passes through it is streamed by another task: that of the middleware."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-mark"] = "set"
        return response


async def tick(request: Request) -> AsyncIterator[str]:
    """Number events until the file ``until`` is there."""
    state = state_of(request.scope)
    while not os.path.exists(request.query_params["until"]):  # noqa: ASYNC240, PTH110  # of a tmpfs: it does not wait
        await asyncio.sleep(TICK_S)
        state["id"] = state.get("id", 0) + 1
        yield f"id: {state['id']}\ndata: {os.getpid()}\n\n"


@asgi.resumable(version=1)
async def events(request: Request) -> Response:
    return StreamingResponse(tick(request), media_type="text/event-stream")


async def events_unsaid(request: Request) -> Response:
    return StreamingResponse(tick(request), media_type="text/event-stream")


async def who(_: Request) -> Response:
    return JSONResponse({"pid": os.getpid()})


async def afterwards(request: Request) -> Response:
    """Answer at once, and work on behind the answer."""

    async def work() -> None:
        await wait_gate(request.query_params["gate"])
        note(request.query_params["log"], f"done by {os.getpid()}")

    return JSONResponse({"pid": os.getpid()}, background=BackgroundTask(work))


async def talk(websocket: WebSocket) -> None:
    state = state_of(websocket.scope)
    await websocket.accept()
    async for text in websocket.iter_text():
        state["n"] = state.get("n", 0) + 1
        await websocket.send_text(f"{state['n']} {os.getpid()} {text}")


@asgi.resumable()
async def number(websocket: WebSocket) -> None:
    await talk(websocket)


async def number_unsaid(websocket: WebSocket) -> None:
    await talk(websocket)


routes = [
    Route("/who", who),
    Route("/events", events),
    Route("/events-unsaid", events_unsaid),
    Route("/afterwards", afterwards),
    WebSocketRoute("/number", number),
    WebSocketRoute("/number-unsaid", number_unsaid),
]

app = Starlette(routes=routes)
behind_middleware = Starlette(routes=routes, middleware=[Middleware(Marked)])


def create_app() -> Starlette:
    """Make an application: what --factory calls."""
    return Starlette(routes=routes)
