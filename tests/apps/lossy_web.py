"""The chat page of scripts/examples, with one fault a variant, of each kind of connection: what no client may miss."""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "examples"))

import web_chat

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Fault = Callable[[Send, Message], Awaitable[None]]

FAULTY = 30  # the number of the message, answer or event with which it goes wrong
BODY = "http.response.body"


def is_said(message: Message) -> bool:
    return message["type"] == BODY or '"said"' in str(message.get("text"))


def faulty(fault: Fault) -> Callable[..., Awaitable[None]]:
    """Return the chat page, which sends one thing of each kind by *fault*."""
    sent: collections.Counter[str] = collections.Counter()

    async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        async def send_or_not(message: Message) -> None:
            if is_said(message):
                sent[scope["path"]] += 1
                if sent[scope["path"]] == FAULTY:
                    return await fault(send, message)
            await send(message)
            return None

        await web_chat.app(scope, receive, send_or_not)

    return app


async def _lose(send: Send, message: Message) -> None:
    if message["type"] == BODY and not message.get("more_body"):  # an answer cannot be left out, and the next come
        await send(message)


async def _repeat(send: Send, message: Message) -> None:
    await send(message)
    if message["type"] != BODY or message.get("more_body"):
        await send(message)


async def _spoil(send: Send, message: Message) -> None:
    """Change the words, the number of the answer, the names in the event."""
    if message["type"] != BODY:
        message["text"] = message["text"].replace('"text":"', '"text":"x')
    elif message.get("more_body"):
        message["body"] = message["body"].replace(b"members", b"numbers")
    else:  # as long as it was: its length was told
        message["body"] = re.sub(rb'"number":"\d', b'"number":"x', message["body"])
    await send(message)


async def _drop(_: Send, __: Message) -> None:
    raise ConnectionAbortedError("this connection is dropped on purpose")


lose, repeat, spoil, drop = (faulty(fault) for fault in (_lose, _repeat, _spoil, _drop))
