"""
What a worker serves, whoever serves it: a connection that runs, is asked to halt, halted, or frozen.

It halts, exports and saves; what a boundary is, a subclass says. It reads and writes no byte.
"""

from __future__ import annotations

import abc
import enum
import time
from typing import TYPE_CHECKING, Any

import attrs

from copyover.errors import CopyoverError
from copyover.messages import Kind, Record, RecordFlag
from copyover.worker.transport import Phase

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from copyover.worker.slot import Slot
    from copyover.worker.transport import Transport


@attrs.frozen
class Limits:
    """How much of one connection is kept in memory, and how much of it travels."""

    line_bytes: int = 64 << 10
    message_bytes: int = 1 << 20
    unsent_bytes: int = 16 << 20
    record_bytes: int = 32 << 20


class CannotFreeze(CopyoverError):
    """The connection stands at a boundary and still cannot travel; the text says why."""


class Course(enum.Enum):
    RUNNING = "running"
    ASKED = "asked"  # to halt at its next boundary
    HALTED = "halted"  # stands at a boundary; pushes still reach its unsent bytes
    FROZEN = "frozen"  # its record is taken: it is inert


class Served(abc.ABC):
    """One live connection in this worker. What is halted raises nothing into the application."""

    __slots__ = (
        "_carried",
        "_course",
        "_limits",
        "_loop",
        "_on_halt",
        "_transport",
        "acts_of_others",
        "cookie",
        "halted_ns",
        "interrupted",
        "is_entered",
        "is_left",
        "kind",
        "listener",
        "on_boundary",
        "resumed",
        "slot",
        "state",
    )

    state: Any

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: Transport, *, cookie: int, listener: str, limits: Limits
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._limits = limits
        self.cookie = cookie
        self.listener = listener
        self.kind = Kind.HANDLER
        self.resumed = False
        self.interrupted = False
        self.halted_ns = 0
        self.acts_of_others: tuple[tuple[int, bytes], ...] = ()  # while it is entered; they travel on if it goes back
        self.is_entered = False  # its handler has begun here
        self.is_left = False  # nobody but its unsent bytes needs it
        # Called once, at the first boundary after it was entered.
        self.on_boundary: Callable[[Served], None] | None = None
        self.slot: Slot | None = None
        self._carried = 0  # the flags that it was restored with, until its first boundary
        self._course = Course.RUNNING
        self._on_halt: Callable[[], None] | None = None
        transport.on_change = self._changed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.cookie} on {self.listener} {self._course.value}>"

    @property
    def course(self) -> Course:
        return self._course

    @property
    def transport(self) -> Transport:
        return self._transport

    # ---- what a subclass says

    @property
    @abc.abstractmethod
    def is_at_boundary(self) -> bool:
        """Whether it may be halted now."""

    @property
    @abc.abstractmethod
    def reason(self) -> str:
        """Why it is not at a boundary, for operators."""

    @property
    def obstacle(self) -> str | None:
        """Why it will not come to a boundary soon, whatever one waits; None if it may."""
        return None

    @abc.abstractmethod
    def stop(self) -> None:
        """End at the next boundary: the server is stopping."""

    @abc.abstractmethod
    def deliver(self, act: int, data: bytes | bytearray | memoryview) -> None:
        """Do what somebody, perhaps in another worker, did to this connection."""

    @abc.abstractmethod
    def _changed(self) -> None:
        """Input came, the peer ended, or unsent bytes left."""

    def settle(self) -> None:
        """Do what waits for a boundary, if this is one."""

    # ---- halting

    def ask_to_halt(self, on_halt: Callable[[], None]) -> bool:
        """Halt at the next boundary; True when it stands at one now, else *on_halt* is called then."""
        if self.is_at_boundary:
            self._halt_now()
            return True
        self._course = Course.ASKED
        self._on_halt = on_halt
        return False

    def go_on(self) -> None:
        """Serve on, from where it was halted."""
        was_halted = self._course in (Course.HALTED, Course.FROZEN)
        self._course = Course.RUNNING
        self._on_halt = None
        if was_halted:
            self._transport.start()

    def revive(self) -> None:
        """Wait to be entered, as before its record was taken."""
        self._course = Course.RUNNING

    def abandon(self) -> None:
        """Be inert: somebody else has it."""
        self._course = Course.FROZEN

    def leave(self) -> None:
        """Only what is unsent is still to do, by whoever has it."""
        self.is_left = True
        if self.on_boundary is not None:
            self._arrive()
        self._save()
        self._transport.finish()
        if self._course is Course.ASKED and self._transport.phase is not Phase.CLOSED:
            self._halt_and_say()

    def _halt_now(self) -> None:
        self._course = Course.HALTED
        self.halted_ns = time.monotonic_ns()
        self._transport.pause()

    def _halt_and_say(self) -> None:
        self._halt_now()
        if self._on_halt is not None:
            self._on_halt()

    def _arrive(self) -> None:
        """A boundary: everything before it is complete."""
        self._carried = 0
        if self.on_boundary is not None:
            arrived, self.on_boundary = self.on_boundary, None
            arrived(self)

    # ---- its slot

    def move_slot(self, epoch: int) -> None:
        """Go on at a later epoch, from where it was frozen."""
        if self.slot is not None:
            self.slot.move_to(epoch)
            self._save()

    def leave_slot(self) -> None:
        """It is this worker's no more."""
        if self.slot is not None:
            self.slot.free()
            self.slot = None

    def _save(self) -> None:
        if self.slot is not None and self._transport.phase is not Phase.CLOSED:
            self.slot.save(self._transport, self.state, self._flags)

    # ---- its record

    @property
    def _flags(self) -> int:
        """What a record of it says."""
        flags = self._carried
        if self.is_left or self._transport.phase is not Phase.OPEN:  # closed by another task while it was at a boundary
            flags |= RecordFlag.FINISHED
        if self._transport.phase is Phase.LINGERING:
            flags |= RecordFlag.WRITE_CLOSED
        return int(flags)

    def export(self, *, schema: int, state: bytes) -> Record:
        """
        Take its record; from here it is inert.

        Raises:
            CannotFreeze: it is larger than the record quota.

        """
        transport = self._transport
        unread = transport.unread
        size = len(unread) + len(transport.output) + len(state)
        if size > self._limits.record_bytes:
            raise CannotFreeze(f"its record of {size} bytes is over the quota of {self._limits.record_bytes}")
        self._course = Course.FROZEN
        return Record(
            kind=self.kind,
            flags=self._flags,
            schema=schema,
            received=transport.received,
            sent=transport.sent,
            halted_ns=self.halted_ns,
            unread=unread,
            unsent=bytes(transport.output),
            state=state,
        )

    def restore(self, record: Record, state: Any) -> None:
        """Become what *record* says, paused."""
        phase = Phase.OPEN
        if record.flags & RecordFlag.FINISHED:
            phase = Phase.LINGERING if record.flags & RecordFlag.WRITE_CLOSED else Phase.FINISHING
            self.is_left = True
        self._transport.restore(record, phase)
        self.state = state
        self._carried = record.flags & (RecordFlag.INTERRUPTED | RecordFlag.FRESH)
        self.interrupted = bool(record.flags & RecordFlag.INTERRUPTED)
        self.resumed = self.interrupted or not record.flags & RecordFlag.FRESH
