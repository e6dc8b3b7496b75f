"""
Handlers of our own: one coroutine a connection, entered from its top.

It runs them and says what their ends mean; it knows no message of the holder.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import TYPE_CHECKING, Any

from copyover.errors import LimitExceeded, StartupFailed
from copyover.messages import Kind, Record, RecordFlag
from copyover.worker.connection import Connection, current
from copyover.worker.host import Host
from copyover.worker.served import CannotFreeze, Course, Limits, Served

if TYPE_CHECKING:
    from collections.abc import Iterable

    from copyover.worker.application import Application
    from copyover.worker.transport import Transport

log = logging.getLogger("copyover.worker")


class Handlers(Host):
    interface = "handler"
    kind = Kind.HANDLER

    def __init__(self, loop: asyncio.AbstractEventLoop, application: Application[Any], limits: Limits) -> None:
        self._loop = loop
        self._application = application
        self._limits = limits
        self._tasks: dict[int, asyncio.Task[None]] = {}
        # Coroutines of connections that moved: destroyed, they would run their finally blocks.
        self._asleep: list[asyncio.Task[None]] = []
        self.is_json = application.encode is None
        self.schema = application.schema
        self.readable = application.readable
        self.shares = application.export_shared is not None

    async def start(self) -> None:
        if self._application.startup is not None:
            try:
                await self._application.startup()
            except Exception as problem:
                raise StartupFailed(f"startup raised {type(problem).__name__}: {problem}") from problem

    async def stop(self) -> None:
        if self._application.shutdown is not None:
            await self._application.shutdown()

    def build(self, transport: Transport, *, cookie: int, listener: str) -> Connection[Any]:
        return Connection(
            self._loop, transport, cookie=cookie, listener=listener, limits=self._limits, forward=self.forward
        )

    def enter(self, served: Served) -> None:
        assert isinstance(served, Connection)
        context = contextvars.copy_context()
        context.run(current.set, served)
        self._tasks[served.cookie] = self._loop.create_task(self._handle(served), context=context)

    async def _handle(self, connection: Connection[Any]) -> None:
        try:
            if not connection.resumed:
                connection.state = self._application.state()
            await self._application.handler(connection)
        except LimitExceeded as problem:
            log.warning("connection=%d closed: %s", connection.cookie, problem)
        except Exception as problem:
            if connection.course is Course.FROZEN:
                raise  # it is somebody else's by now
            # That the client went in the middle of a message is its own business, and no failure of the handler.
            if not (connection.is_over and isinstance(problem, (ConnectionError, asyncio.IncompleteReadError))):
                log.exception("connection=%d the handler failed", connection.cookie)
                connection.transport.abort()
        finally:
            if connection.course is not Course.FROZEN:
                connection.leave()

    def encode_state(self, state: Any) -> bytes:
        return self._application.encode_state(state)

    def decode_state(self, record: Record) -> Any:
        if record.flags & (RecordFlag.FRESH | RecordFlag.FINISHED):
            return self._application.state()  # it never had one, or nobody is going to look at it
        if record.schema not in self.readable:
            reads = ", ".join(map(str, self.readable))
            raise CannotFreeze(f"it is of schema {record.schema}, this release reads {reads}")
        return self._application.decode_state(record.state, record.schema)

    def put_to_sleep(self, served: Served) -> None:
        task = self._tasks.pop(served.cookie, None)
        if task is not None:
            self._asleep.append(task)

    def forget(self, served: Served) -> None:
        self._tasks.pop(served.cookie, None)

    def encode_shared(self) -> bytes | None:
        return self._application.encode_shared()

    def decode_shared(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            self._application.decode_shared(part)
