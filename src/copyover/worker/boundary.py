"""
Where the handler of a connection stands: at a boundary or away from it.

It decides when a handler may be suspended for good; it reads and writes no byte.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from copyover.worker.served import Course, Served
from copyover.worker.transport import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.worker.served import Limits
    from copyover.worker.transport import Transport


# To look one up in its enum takes longer than all that is done with it.
_OPEN = Phase.OPEN
_RUNNING, _HALTED, _FROZEN = Course.RUNNING, Course.HALTED, Course.FROZEN


class Standing(Served):
    """
    Where one connection stands. A handler that is halted raises nothing: it stays suspended behind a gate.

    It is at a boundary while its handler is suspended waiting, and has neither consumed nor written anything since it
    was entered or passed its last boundary, and is not pinned.
    """

    __slots__ = (
        "_busy",
        "_drainers",
        "_gate",
        "_idle",
        "_is_stopping",
        "_is_waiting",
        "_may_be_behind",
        "_pins",
        "_waiter",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: Transport, *, cookie: int, listener: str, limits: Limits
    ) -> None:
        super().__init__(loop, transport, cookie=cookie, listener=listener, limits=limits)
        self._gate: asyncio.Event | None = None  # what those wait for who came while it was halted
        self._waiter: asyncio.Future[None] | None = None
        self._drainers: list[asyncio.Future[None]] | None = None
        self._idle: asyncio.Future[object] | None = None
        self._busy: str | None = None  # what took it away from its last boundary
        self._pins: list[str] | None = None
        self._is_waiting = False
        self._is_stopping = False
        self._may_be_behind = True  # bytes may have come or gone since it was saved

    # ---- for the runtime

    @property
    def is_over(self) -> bool:
        """Nothing more is to be read: the client has ended it, or it is at a boundary of a server that is stopping."""
        transport = self._transport
        return transport.is_ended or transport.phase is not _OPEN or (self._is_stopping and self._may_halt)

    @property
    def is_at_boundary(self) -> bool:
        if self.is_left:
            return True  # only bytes are left
        # Closed, and its handler not through: what follows the close must run here.
        is_idle_over = self._idle is not None and self._idle.done()
        return self._is_waiting and self._may_halt and not is_idle_over

    @property
    def reason(self) -> str:
        if self._pins:
            return self._pins[-1]
        if self._idle is not None and self._idle.done():
            return "what it idled for has just come"
        return f"in the middle of a message, since its {self._busy}" if self._busy else "it has not reached a boundary"

    def ask_to_halt(self, on_halt: Callable[[], None]) -> bool:
        is_halted = super().ask_to_halt(on_halt)
        if not is_halted:
            self._wake_drainers()
        return is_halted

    def go_on(self) -> None:
        """Serve on, from where it was halted; the very coroutine."""
        super().go_on()
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set()

    def stop(self) -> None:
        """End at the next boundary, as if the client had."""
        self._is_stopping = True
        self._wake()

    # ---- for the connection

    @property
    def _may_halt(self) -> bool:
        return self._busy is None and not self._pins and self._transport.phase is _OPEN

    def _arrive(self) -> None:
        self._busy = None
        self._may_be_behind = False
        self._carried = 0
        if self.slot is not None and not self._pins and self._transport.phase is _OPEN:
            self.slot.save(self._transport, self.state)
        if self.on_boundary is not None:
            super()._arrive()

    @property
    def _is_settled(self) -> bool:
        """It stands at a boundary, and what comes and goes without its handler leaves it there."""
        return self._course is _HALTED or self.is_at_boundary

    async def _halt_if_may(self) -> None:
        """It is asked to halt: do it, if this is a boundary."""
        if self._may_halt:
            self._halt_and_say()
            await self._pass_gate()
            self._may_be_behind = True  # input may have come before it was let go on

    @property
    def _is_gated(self) -> bool:
        return self._course is _HALTED or self._course is _FROZEN

    async def _pass_gate(self) -> None:
        """
        Stay suspended while halted; for good, if the connection moves.

        A time-out that fires meanwhile is held back: where the connection has moved, its clock runs elsewhere.
        """
        held_back: asyncio.CancelledError | None = None
        while self._is_gated:
            self._gate = self._gate or asyncio.Event()
            try:
                await self._gate.wait()
            except asyncio.CancelledError as cancelled:
                held_back = cancelled
        if held_back is not None:
            raise held_back

    async def _wait(self) -> None:
        """Sleep until something changed, and as long as the connection is halted."""
        self._is_waiting = True
        is_behind = self._may_be_behind and self.slot is not None and self.slot.is_behind(self._transport)
        if is_behind and self.is_at_boundary:
            self._save()
        self._may_be_behind = True
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            await self._pass_gate()
            raise
        finally:
            self._waiter = None
            self._is_waiting = False
        if self._is_gated:
            await self._pass_gate()

    async def _wait_until_sent(self, most: int, travels: int) -> None:
        """Wait until *most* bytes are unsent at most; asked to halt, let it go on while fewer than *travels* are."""
        while len(self._transport.output) > most and self._transport.phase is _OPEN:
            if self._course is not _RUNNING and len(self._transport.output) < travels:
                return
            drained = self._loop.create_future()
            self._drainers = [*(self._drainers or []), drained]
            await drained
        await self._pass_gate()

    def _changed(self) -> None:
        """Who waits at a boundary saves what came once it has seen that it makes no message."""
        if self.is_left:
            self._save()
        self._wake()
        if self._drainers:
            self._wake_drainers()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_drainers(self) -> None:
        drainers, self._drainers = self._drainers or [], None
        for drained in drainers:
            if not drained.done():
                drained.set_result(None)
