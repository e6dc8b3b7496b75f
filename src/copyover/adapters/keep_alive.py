"""
How long a connection may be idle: the loop, as uvicorn's HTTP protocols see it.

They begin such a time with each response and give it up with each request; few of these run out. It decides nothing
about connections: what a time that has run out means is theirs to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class KeepAlive:
    """
    One timer for all the times of a connection, each as long as the last: it looks at what has become of them.

    A timer for each would be made, sorted in and cancelled between any two requests. To a protocol this is its loop,
    and the handle that ``call_later`` returns.
    """

    __slots__ = ("_due_s", "_loop", "_ran_out", "_timer", "create_task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.create_task = loop.create_task
        self._due_s = 0.0
        self._ran_out: Callable[[], Any] | None = None  # while a time runs
        self._timer: asyncio.TimerHandle | None = None

    def call_later(self, delay_s: float, ran_out: Callable[[], Any]) -> KeepAlive:
        """Begin a time."""
        self._due_s = self._loop.time() + delay_s
        self._ran_out = ran_out
        if self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._look)
        return self

    def cancel(self) -> None:
        """Give it up; the timer stays for the next."""
        self._ran_out = None

    @property
    def left_s(self) -> float | None:
        """What is left of a time that runs."""
        return None if self._ran_out is None else max(self._due_s - self._loop.time(), 0.0)

    def stop(self) -> None:
        """Give it up, and the timer too."""
        self._ran_out = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        ran_out = self._ran_out
        if ran_out is None:
            return
        if self._due_s > self._loop.time():
            self._timer = self._loop.call_at(self._due_s, self._look)
        else:
            self._ran_out = None
            ran_out()
