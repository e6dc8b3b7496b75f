"""A FastAPI application as people write them: validation, dependencies, a WebSocket, a stream, a lifespan."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from gated import note, state_of, wait_gate
from pydantic import BaseModel

from copyover import asgi

TICK_S = 0.005


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, str]]:
    yield {"started": f"by {os.getpid()}"}


app = FastAPI(lifespan=lifespan)


class Item(BaseModel):
    name: str
    price: float


def user_of(name: str = "nobody") -> str:
    return f"user {name}"


@app.get("/who")
async def who(request: Request) -> dict[str, str | int]:
    return {"pid": os.getpid(), "started": request.state.started}


@app.post("/items")
async def create(item: Item, user: Annotated[str, Depends(user_of)]) -> dict[str, str | float | int]:
    return {"pid": os.getpid(), "name": item.name, "price": item.price, "by": user}


@app.get("/afterwards")
async def afterwards(tasks: BackgroundTasks, gate: str, log: str) -> dict[str, int]:
    async def work() -> None:
        await wait_gate(gate)
        note(log, f"done by {os.getpid()}")

    tasks.add_task(work)
    return {"pid": os.getpid()}


@app.get("/events")
@asgi.resumable(version=1)
async def events(request: Request, until: str, first: Annotated[str, Depends(user_of)]) -> StreamingResponse:
    state = state_of(request.scope)

    async def tick() -> AsyncIterator[str]:
        while not os.path.exists(until):  # noqa: ASYNC240, PTH110  # of a tmpfs: it does not wait
            await asyncio.sleep(TICK_S)
            state["id"] = state.get("id", 0) + 1
            yield f"id: {state['id']}\ndata: {os.getpid()}\n\n"

    return StreamingResponse(tick(), media_type="text/event-stream", headers={"x-user": first})


@app.websocket("/rooms/{room}")
@asgi.resumable(version=1)
async def talk(websocket: WebSocket, room: str, user: Annotated[str, Depends(user_of)]) -> None:
    state = state_of(websocket.scope)
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            text = await websocket.receive_text()
            state["n"] = state.get("n", 0) + 1
            await websocket.send_text(f"{state['n']} {os.getpid()} {room} {user} {text}")
