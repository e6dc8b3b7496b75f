"""
When connections that came from elsewhere are entered, and when their input is read.

It paces and waits; who is entered and what belongs to a cut is the holder's word.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from copyover.worker.served import Course, Served
from copyover.worker.transport import Phase

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

TURN_S = 0.001  # what a move may take of one turn of the loop: between them who is served is served
ENTER_S = 1.0  # how long it waits for those that do not reach a boundary, once none does


class Entrance:
    """
    Enters at most *at_once* connections before the first of them has reached a boundary, and *rate* a second (0: any).

    What an application does at its top, it may do with a database: a thousand at once would bring that down.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, enter: Callable[[Served], None], *, at_once: int, rate: float = 0.0
    ) -> None:
        self._loop = loop
        self._enter = enter
        self._at_once = at_once
        self._gap_s = 1 / rate if rate > 0 else 0.0
        self._next_s = 0.0
        self._waiting: collections.deque[tuple[Served, Cut | None]] = collections.deque()
        self._entering: dict[Served, Cut | None] = {}
        self._has_progress = False
        self._patience: asyncio.TimerHandle | None = None
        self._pumping: asyncio.Handle | None = None

    @property
    def is_paced(self) -> bool:
        """Whether it may take long by intention."""
        return self._gap_s > 0

    def admit(self, connections: Sequence[Served], on_all_in: Callable[[Sequence[Served]], None] | None = None) -> None:
        """
        Enter these.

        With *on_all_in* they are a consistent cut, of which no input is read and nothing is sent before all are in: a
        broadcast then finds everybody. It is called at that moment, with those that are still here.
        """
        cut = Cut(connections, on_all_in) if on_all_in is not None else None
        self._waiting.extend((connection, cut) for connection in connections)
        if self._pumping is None:
            self._pump()

    def _pump(self) -> None:
        self._pumping = None
        now_s = self._loop.time()
        end_s = now_s + TURN_S
        while self._waiting and len(self._entering) < self._at_once:
            if now_s < self._next_s or now_s > end_s:
                self._pump_at(max(self._next_s, now_s))
                break
            if self._gap_s:
                self._next_s = max(self._next_s, now_s) + self._gap_s
            self._let_in(*self._waiting.popleft())
            now_s = self._loop.time()
        if self._entering and self._patience is None:
            self._patience = self._loop.call_later(ENTER_S, self._lose_patience)

    def _pump_at(self, when_s: float) -> None:
        if self._pumping is not None:  # who was let in just now has arrived
            self._pumping.cancel()
        self._pumping = self._loop.call_at(when_s, self._pump)

    def _let_in(self, connection: Served, cut: Cut | None) -> None:
        if connection.is_entered or not _is_here(connection):
            if cut is not None:
                cut.arrived(connection)
            return
        connection.is_entered = True
        connection.on_boundary = self._arrived
        self._entering[connection] = cut
        if cut is None:
            connection.transport.start()
        self._enter(connection)

    def _arrived(self, connection: Served) -> None:
        self._has_progress = True
        connection.on_boundary = None
        cut = self._entering.pop(connection)
        if cut is not None:
            cut.arrived(connection)
        if self._waiting and self._pumping is None:
            self._pumping = self._loop.call_soon(self._pump)

    def _lose_patience(self) -> None:
        """Those that do not arrive hold up nobody for ever."""
        self._patience = None
        if not self._has_progress:
            for connection in list(self._entering):
                self._arrived(connection)
        self._has_progress = False
        if self._entering:
            self._patience = self._loop.call_later(ENTER_S, self._lose_patience)


class Cut:
    """A consistent cut: its input is read once all have reached a boundary."""

    def __init__(self, connections: Sequence[Served], on_all_in: Callable[[Sequence[Served]], None]) -> None:
        self._connections = connections
        self._on_all_in = on_all_in
        self._absent = {connection.cookie for connection in connections}

    def arrived(self, connection: Served) -> None:
        self._absent.discard(connection.cookie)
        if not self._absent:
            here = [one for one in self._connections if _is_here(one)]
            self._on_all_in(here)
            for one in here:
                if _is_here(one):
                    one.transport.start()


def _is_here(connection: Served) -> bool:
    """Whether it is still this worker's to serve."""
    return connection.transport.phase is not Phase.CLOSED and connection.course in (Course.RUNNING, Course.ASKED)
