"""What applications under test do with files: wait at gates that a test opens, and note down what happened."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from starlette.types import Scope


async def wait_gate(path: str) -> None:
    """Return once somebody has opened the FIFO *path* for writing, and closed it again: it is empty then."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[None] = loop.create_future()
    # Without a writer it opens at once, and is not readable before one has written or closed. fifo(7)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def look() -> None:
        with contextlib.suppress(BlockingIOError):  # another who waits here was faster
            if not os.read(descriptor, 1) and not opened.done():
                opened.set_result(None)

    loop.add_reader(descriptor, look)
    try:
        await opened
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def note(path: str, line: str) -> None:
    """Add a line to a file that several processes write: O_APPEND keeps each line whole. write(2)"""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def query_of(scope: Scope) -> dict[str, str]:
    """Return what the query says: the names of gates and files."""
    return dict(parse_qsl(scope["query_string"].decode()))


def extension_of(scope: Scope) -> dict[str, Any]:
    """Return what copyover has put into the scope; under a plain server, something that forgets."""
    extension: dict[str, Any] = (scope.get("extensions") or {}).get("copyover", {"state": {}, "resumed": False})
    return extension


def state_of(scope: Scope) -> dict[str, Any]:
    """Return the state that travels."""
    state: dict[str, Any] = extension_of(scope)["state"]
    return state
