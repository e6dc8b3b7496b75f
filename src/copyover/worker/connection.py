"""
What a handler is given: its bytes, its state, and where it may be frozen.

It decides when a connection stands at a boundary. It knows no holder and no message of the protocol: the runtime asks
it to halt, takes its record, or lets it go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import TYPE_CHECKING, Any, Generic

from copyover.errors import ConnectionClosed, LimitExceeded, Moved
from copyover.messages import Act
from copyover.worker.boundary import Standing
from copyover.worker.served import Course
from copyover.worker.transport import Phase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from copyover.worker.served import Limits
    from copyover.worker.transport import Transport

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # every type checker brings it; the worker does without

    S = TypeVar("S", default=dict[str, Any])  # a bare Connection has a dict for its state
else:
    from typing import TypeVar

    S = TypeVar("S")
M = TypeVar("M")
T = TypeVar("T")

WRITE_AHEAD_BYTES = 64 << 10  # what a write may leave unsent before the next one waits

_OPEN, _ASKED, _FROZEN = Phase.OPEN, Course.ASKED, Course.FROZEN  # to look one up in its enum takes 60 ns each time

# The connection whose handler's family of tasks is running.
current: contextvars.ContextVar[Connection[Any] | None] = contextvars.ContextVar("copyover", default=None)


class Connection(Standing, Generic[S]):
    """
    One live client, across every reload.

    ``state`` travels; local variables do not: after a move the handler is entered again from its top, with ``resumed``
    true. A move raises nothing: the coroutine here stays suspended for good.

    ``interrupted`` is true beside ``resumed`` when the worker that served it was killed in the middle of a message, and
    the listener is one that resumes all the same: ``state`` is that of the last boundary, and what the client sent or
    was sent since is lost. Nothing tells how much of it: the handler has to agree anew with the client.
    """

    __slots__ = ("_forward", "_peer")

    state: S

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: Transport,
        *,
        cookie: int,
        listener: str,
        limits: Limits,
        forward: Callable[[int, Act, bytes], bool],
    ) -> None:
        super().__init__(loop, transport, cookie=cookie, listener=listener, limits=limits)
        self._forward = forward
        self._peer: object = None

    # ---- reading

    @property
    def peer(self) -> object:
        """The client's address as ``socket.getpeername`` gives it; None when it has gone already."""
        if self._peer is None:
            with contextlib.suppress(OSError):
                self._peer = self._transport.socket.getpeername()
        return self._peer

    def lines(self, *, limit: int | None = None) -> AsyncIterator[bytes]:
        r"""
        Iterate over the lines, without their ``\n``; the top of the loop is a boundary.

        The iteration ends when the client has ended or reset the connection; a last line without ``\n`` counts.

        Raises:
            LimitExceeded: a line is longer than *limit* bytes.

        """
        most = self._limits.line_bytes if limit is None else limit

        def take() -> bytes | None:
            buffer = self._transport.input
            end = buffer.find(b"\n")
            if end > most or (end < 0 and len(buffer) > most):
                raise LimitExceeded(f"a line is longer than {most} bytes")
            if end >= 0:
                line = bytes(memoryview(buffer)[:end])
                del buffer[: end + 1]
                return line
            if buffer and self._transport.is_ended:
                line = bytes(buffer)
                buffer.clear()
                return line
            return None

        self._transport.want(most + 1)
        return _Messages(self, take, "lines()")

    def messages(self, decoder: Callable[[bytearray], M | None], *, limit: int | None = None) -> AsyncIterator[M]:
        """
        Iterate over what *decoder* makes of the bytes; the top of the loop is a boundary.

        *decoder* is given the buffer. It deletes the bytes of one whole message and returns that, or leaves the buffer
        as it is and returns None: more must come first. An incomplete message at the end of the connection is dropped.

        Raises:
            LimitExceeded: *limit* bytes came and make no message.

        """
        most = self._limits.message_bytes if limit is None else limit

        def take() -> M | None:
            buffer = self._transport.input
            message = decoder(buffer) if buffer else None
            if message is None and len(buffer) > most:
                raise LimitExceeded(f"{len(buffer)} bytes came and make no message; the limit is {most}")
            return message

        self._transport.want(most + 1)
        return _Messages(self, take, "messages()")

    async def read(self, most: int = 64 << 10) -> bytes:
        """Return at least one byte and at most *most*, or b"" at the end of the connection."""
        await self._wait_until(len)
        return self._take(min(most, len(self._transport.input)), "read()")

    async def read_exactly(self, count: int) -> bytes:
        """
        Return *count* bytes.

        Raises:
            asyncio.IncompleteReadError: the connection ended before; ``partial`` has what came.
            LimitExceeded: *count* is more than the limit of a message.

        """
        if count > self._limits.message_bytes:
            raise LimitExceeded(f"{count} bytes are more than the limit of a message, {self._limits.message_bytes}")
        self._transport.want(count)
        await self._wait_until(lambda buffer: len(buffer) >= count)
        if len(self._transport.input) < count:
            raise asyncio.IncompleteReadError(self._take(len(self._transport.input), "read_exactly()"), count)
        return self._take(count, "read_exactly()")

    async def read_until(self, separator: bytes, *, limit: int | None = None) -> bytes:
        """
        Return the bytes up to and with *separator*.

        Raises:
            asyncio.IncompleteReadError: the connection ended before; ``partial`` has what came.
            LimitExceeded: *limit* bytes came without it.

        """
        most = self._limits.line_bytes if limit is None else limit
        self._transport.want(most + len(separator))
        await self._wait_until(lambda buffer: separator in buffer or len(buffer) > most)
        end = self._transport.input.find(separator)
        if end < 0 and len(self._transport.input) > most:
            raise LimitExceeded(f"{most} bytes came without {separator!r}")
        if end < 0:
            raise asyncio.IncompleteReadError(self._take(len(self._transport.input), "read_until()"), None)
        return self._take(end + len(separator), "read_until()")

    # ---- writing

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """
        Take *data*, and wait while much of what was written earlier is still unsent.

        What the handler's own tasks write belongs to the message that it is at: no boundary before the next one.
        Once the connection has moved they stay suspended. What other tasks write is pushed.

        Raises:
            ConnectionClosed: the connection has ended.

        """
        if current.get() is self:
            if self._is_gated:
                await self._pass_gate()
            self._busy = "write()"
        elif self._course is _FROZEN:
            self.push(data)
            return
        self._check_open()
        earlier = len(self._transport.output)
        is_settled = self._busy is None and self._is_settled  # then another task writes
        self._transport.write(data)
        if is_settled:
            self._save()
        if earlier > WRITE_AHEAD_BYTES:
            await self._wait_until_sent(WRITE_AHEAD_BYTES + len(data), self._limits.record_bytes)
            self._check_open()

    def push(self, data: bytes | bytearray | memoryview) -> None:
        """
        Send *data*, from any task; complete in itself, it leaves a boundary a boundary. A no-op when it has ended.

        Once the connection has moved, the holder passes it on to the worker that serves it: at most once, for it is
        lost if one of the two is killed while it is on its way. A client that takes less than is pushed to it is
        aborted when more than the limit is unsent.

        Raises:
            Moved: another worker serves the connection now, and no holder lives that could pass it on.

        """
        self._act(Act.SEND, data)

    def _act(self, act: Act, data: bytes | bytearray | memoryview = b"") -> None:
        """Do it where the connection is."""
        if self._course is not _FROZEN:
            self.deliver(act, data)
        elif not self._forward(self.cookie, act, bytes(data)):
            raise Moved(f"connection {self.cookie} has moved to another worker, and the holder is gone")

    def deliver(self, act: int, data: bytes | bytearray | memoryview) -> None:
        if self.on_boundary is not None and current.get() is not self:
            self.acts_of_others = (*self.acts_of_others, (act, bytes(data)))
        is_settled = self._is_settled
        if act != Act.SEND:
            end = self._transport.abort if act == Act.ABORT else self._transport.finish
            end()
            if is_settled:
                self._save()
            self._changed()
            return
        self._transport.write(data)
        if is_settled:
            self._save()
        if len(self._transport.output) > self._limits.unsent_bytes:
            self.abort()

    async def close(self) -> None:
        """
        End the connection: what is unsent is sent, then FIN. The handler may return instead.

        Raises:
            Moved: as for ``push``.

        """
        if current.get() is self:
            await self._pass_gate()
        self._act(Act.CLOSE)

    def abort(self) -> None:
        """
        End the connection at once, with a true RST; what is unsent is gone.

        Raises:
            Moved: as for ``push``.

        """
        self._act(Act.ABORT)

    def _check_open(self) -> None:
        if self._transport.error is not None:
            raise ConnectionClosed(f"the client's connection broke: {self._transport.error}") from self._transport.error
        if self._transport.phase is not _OPEN:
            raise ConnectionClosed("the connection is closed")

    # ---- boundaries

    async def boundary(self) -> None:
        """Say that all messages so far are whole: here it may be frozen, and entered again from its top."""
        self._arrive()
        if self._course is _ASKED:
            await self._halt_if_may()

    async def idle(self, awaitable: Awaitable[T]) -> T:
        """
        Wait for something else than input, at a boundary.

        Frozen meanwhile, the awaitable's result stays here; in the replacement the handler waits anew.

        Raises:
            ConnectionClosed: the client's connection broke, or the server is stopping.

        """
        self._arrive()
        waited: asyncio.Future[T] = asyncio.ensure_future(awaitable)
        self._idle = waited  # type: ignore[assignment]  # a Future[T] is only asked whether it is done
        waited.add_done_callback(lambda _: self._wake())
        try:
            while not waited.done():
                if self._course is _ASKED:
                    await self._halt_if_may()
                if self._transport.error is not None or self._is_stopping:
                    self._check_open()
                    raise ConnectionClosed("the server is stopping")
                await self._wait()
            self._busy = "idle()"
            return waited.result()
        finally:
            self._idle = None
            if not waited.done():
                waited.cancel()

    @contextlib.asynccontextmanager
    async def pinned(self, reason: str = "pinned by its handler") -> AsyncIterator[None]:
        """Keep the connection in this worker while the block runs; *reason* is what operators read."""
        self._pins = self._pins or []
        self._pins.append(reason)
        try:
            yield
        finally:
            self._pins.remove(reason)

    def _take(self, count: int, how: str) -> bytes:
        buffer = self._transport.input
        data = bytes(memoryview(buffer)[:count])
        del buffer[:count]
        self._busy = how
        self._transport.consumed()
        return data

    async def _wait_until(self, is_enough: Callable[[bytearray], object]) -> None:
        """Wait for input, or for the end. Freezable as long as nothing was consumed or written since a boundary."""
        if self._busy is None:
            self._arrive()
        while True:
            if self._course is _ASKED:
                await self._halt_if_may()
            if is_enough(self._transport.input) or self.is_over:
                return
            await self._wait()

    async def next_message(self, take: Callable[[], M | None], how: str) -> M | None:
        """Return the next message, None at the end; for the iterators."""
        self._arrive()
        while True:
            if self._course is _ASKED:
                await self._halt_if_may()
            message = take()
            if message is not None:
                self._busy = how
                self._transport.consumed()
                return message
            if self.is_over:
                return None
            await self._wait()


class _Messages(Generic[M]):
    """An iteration over whole messages. Not an async generator: those cannot be left suspended without a warning."""

    __slots__ = ("_connection", "_how", "_take")

    def __init__(self, connection: Connection[Any], take: Callable[[], M | None], how: str) -> None:
        self._connection = connection
        self._take = take
        self._how = how

    def __aiter__(self) -> _Messages[M]:
        return self

    async def __anext__(self) -> M:
        message = await self._connection.next_message(self._take, self._how)
        if message is None:
            raise StopAsyncIteration
        return message
