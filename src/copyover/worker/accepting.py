"""
When this worker accepts, and from where.

It takes sockets off the listeners and hands them on; what becomes of them is the runtime's business.
"""

from __future__ import annotations

import errno
import logging
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

log = logging.getLogger("copyover.worker")

BATCH = 128
PAUSE_S = 1.0
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """
    Accepts while it is on and not held; *take* gets the number of the listener and a batch of its sockets.

    A listener that the holder has shut down is accepted empty, and closed here too.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listeners: dict[int, socket.socket],
        take: Callable[[int, list[socket.socket]], None],
    ) -> None:
        self._loop = loop
        self.listeners = listeners
        self._take = take
        self._is_on = False
        self._held_for: set[str] = set()

    def switch(self, *, is_on: bool) -> None:
        """Do what the holder says."""
        self._is_on = is_on
        self._watch()

    def hold(self, reason: str, *, is_held: bool) -> None:
        """Wait as long as there is a reason; clients wait in the backlog."""
        if is_held:
            self._held_for.add(reason)
        else:
            self._held_for.discard(reason)
        self._watch()

    def _watch(self) -> None:
        for number, listener in self.listeners.items():
            if self._is_on and not self._held_for:
                self._loop.add_reader(listener, self._accept, number)
            else:
                self._loop.remove_reader(listener)

    def close(self) -> None:
        """Never accept again: the addresses are free once nobody else listens there."""
        for number in list(self.listeners):
            self._close(number)

    def _close(self, number: int) -> None:
        listener = self.listeners.pop(number)
        self._loop.remove_reader(listener)
        listener.close()

    def _accept(self, number: int) -> None:
        listener = self.listeners[number]
        taken: list[socket.socket] = []
        while len(taken) < BATCH:
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as problem:
                if problem.errno == errno.EINVAL:
                    break  # it listens no more. accept(2)
                if problem.errno not in _EXHAUSTED:
                    raise
                log.warning("accepting pauses for a second, clients wait in the backlog: %s", problem)
                self.hold("exhausted", is_held=True)
                self._loop.call_later(PAUSE_S, lambda: self.hold("exhausted", is_held=False))
                break
            sock.setblocking(False)
            taken.append(sock)
        if taken:
            self._take(number, taken)
        elif _is_shut_down(listener):
            self._close(number)


def _is_shut_down(listener: socket.socket) -> bool:
    """Whether the holder, or anybody who has the socket, has ended it: a unix one says EAGAIN to accept even then."""
    poll = select.poll()
    poll.register(listener, 0)  # POLLHUP comes unasked. poll(2)
    return any(found & select.POLLHUP for _, found in poll.poll(0))
