"""
When what connections were given to write leaves: with all else of its turn of the loop, in the next one.

It sends nothing itself; whether a connection stands at a boundary by then is the connection's business.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from copyover.worker.hosted import Hosted

log = logging.getLogger("copyover.worker")


class Outbox:
    """
    Connections that are to settle, all of them by one callback.

    The pieces of an answer leave in one system call, a callback for each connection would cost as much as its system
    call, and a client that is sent many answers in a row is woken once.
    """

    __slots__ = ("_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[Hosted] = []

    def add(self, connection: Hosted) -> None:
        """Have *connection* settle in the next turn; it sees to it that it is not here already."""
        if not self._waiting:
            self._loop.call_soon(self._settle)
        self._waiting.append(connection)

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            try:
                connection.settle_now()
            except Exception:
                log.exception("connection=%d could not settle", connection.cookie)
