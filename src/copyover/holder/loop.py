"""
What wakes the holder: descriptors, timers and signals, each with what is to be called.

It knows nothing of workers, operators or phases.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LONGEST_SLEEP_S = 3600.0  # epoll takes 24 days at most. epoll_wait(2)


class Loop:
    """The descriptors that are watched and the timers that are set. *between* is called after each callback."""

    def __init__(self, between: Callable[[], None]) -> None:
        self._between = between
        self._selector = selectors.DefaultSelector()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._signal_ends: tuple[socket.socket, ...] = ()
        self.deliver_signals: Callable[[], None] = lambda: None

    def turn(self) -> None:
        """Wait for what comes next, and call what belongs to it."""
        self._between()
        for key, _ in self._selector.select(self._until_next_timer()):
            if self.is_watched(key.fileobj):  # an earlier event of this turn may have closed it
                key.data()
            self._between()
        self.fire_due()
        self._between()

    # ---- descriptors

    def watch(self, fileobj: Any, callback: Callable[[], None], mask: int = selectors.EVENT_READ) -> None:
        if self.is_watched(fileobj):
            self._selector.modify(fileobj, mask, callback)
        else:
            self._selector.register(fileobj, mask, callback)

    def unwatch(self, fileobj: Any) -> None:
        if self.is_watched(fileobj):
            self._selector.unregister(fileobj)

    def is_watched(self, fileobj: Any) -> bool:
        try:
            return fileobj in self._selector.get_map()
        except ValueError:  # it is closed: a closed thing has no number to be looked up by
            return False

    # ---- timers

    def set_timer(self, name: str, after_s: float, fire: Callable[[], None]) -> None:
        """Call *fire* once; a timer of the same name is replaced."""
        self._timers[name] = (time.monotonic() + after_s, fire)

    def fire_due(self, prefix: str = "") -> None:
        """Call what is due of the timers whose names begin with *prefix*."""
        now_s = time.monotonic()
        for name, (deadline_s, fire) in list(self._timers.items()):
            if name.startswith(prefix) and deadline_s <= now_s and self.deadline_s(name) == deadline_s:
                del self._timers[name]
                fire()

    def cancel_timer(self, name: str) -> bool:
        """Take a timer back; True if it was set."""
        return self._timers.pop(name, None) is not None

    def deadline_s(self, name: str) -> float | None:
        return self._timers[name][0] if name in self._timers else None

    def deadlines_s(self) -> dict[str, float]:
        """Return when each timer fires, by its name."""
        return {name: deadline_s for name, (deadline_s, _) in self._timers.items()}

    def _until_next_timer(self) -> float | None:
        if not self._timers:
            return None
        until_s = min(deadline_s for deadline_s, _ in self._timers.values()) - time.monotonic()
        return min(max(until_s, 0.0), LONGEST_SLEEP_S)

    # ---- signals

    def catch_signals(self, numbers: Iterable[int], called: Callable[[int], None]) -> None:
        """Let signals wake the selector as bytes; ``deliver_signals`` calls for those that have come. signal(7)"""
        ours, theirs = self._signal_ends = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

        def deliver() -> None:
            with contextlib.suppress(BlockingIOError):
                for number in dict.fromkeys(ours.recv(4096)):
                    called(number)

        self.deliver_signals = deliver
        self.watch(ours, deliver)

    def close(self) -> None:
        """Forget all; signals are the process's own business again."""
        signal.set_wakeup_fd(-1)
        for end in self._signal_ends:
            end.close()
        self._selector.close()
