"""
A connection that a protocol object of a server serves: our bytes, its protocol.

It feeds the protocol and halts where that says that it can be frozen; what the bytes mean is the protocol's business.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from copyover.messages import Act, RecordFlag
from copyover.worker.adapter import Adapter, Staying
from copyover.worker.face import Face
from copyover.worker.served import Course, Served
from copyover.worker.transport import Phase

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from copyover.messages import Kind, Record
    from copyover.worker.host import Host
    from copyover.worker.outbox import Outbox
    from copyover.worker.served import Limits
    from copyover.worker.transport import Transport

log = logging.getLogger("copyover.worker")

HIGH_WATER_BYTES = 64 << 10  # unsent, at which a protocol is asked to write no more; as in asyncio
LOW_WATER_BYTES = HIGH_WATER_BYTES // 4

# Looked up once, for each request asks for them: before Python 3.12 a member of an enum costs as much as a call.
_OPEN = Phase.OPEN
_RUNNING, _ASKED = _GOING = Course.RUNNING, Course.ASKED


class Hosted(Served):
    """One connection of a server's protocol objects. It is at a boundary where its protocol can freeze."""

    __slots__ = (
        "_host",
        "_is_busy",
        "_is_lost",
        "_is_muted",
        "_is_paused",
        "_is_waiting",
        "_outbox",
        "_poke",
        "brought",
        "face",
        "is_full",
        "protocol",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: Transport,
        *,
        cookie: int,
        listener: str,
        limits: Limits,
        host: Host,
        outbox: Outbox,
    ) -> None:
        super().__init__(loop, transport, cookie=cookie, listener=listener, limits=limits)
        self._host = host
        self._outbox = outbox
        self._is_waiting = False  # there
        self.face = Face(self)
        self.protocol: Any = None  # an Adapter, and an asyncio.Protocol
        self.state = self  # its bytes are taken when they are needed
        self.brought = b""  # what it was restored from
        self._is_paused = False  # the protocol wants no input
        self.is_full = False  # the protocol was asked to write no more
        self._is_busy = False  # being fed
        self._is_muted = False
        self._is_lost = False
        self._poke: asyncio.Handle | None = None

    # ---- boundaries

    @property
    def is_at_boundary(self) -> bool:
        if self.is_left:
            return True
        transport, protocol = self._transport, self.protocol
        if protocol is None or self._is_busy or transport.is_eof or transport.error is not None:
            return False
        return transport.phase is _OPEN and protocol.can_freeze() is None

    @property
    def reason(self) -> str:
        if self.protocol is None:
            return "it was not entered yet"
        return self.protocol.can_freeze() or "it is just being served"

    @property
    def obstacle(self) -> str | None:
        if self.is_left or self.protocol is None:
            return None
        found: str | None = self.protocol.obstacle
        return found

    def settle(self) -> None:
        """Something has happened: send what is to be sent; if this is a boundary now, do what waits for one."""
        if self._course not in _GOING or self.is_left or self.protocol is None:
            return
        if self._transport.is_eof and self._may_end:
            self.settle_soon()  # what came whole before the end is fed first
        if not self.is_at_boundary:
            self._flush()
            return
        if self.on_boundary is not None:
            self._arrive()  # who arrives last has the input of the whole cut read, its own too: it settles in there
            if self._course not in _GOING or not self.is_at_boundary:
                return
        self._carried = 0
        if self._course is _ASKED:
            self._halt_and_say()
        else:
            self._save_and_flush()
            self._host.cede(self)

    def _save_and_flush(self) -> None:
        """Save before the client can see what it is sent: it is idle by then, and we may be killed at once."""
        slot, transport = self.slot, self._transport
        if slot is not None and (transport.output or slot.is_behind(transport)):
            slot.save_ahead(transport, self.protocol.snapshot)
        self._flush()
        # Where the kernel has not taken all of it, or counts nothing and the use of the socket was marked.
        if transport.output or (transport.mark is not None and slot is not None and slot.is_touched):
            self._save()

    def _flush(self) -> None:
        if self._transport.output:
            self._transport.flush()
        if self.is_full:
            self._ease()

    def settle_next(self) -> None:
        """Settle in the next turn of the loop, with all others that were written to in this one."""
        if not self._is_waiting:
            self._is_waiting = True
            self._outbox.add(self)

    def settle_now(self) -> None:
        """Settle, for the outbox."""
        self._is_waiting = False
        self.settle()
        if self._transport.input and self._takes_input and not self.protocol.is_busy:
            self._feed_and_settle()

    def settle_soon(self) -> None:
        """Settle once the running callbacks are through: what an application does after its ``send`` belongs to it."""
        if self._poke is None and self._course in _GOING:
            self._poke = self._loop.call_soon(self._settle_now)

    def _settle_now(self) -> None:
        self._poke = None
        if self._transport.error is not None:
            self._lose(self._transport.error)
        else:
            self._feed_and_settle()

    def _feed_and_settle(self) -> None:
        transport = self._transport
        if transport.input:
            self._feed()
        if transport.is_eof and self._may_end:
            self.close()  # as asyncio does where eof_received() returns nothing
        if self.protocol is not None and not self.protocol.is_busy:
            self.settle()

    def ask_to_halt(self, on_halt: Callable[[], None]) -> bool:
        is_halted = super().ask_to_halt(on_halt)
        if not is_halted and self.protocol is not None:
            self.protocol.asked()
        return is_halted

    def arrive(self) -> None:
        """Its application was entered again."""
        self._arrive()

    def _halt_now(self) -> None:
        if self.protocol is not None and not self.is_left:
            self._save_and_flush()  # we may be killed before its record is taken
        super()._halt_now()
        if self.protocol is not None:
            self.protocol.halted()

    def go_on(self) -> None:
        was_halted = self._course in (Course.HALTED, Course.FROZEN)
        super().go_on()
        if was_halted and self.protocol is not None:
            self.protocol.going_on()
        self.settle_soon()

    # ---- input

    def _changed(self) -> None:
        transport = self._transport
        if transport.error is not None:
            self._loop.call_soon(self._lose, transport.error)  # never from inside of a write, as in asyncio
        elif transport.phase is _OPEN:
            if self.is_full:
                self._ease()
            self._feed_and_settle()

    @property
    def _may_end(self) -> bool:
        """The client will send no more; what it sent whole is served first, the rest is of no use."""
        if self.protocol is None or self._is_paused:
            return False
        return not (self._transport.input and self.protocol.is_busy)

    def _feed(self) -> None:
        """Give the protocol what it takes, one piece after the other; asked to halt, at most up to a boundary."""
        if self.protocol is None or self._is_busy or not self._takes_input:
            return
        transport = self._transport
        self._is_busy = True
        if self.slot is not None and not self.slot.is_behind(transport):
            # The kernel counts nothing when a message is taken that was read before: it must not be served twice.
            self.slot.touch()
        try:
            while self.protocol.feed(transport.input) and transport.input and self._takes_input:
                pass
        except Exception:
            log.exception("connection=%d its protocol failed", self.cookie)
            self.abort()
        finally:
            self._is_busy = False
        transport.consumed()

    @property
    def _takes_input(self) -> bool:
        """Not if it was asked to halt, and may: one whose client has gone does not move, and is served to its end."""
        if self._is_paused or self._transport.phase is not _OPEN:
            return False
        if self._course is _RUNNING:
            return True
        return self._course is _ASKED and (self._transport.is_ended or self.protocol.can_freeze() is not None)

    # ---- what the protocol asks of its transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_muted or self.is_left:
            return
        self._transport.keep(data)
        if not self._is_waiting:
            self.settle_next()
        self.protocol.wrote(data)
        if not self.is_full and len(self._transport.output) > HIGH_WATER_BYTES:
            self.is_full = True
            self.protocol.pause_writing()

    def _ease(self) -> None:
        """Let the protocol write again once little is unsent."""
        if self.is_full and len(self._transport.output) <= LOW_WATER_BYTES:
            self.is_full = False
            self.protocol.resume_writing()

    def mute(self, *, is_muted: bool) -> None:
        """Discard what is written: the client has it."""
        self._is_muted = is_muted

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self.settle_soon()

    def switch(self, protocol: Any) -> None:
        """Another protocol serves it from here on."""
        if not isinstance(protocol, Adapter):
            protocol = Staying(protocol, f"a {type(protocol).__name__} cannot move")
        self.protocol = protocol
        self.became(protocol.kind)

    def became(self, kind: Kind) -> None:
        if kind is not self.kind:
            self.kind = kind
            self._host.became(self)

    def is_closing(self) -> bool:
        return self.is_left or self._transport.phase is not _OPEN or self._transport.error is not None

    def close(self) -> None:
        """Send what is unsent, then FIN; the protocol hears of it once its bytes are on their way."""
        if not self.is_left and self._course is not Course.FROZEN:
            self._transport.flush()
            self.leave()
            self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        if self._course is not Course.FROZEN:
            self._transport.abort()
            self._loop.call_soon(self._lose, None)

    def _lose(self, problem: Exception | None) -> None:
        if self._is_lost or self.protocol is None or (self._course is Course.FROZEN and not self.is_left):
            return  # whoever goes on with a frozen one finds out himself
        self._is_lost = True
        self.protocol.connection_lost(problem)
        if not self.is_left:
            self.leave()

    # ---- for the runtime

    def restore(self, record: Record, state: Any) -> None:
        super().restore(record, self)
        self.brought = state

    def stop(self) -> None:
        if self.protocol is not None and not self.is_left and self._course in (Course.RUNNING, Course.ASKED):
            self.protocol.shutdown()

    def deliver(self, act: int, data: bytes | bytearray | memoryview) -> None:
        if act == Act.SEND:
            self.write(data)
        elif act == Act.CLOSE:
            self.stop()
        else:
            self.abort()

    def begin(self, protocol: Any) -> None:
        """Be served by *protocol* from here on, from the restored state if there is one."""
        if self._carried & RecordFlag.INTERRUPTED:
            # What the client sent or was sent is lost, and neither HTTP nor WebSocket can agree anew.
            self.abort()
            return
        self.protocol = protocol
        try:
            protocol.connection_made(self.face)
            self.became(protocol.kind)
            if self.resumed:
                protocol.thaw(self.brought)
        except Exception:
            log.exception("connection=%d its protocol could not begin", self.cookie)
            self.abort()
        if self._transport.error is not None:  # before anybody was there to hear of it
            self._loop.call_soon(self._lose, self._transport.error)
        self.settle_soon()

    def encode(self) -> bytes:
        """Return what its successor needs: exactly where it is halted, else as it was at its last boundary."""
        if self.is_left:
            return b""
        if self.protocol is None:
            return self.brought
        is_halted = self._course in (Course.HALTED, Course.FROZEN)
        encoded: bytes = self.protocol.freeze() if is_halted else self.protocol.snapshot()
        return encoded
