"""
How the sockets of the connections wait until something comes or goes.

It says which of them are ready and reads and writes no byte. The loop's own ``add_reader`` costs up to ten microseconds
and half a kilobyte a socket, and a call through a handle at each event: too much where thousands move at once.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import selectors
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket

IN = select.EPOLLIN
OUT = select.EPOLLOUT
EVENTS_A_TURN = 256


class Watched(Protocol):
    """What waits for its socket; *wanted* are the events that it waits for, IN and OUT."""

    socket: socket.socket

    def ready(self, events: int) -> None:
        """Read or write: *events* is what epoll found, of which an error or a hangup comes unasked."""


class Watcher(Protocol):
    """Tells who is watched that their sockets are ready."""

    def watch(self, watched: Watched, before: int, wanted: int) -> None:
        """Watch for *wanted* from now on; until now it was *before*."""


class Sockets:
    """What waits in *epoll*, which others may use, too."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._watched: dict[int, Watched] = {}

    def watch(self, watched: Watched, before: int, wanted: int) -> None:
        descriptor = watched.socket.fileno()
        if not before:
            self._epoll.register(descriptor, wanted)
            self._watched[descriptor] = watched
        elif wanted:
            self._epoll.modify(descriptor, wanted)
        else:
            # An epoll registration outlives close() while a dup lives: it is removed first. epoll(7), Q6
            self._epoll.unregister(descriptor)
            del self._watched[descriptor]

    def tell(self, wait_s: float = 0) -> list[tuple[int, int]]:
        """Wait at most *wait_s* (-1: for ever); tell those that are ready, return what else is."""
        others = []
        for descriptor, events in self._epoll.poll(wait_s, EVENTS_A_TURN):
            watched = self._watched.get(descriptor)
            if watched is None:
                others.append((descriptor, events))
            else:
                self._tell(watched, events)
        return others

    def _tell(self, watched: Watched, events: int) -> None:
        try:
            watched.ready(events)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as problem:  # noqa: BLE001  # as a handle of the loop does: one fault ends no other's turn
            said = {"message": f"a fault while events were handled of {watched!r}", "exception": problem}
            asyncio.get_running_loop().call_exception_handler(said)

    def close(self) -> None:
        self._epoll.close()


class Poller(selectors.EpollSelector):
    """
    The selector of an asyncio loop, and a short way for the connections beside it.

    They are in the same epoll as what asyncio watches, so that they cost no system call more; they are told within
    ``select``, before the loop's own callbacks run.
    """

    def __init__(self) -> None:
        super().__init__()
        # The very epoll, which the base keeps to itself.
        self.sockets = Sockets(select.epoll.fromfd(os.dup(self.fileno())))

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait at most *timeout* seconds; tell the connections that are ready, return what else is."""
        # Rounded up: a timer that is due in half a millisecond must not be waited for busily. epoll_wait(2)
        wait_s = -1.0 if timeout is None else math.ceil(max(timeout, 0) * 1000) / 1000
        others = self.sockets.tell(wait_s)
        return self._keys(others) if others else []

    def _keys(self, others: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what the loop watches for itself as it expects it; an error or a hangup is both, input and room."""
        registered = self.get_map()
        found = []
        for descriptor, events in others:
            key = registered.get(descriptor)
            if key is not None:  # else it was closed within this turn
                ready = selectors.EVENT_READ if events & ~OUT else 0
                ready |= selectors.EVENT_WRITE if events & ~IN else 0
                found.append((key, ready & key.events))
        return found

    def close(self) -> None:
        self.sockets.close()
        super().close()


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop on a Poller."""

    def __init__(self) -> None:
        poller = Poller()
        self.watcher = poller.sockets
        super().__init__(poller)


# Of other loops: an epoll of our own, which the loop watches as one descriptor. With a reader for each connection libuv
# calls it once more after an error and then never again: what came before a client's reset would be read, and the reset
# itself would never be seen.
_beside: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Sockets] = weakref.WeakKeyDictionary()


def watcher_of(loop: asyncio.AbstractEventLoop) -> Watcher:
    """Return what watches sockets on *loop*."""
    if isinstance(loop, Loop):
        return loop.watcher
    found = _beside.get(loop)
    if found is None:
        epoll = select.epoll()
        found = _beside[loop] = Sockets(epoll)
        loop.add_reader(epoll.fileno(), found.tell)
    return found
