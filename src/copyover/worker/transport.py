"""
How the bytes of one connection come and go: both buffers, and the end of the socket.

It knows nothing of handlers, boundaries or the holder. It is none of asyncio's or uvloop's own, because those keep what
they have not sent to themselves; when its socket is ready, the poller tells.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from typing import TYPE_CHECKING

from copyover.sockets import reset
from copyover.worker.poller import IN, OUT, watcher_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from copyover.messages import Record

READ_BYTES = 64 << 10
LINGER_S = 5.0


class Phase(enum.Enum):
    OPEN = "open"
    FINISHING = "finishing"  # nothing more is written; what is unsent goes out first
    LINGERING = "lingering"  # our FIN is sent; we read and discard until the peer's comes
    CLOSED = "closed"


_OPEN, _LINGERING = Phase.OPEN, Phase.LINGERING  # to look one up in its enum takes longer than all that is done with it


class Transport:
    """
    The bytes of one connection.

    *on_change* is called after input came, the peer ended, or unsent bytes left; *on_closed* once, at the end.
    *received* and *sent* count what was read from and taken by the kernel since the connection was accepted, in
    whichever process.
    """

    __slots__ = (
        "_high_water",
        "_is_running",
        "_linger",
        "_loop",
        "_watched",
        "_watcher",
        "error",
        "held",
        "input",
        "is_eof",
        "mark",
        "on_change",
        "on_closed",
        "output",
        "phase",
        "received",
        "sent",
        "socket",
        "was_aborted",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._watcher = watcher_of(loop)
        self._watched = 0  # the events that it waits for
        self.socket = sock
        self.input = bytearray()
        self.held = b""  # the unread bytes of a record, until start
        self.output = bytearray()
        self.received = 0
        self.sent = 0
        self.is_eof = False
        self.error: OSError | None = None
        self.phase = _OPEN
        self.on_change: Callable[[], None] = _nothing
        self.on_closed: Callable[[], None] = _nothing
        self.was_aborted = False
        # Called before the socket is used, where the kernel counts no bytes.
        self.mark: Callable[[], None] | None = None
        self._is_running = False
        self._high_water = READ_BYTES
        self._linger: asyncio.TimerHandle | None = None

    @property
    def is_ended(self) -> bool:
        """Nothing more will be read."""
        return self.is_eof or self.error is not None

    @property
    def unread(self) -> bytes:
        return bytes(self.input) + self.held

    def restore(self, record: Record, phase: Phase) -> None:
        """Become what *record* says; its unread bytes are input once this is started, not before."""
        self.phase = phase
        self.held = record.unread
        self.output[:] = record.unsent
        self.received, self.sent = record.received, record.sent

    def start(self) -> None:
        """Begin, or go on, to read and to send."""
        self._is_running = True
        if self.held:
            self.input += self.held
            self.held = b""
            self.on_change()
            if not self._is_running:
                return  # that has halted or closed it: what is unsent is somebody else's
        if self.phase is _LINGERING:
            self._begin_linger()
            return
        self._watch_input()
        if self.output:
            self.writable()
        elif self.phase is Phase.FINISHING:
            self._shut_down()

    def pause(self) -> None:
        """Touch the socket no more: somebody else is going to."""
        self._is_running = False
        self._watch(0)
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def want(self, count: int) -> None:
        """Read ahead at least *count* bytes, from now on."""
        if count > self._high_water:
            self._high_water = count
            self._watch_input()

    def consumed(self) -> None:
        """The caller has taken bytes off ``input``."""
        if not self._watched & IN:
            self._watch_input()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*, or keep what the kernel does not take until it does."""
        if self.error is not None or self.phase is not _OPEN:
            return
        if self.output or not self._is_running:
            self.output += data
            return
        if self.mark is not None:
            self.mark()
        try:
            sent = self.socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as problem:
            self._lose(problem)
            return
        self.sent += sent
        if sent < len(data):
            self.output += memoryview(data)[sent:]
            self._watch_output()

    def keep(self, data: bytes | bytearray | memoryview) -> None:
        """Take *data*, and send it with the next ``flush``: two small pieces in one system call."""
        if self.error is None and self.phase is _OPEN:
            self.output += data

    def flush(self) -> None:
        """Send what is kept, as far as the kernel takes it; nobody is told, other than that the connection broke."""
        if not self.output or self._watched & OUT or not self._is_running or self.error is not None:
            return
        if self._offer() and self.output:
            self._watch_output()

    def finish(self) -> None:
        """Send what is unsent, then FIN, wait for the peer's, close."""
        if self.phase is not _OPEN:
            return
        self.phase = Phase.FINISHING
        if self.error is not None:
            self.close()
        elif self._is_running and not self.output:
            self._shut_down()
        elif self._is_running:
            self._watch_output()

    def abort(self) -> None:
        """Send RST at once and close; unsent bytes are gone."""
        if self.phase is Phase.CLOSED:
            return
        self.was_aborted = True
        self._watch(0)
        with contextlib.suppress(OSError):  # the peer's own reset came first: what we wanted is so
            reset(self.socket)
        self.close()

    def close(self) -> None:
        """
        Close our copy of the socket and say so; sends nothing by itself while the holder has a dup.

        An epoll registration outlives close() while a dup lives: it is removed first. epoll(7), Q6
        """
        if self.phase is Phase.CLOSED:
            return
        self.pause()
        self.phase = Phase.CLOSED
        self.socket.close()
        closed, self.on_closed, self.on_change = self.on_closed, _nothing, _nothing
        closed()

    # ---- the event loop's side

    def _watch(self, wanted: int) -> None:
        if wanted != self._watched:
            self._watcher.watch(self, self._watched, wanted)
            self._watched = wanted  # not before: the kernel may have no room for another. epoll_ctl(2), ENOSPC

    def _watch_input(self) -> None:
        is_wanted = self._is_running and not self.is_ended and len(self.input) < self._high_water
        self._watch(self._watched | IN if is_wanted else self._watched & ~IN)

    def _watch_output(self) -> None:
        is_wanted = self._is_running and bool(self.output) and self.error is None
        self._watch(self._watched | OUT if is_wanted else self._watched & ~OUT)

    def ready(self, events: int) -> None:
        """Read and write, as far as it is waited for; an error or a hangup, which comes unasked, is seen by either."""
        if events & ~OUT and self._watched & IN:
            self.readable()
        if events & ~IN and self._watched & OUT:
            self.writable()

    def readable(self) -> None:
        """Take what came."""
        if self.mark is not None:
            self.mark()
        try:
            data = self.socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            if self.mark is not None:
                self.on_change()  # nothing came: whoever waits at a boundary takes the mark away
            return
        except OSError as problem:
            self._lose(problem)
            return
        if self.phase is _LINGERING:
            if not data:
                self.close()
            return
        if data:
            self.received += len(data)
            self.input += data
        else:
            self.is_eof = True
        if not data or len(self.input) >= self._high_water:
            self._watch_input()
        self.on_change()

    def _offer(self) -> bool:
        """Give the kernel as much of what is unsent as it takes; False if the connection broke."""
        if self.mark is not None:
            self.mark()
        try:
            sent = self.socket.send(self.output)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as problem:
            self._lose(problem)
            return False
        del self.output[:sent]
        self.sent += sent
        return True

    def writable(self) -> None:
        """Send what is unsent, as far as the kernel takes it."""
        if not self._offer():
            return
        self._watch_output()
        if not self.output and self.phase is Phase.FINISHING:
            self._shut_down()
        self.on_change()

    def _shut_down(self) -> None:
        """Shutdown before close, so that the client sees FIN at once though the holder has a dup."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as problem:
            self._lose(problem)
            return
        self.phase = Phase.LINGERING
        if self.is_eof:
            self.close()
        else:
            self._begin_linger()

    def _begin_linger(self) -> None:
        """
        Read and discard until the peer's FIN, for at most five seconds.

        Closing with unread input sends RST, which takes our last bytes away from the client. tcp(7); RFC 2525, 2.17
        """
        self.input.clear()
        self._high_water = READ_BYTES
        self._watch_input()
        self._linger = self._loop.call_later(LINGER_S, self.close)

    def _lose(self, problem: OSError) -> None:
        self.error = problem
        self.output.clear()
        self._watch(0)
        if self.phase is _OPEN:
            self.on_change()
        else:
            self.close()


def _nothing() -> None:
    pass
