"""
A raw ASGI application, one path a behaviour.

It says who serves (a pid) in every answer; the query names gates and files, see gated.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from gated import extension_of, note, query_of, state_of, wait_gate

from copyover import asgi

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

TICK_S = 0.005


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await ROUTES[scope["path"].removeprefix(scope["root_path"])](scope, receive, send)


# ---- requests


async def answer(send: Send, *, head_only: bool = False, **told: Any) -> None:
    """Answer with JSON that says who serves."""
    body = json.dumps({"pid": os.getpid(), **told}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head_only else body})


async def who(scope: Scope, _: Receive, send: Send) -> None:
    await answer(send, head_only=scope["method"] == "HEAD", client=list(scope["client"] or ()))


async def count(scope: Scope, _: Receive, send: Send) -> None:
    """Note the request's id once, wait at the gate if there is one, answer with the id."""
    query = query_of(scope)
    note(query["log"], query["id"])
    if "gate" in query:
        await wait_gate(query["gate"])
    await answer(send, id=query["id"])


async def digest(scope: Scope, receive: Receive, send: Send) -> None:
    """Read a body as it comes; say how long it was, and what."""
    query = query_of(scope)
    length, hashed = 0, hashlib.sha256()
    is_more = True
    while is_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        hashed.update(message["body"])
        is_more = message.get("more_body", False)
    if "log" in query:
        note(query["log"], query["id"])
    await answer(send, length=length, sha256=hashed.hexdigest())


# ---- streams


def is_there(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # of a tmpfs, and asked often


async def wait_there(path: str) -> None:
    """Wait for a file, as often as this is entered again: a gate opens but once."""
    while not is_there(path):  # noqa: ASYNC110  # it is another process that makes it
        await asyncio.sleep(TICK_S)


async def tick(scope: Scope, send: Send) -> None:
    """Send numbered events until the file ``until`` is there; say at the end of each which process ticks."""
    state, until = state_of(scope), query_of(scope)["until"]
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while not is_there(until):
        await asyncio.sleep(TICK_S)
        state["id"] = state.get("id", 0) + 1
        event = b"id: %d\ndata: %d\n\n" % (state["id"], os.getpid())
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body"})


async def events(scope: Scope, _: Receive, send: Send) -> None:
    asgi.resumable(scope)
    await tick(scope, send)


async def events_unsaid(scope: Scope, _: Receive, send: Send) -> None:
    """Count on its state, and do not say so: whether it moves is for --resume to say."""
    await tick(scope, send)


async def sized(scope: Scope, _: Receive, send: Send) -> None:
    """Send half a body of 100 000 bytes, the length said before; the rest once the file ``until`` is there."""
    asgi.resumable(scope)
    state, until = state_of(scope), query_of(scope)["until"]
    headers = [(b"content-length", b"100000"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while state.get("sent", 0) < 100:
        if state.get("sent", 0) == 50:
            await wait_there(until)
        piece = b"%03d %6d " % (state.get("sent", 0), os.getpid())
        state["sent"] = state.get("sent", 0) + 1
        is_more = state["sent"] < 100
        await send({"type": "http.response.body", "body": piece.ljust(1000, b"x"), "more_body": is_more})


async def until_gone(scope: Scope, receive: Receive, send: Send) -> None:
    """Send one event, and another once the client is gone, into the log."""
    asgi.resumable(scope)
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not extension_of(scope)["resumed"]:
        await send({"type": "http.response.body", "body": b"data: here\n\n", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        continue
    note(query_of(scope)["log"], f"gone {os.getpid()}")


# ---- WebSockets


async def accept(receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Send back what comes, as it came."""
    asgi.resumable(scope)
    await echo_unsaid(scope, receive, send)


async def echo_unsaid(_: Scope, receive: Receive, send: Send) -> None:
    await accept(receive, send)
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


async def number(scope: Scope, receive: Receive, send: Send) -> None:
    """Number each message, say who answers."""
    asgi.resumable(scope)
    await number_unsaid(scope, receive, send)


async def number_unsaid(scope: Scope, receive: Receive, send: Send) -> None:
    """Count on its state, and do not say so."""
    state = state_of(scope)
    await accept(receive, send)
    while (message := await receive())["type"] == "websocket.receive":
        state["n"] = state.get("n", 0) + 1
        text = f"{state['n']} {os.getpid()} {message.get('text')}"
        await send({"type": "websocket.send", "text": text})


@asgi.resumable(version=1)
async def lives(scope: Scope, receive: Receive, send: Send) -> None:
    """Note what happens to the coroutine: how it came to life, what it was told, how it ended."""
    log = query_of(scope)["log"]
    resumed = extension_of(scope)["resumed"]
    note(log, "resumed" if resumed else "fresh")
    try:
        await accept(receive, send)
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
        note(log, f"{message['type']} {message.get('code')}")
    except BaseException as raised:
        note(log, f"raised {type(raised).__name__}")
        raise
    finally:
        note(log, "finally")


async def scope_told(scope: Scope, receive: Receive, send: Send) -> None:
    """Say what the scope says, whenever asked."""
    asgi.resumable(scope)
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": "two", "headers": [(b"x-mark", b"set")]})
    while (await receive())["type"] == "websocket.receive":
        told = {key: scope[key] for key in ("path", "scheme", "subprotocols", "http_version", "root_path", "client")}
        told |= {"query": scope["query_string"].decode(), "raw_path": scope["raw_path"].decode()}
        told |= {"cookies": [value.decode() for name, value in scope["headers"] if name == b"cookie"]}
        await send({"type": "websocket.send", "text": json.dumps(told)})


async def member(scope: Scope, receive: Receive, send: Send) -> None:
    """Be in the room; echo, too, and send from a task of its own once the gate is open."""
    asgi.resumable(scope)
    query = query_of(scope)

    async def speak() -> None:
        await wait_gate(query["gate"])
        await send({"type": "websocket.send", "text": "from a task of its own"})

    members.append(send)
    if "gate" in query and not extension_of(scope)["resumed"]:
        tasks.add(asyncio.ensure_future(speak()))
    await echo_unsaid(scope, receive, send)


async def announce(_: Scope, receive: Receive, send: Send) -> None:
    """Say to all in the room what comes; say how many heard it, and how many sends raised."""
    await accept(receive, send)
    while (message := await receive())["type"] == "websocket.receive":
        heard, raised = 0, 0
        for other in members:
            try:
                await other({"type": "websocket.send", "text": message["text"]})
                heard += 1
            except OSError:  # what uvicorn raises where the client is gone
                raised += 1
        await send({"type": "websocket.send", "text": f"{heard} heard, {raised} raised"})


members: list[Send] = []
tasks: set[asyncio.Future[None]] = set()


async def late_accept(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept once the gate is open."""
    asgi.resumable(scope)
    if not extension_of(scope)["resumed"]:
        await wait_gate(query_of(scope)["gate"])
    await echo_unsaid(scope, receive, send)


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer each message once the gate is open."""
    asgi.resumable(scope)
    await accept(receive, send)
    while (message := await receive())["type"] == "websocket.receive":
        await wait_gate(query_of(scope)["gate"])
        await send({**message, "type": "websocket.send"})


async def closes(scope: Scope, receive: Receive, send: Send) -> None:
    """Close, with a code and a reason, at the first message."""
    asgi.resumable(scope)
    await accept(receive, send)
    await receive()
    await send({"type": "websocket.close", "code": 4001, "reason": "enough"})
    with contextlib.suppress(OSError):
        await receive()


async def odd_state(scope: Scope, receive: Receive, send: Send) -> None:
    """Keep in the state what the first message says."""
    asgi.resumable(scope)
    state = state_of(scope)
    await accept(receive, send)
    while (message := await receive())["type"] == "websocket.receive":
        kind, _, size = message["text"].partition(" ")
        if kind == "set":
            state["members"] = {1, 2, 3}
        elif kind == "large":
            state["history"] = "x" * int(size)
        await send({"type": "websocket.send", "text": f"{os.getpid()} {message['text']}"})


ROUTES = {
    "/who": who,
    "/count": count,
    "/digest": digest,
    "/events": events,
    "/events-unsaid": events_unsaid,
    "/sized": sized,
    "/until-gone": until_gone,
    "/echo": echo,
    "/echo-unsaid": echo_unsaid,
    "/number": number,
    "/number-unsaid": number_unsaid,
    "/lives": lives,
    "/scope": scope_told,
    "/member": member,
    "/announce": announce,
    "/late-accept": late_accept,
    "/busy": busy,
    "/closes": closes,
    "/odd-state": odd_state,
}
