"""
When the input of a consistent cut is read: once all its handlers have been entered.

It waits and starts transports; who belongs to a cut is the holder's word.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from copyover.worker.boundary import Course
from copyover.worker.transport import Phase

if TYPE_CHECKING:
    import asyncio

    from copyover.worker.connection import Connection

ENTER_S = 1.0  # how long it waits for handlers that do not reach a boundary


class Cut:
    """Input is read once all handlers of the cut have reached a boundary: a broadcast then finds everybody there."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: list[Connection[Any]]) -> None:
        self._connections = connections
        self._absent = {connection.cookie for connection in connections}
        self._deadline = loop.call_later(ENTER_S, self._read)
        for connection in connections:
            connection.on_boundary = functools.partial(self._arrived, connection.cookie)
        if not connections:
            self._read()

    def _arrived(self, cookie: int) -> None:
        self._absent.discard(cookie)
        if not self._absent:
            self._read()

    def _read(self) -> None:
        self._deadline.cancel()
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.on_boundary = None
            if connection.transport.phase is not Phase.CLOSED and connection.course in (Course.RUNNING, Course.ASKED):
                connection.transport.start()
