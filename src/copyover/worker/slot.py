"""
Where this worker writes down how far its connections are, so that another can go on when it is killed.

It writes when it is told to and decides what is left out; when a connection stands at a boundary is boundary's
business, what the bytes mean is that of slots. Nothing here raises into a handler.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from typing import TYPE_CHECKING, Any

from copyover import slots
from copyover.errors import WireError
from copyover.messages import Record, RecordFlag
from copyover.worker.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.worker.transport import Transport

log = logging.getLogger("copyover.worker")

_ALLOCATED_BYTES = 64 << 10  # at a time
_LONGEST_REST = 256
_NOTHING = object()
_FINISHED = int(RecordFlag.FINISHED)  # to look one up in its enum takes as long as a recount


def register(descriptor: int) -> None:
    """
    Say that this process is the worker of the file, by a lock that ends with it; forked children do not have it.

    The file's descriptors stay open from here on: closing any of them would give up the lock. fcntl_locking(2)
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:  # it is for a new holder's sake; we serve all the same
        log.warning("event=slots problem=%r", f"the file of slots cannot be locked: {problem.strerror}")


def reshape(descriptor: int, slot_bytes: int) -> None:
    """
    Give the file other slots, as many as it has; before Slots are made of it, and if it is empty.

    It is one of holes: what it takes is what is written. The holder reads its shape from it when we are dead.

    Raises:
        OSError: the file cannot be so large; it is as before.
        WireError: it is no file of ours.

    """
    was = slots.read_header(os.pread(descriptor, slots.HEADER_BYTES, 0))
    header = slots.shape(slot_bytes, was.slots, worker=was.worker, generation=was.generation)
    os.ftruncate(descriptor, header.file_bytes)
    os.pwrite(descriptor, header.pack(), 0)


class Slots:
    """
    The file of slots of this worker.

    Raises:
        WireError: it is no file of ours, or of a version that this release does not write.

    """

    def __init__(self, descriptor: int, encode: Callable[[Any], bytes], *, is_json: bool, schema: int) -> None:
        self._descriptor = descriptor
        self._encode = encode
        self.is_json = is_json
        self.schema = schema
        self._header = slots.read_header(os.pread(descriptor, slots.HEADER_BYTES, 0))
        if os.fstat(descriptor).st_size < self._header.file_bytes:
            raise WireError("the file of slots is shorter than its header says")
        self._memory = memoryview(mmap.mmap(descriptor, self._header.file_bytes))
        self._words = self._memory.cast("Q")
        self._free: list[Slot] = []
        self._used = 0
        self._allocated = 0
        self._complaints: set[str] = set()
        self.unslotted = 0  # connections that are served without one

    def reserve(self) -> Slot | None:
        """Return a slot that is nobody's yet; None if there is none left."""
        if self._free:
            return self._free.pop()
        room_bytes = self._room_for_another()
        if room_bytes is None:
            self.unslotted += bool(self._header.slots)
            return None
        slot = Slot(self, self._memory, self._words, self._used, self._header.slot_bytes)
        slot.room_bytes = room_bytes
        self._used += 1
        return slot

    def take(self, cookie: int, epoch: int, record: Record) -> Slot | None:
        """Return a slot that says *record* already; None if there is none left."""
        slot = self.reserve()
        if slot is not None:
            slot.open(cookie, epoch, record)
        return slot

    def snapshot(self) -> Snapshot:
        return Snapshot(self._encode, is_json=self.is_json)

    def _room_for_another(self) -> int | None:
        if self._used >= self._header.slots:
            if self._header.slots:
                self.complain(
                    f"all {self._header.slots} slots are taken; further connections are reset if it is killed"
                )
            return None
        return self.make_room(self._used, 0)

    def make_room(self, place: int, wanted_bytes: int) -> int | None:
        """
        Have the memory for *wanted_bytes* in each half; return how many there is for, None if there is none.

        It is had before it is written: without it a full file system kills the process with SIGBUS. mmap(2)
        """
        if self._header.slot_bytes > slots.PAGE_BYTES:
            room_bytes, spans = slots.spans(self._header.slot_bytes, place, wanted_bytes)
            return room_bytes if all(self._allocate(start, end) for start, end in spans) else None
        end = slots.HEADER_BYTES + (place + 1) * self._header.slot_bytes
        if end > self._allocated:
            upto = min(max(end, self._allocated + _ALLOCATED_BYTES), self._header.file_bytes)
            if not self._allocate(self._allocated, upto):
                return None
            self._allocated = upto
        return slots.capacity(self._header.slot_bytes)

    def _allocate(self, start: int, end: int) -> bool:
        try:
            os.posix_fallocate(self._descriptor, start, end - start)
        except OSError as problem:
            self.complain(f"the runtime directory has no room for slots ({problem.strerror}); mount it larger")
            return False
        return True

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot)

    def complain(self, problem: str) -> None:
        """Say it once: it may be so of every connection, at every boundary."""
        if problem not in self._complaints and len(self._complaints) < _LONGEST_REST:
            self._complaints.add(problem)
            log.warning("event=slots problem=%r", problem)


class Slot(slots.Pen):
    """The slot of one connection; when it is saved is boundary's business."""

    __slots__ = ("_counted", "_held", "_most_bytes", "_place", "_rest", "_slots", "_snapshot", "_waits", "epoch")

    def __init__(self, file: Slots, memory: memoryview, words: memoryview, place: int, slot_bytes: int) -> None:
        super().__init__(memory, words, place, slot_bytes)
        self._slots = file
        self._place = place
        self._most_bytes = self.room_bytes  # when all of it is there
        self._snapshot = file.snapshot()
        self.epoch = 0
        self._counted = (0, 0, 0)  # received, sent and unsent bytes, as they were saved
        # The state that each half holds, if it holds nothing else but counts.
        self._held: list[object] = [_NOTHING, _NOTHING]
        self._rest = 0  # how many boundaries go by before its state is tried again
        self._waits = 0

    def open(self, cookie: int, epoch: int, record: Record) -> None:
        """Be the slot of this connection, and say what *record* says."""
        self.save_record(record, epoch)
        self.name(cookie)

    def save(self, transport: Transport, state: object, flags: int = 0) -> None:
        """Say that the connection stands at a boundary with this."""
        encoded = b"" if flags & _FINISHED else self._state_bytes(state)
        self._put(transport, encoded, transport.output, flags)

    def save_ahead(self, transport: Transport, encode: Callable[[], bytes]) -> None:
        """
        Say that it stands at a boundary with what *encode* returns, once the kernel has taken what is unsent.

        Until then the slot speaks of bytes that there never were, and proves nothing. It is cheaper than one that
        holds them, and as good: who is killed before the client has its answer is killed in the middle of a message.
        """
        encoded: bytes | None = None
        try:
            encoded = encode()
        except Exception as problem:  # noqa: BLE001  # whatever encode raises means that it cannot be saved
            self._slots.complain(f"a state cannot be saved: {type(problem).__name__}: {problem}")
        if encoded is not None and len(encoded) > self._most_bytes:
            self._slots.complain(f"states of more than {self._most_bytes} bytes are not saved: raise slot_bytes")
            encoded = None
        self._put(transport, encoded, b"", 0, len(transport.output))

    def _put(  # at each boundary: keywords cost
        self, transport: Transport, encoded: bytes | None, unsent: bytes | bytearray, flags: int, ahead: int = 0
    ) -> None:
        received, sent = transport.received, transport.sent + ahead
        half = ~self.sequence & 1
        is_more = flags or unsent or transport.input or transport.held
        if encoded is self._held[half] and not is_more:  # bytes came and went: so it is at nearly each boundary
            self._counted = (received, sent, 0)
            self.recount(received, sent)
            return
        counted = (received, sent, len(unsent))
        if counted == self._counted and encoded is self._held[half ^ 1] and not (flags or self.is_touched):
            return  # it says so already
        self._counted = counted
        self._held[half] = _NOTHING if is_more else encoded
        unread = transport.unread
        if self.room_bytes < self._most_bytes:
            self._grow(len(encoded or b""), len(unsent), len(unread))
            if encoded is not None and len(encoded) > self.room_bytes:
                self._held[half] = _NOTHING  # it is left out
        self.publish(received, sent, self.epoch, flags, self._slots.schema, unread, unsent, encoded)

    def save_record(self, record: Record, epoch: int) -> None:
        """Say what *record* says, at *epoch*."""
        self.move_to(epoch)
        self._counted = (record.received, record.sent, len(record.unsent))
        flags = record.flags & slots.KEPT_FLAGS
        unread, unsent, state = record.unread, record.unsent, record.state
        if self.room_bytes < self._most_bytes:
            self._grow(len(state), len(unsent), len(unread))
        self.publish(record.received, record.sent, epoch, flags, record.schema, unread, unsent, state)

    def begin(self, state: object, record: Record) -> None:
        """It was saved from *record*, and *state* was made from that: there is nothing to save before it changes."""
        if self._slots.is_json and record.schema == self._slots.schema and not record.flags & slots.KEPT_FLAGS:
            self._snapshot.begin(state, record.state)
            if not (record.unread or record.unsent) and len(record.state) <= self.room_bytes:
                self._held[self.sequence & 1] = record.state

    def encoded(self, state: object) -> bytes | None:
        """Return *state* as bytes if it is as it was saved, None if it has to be encoded."""
        return self._snapshot.encoded(state) if self._slots.is_json else None

    def is_behind(self, transport: Transport) -> bool:
        """Whether bytes came or went since it was saved."""
        return self._counted != (transport.received, transport.sent, len(transport.output)) or self.is_touched

    def move_to(self, epoch: int) -> None:
        """Be of *epoch* from the next save on."""
        self.epoch = epoch
        self._held = [_NOTHING, _NOTHING]

    def free(self) -> None:
        """It is the next connection's: to make a slot takes longer than all that a short connection writes there."""
        self.name(0)
        self._snapshot.forget()
        self._rest = self._waits = 0
        self._slots.give_back(self)

    def _grow(self, *blobs: int) -> None:
        """Have room for those of the blobs that publish will take: it leaves out what a whole slot has no room for."""
        if sum(blobs) <= self.room_bytes:
            return
        wanted_bytes = 0
        for length in blobs:
            if wanted_bytes + length <= self._most_bytes:
                wanted_bytes += length
        if wanted_bytes > self.room_bytes:
            self.room_bytes = self._slots.make_room(self._place, wanted_bytes) or self.room_bytes

    def _state_bytes(self, state: object) -> bytes | None:
        """Return the state, None if it does not fit; one that does not is left alone for more and more boundaries."""
        if self._rest:
            self._rest -= 1
            return None
        try:
            encoded = self._snapshot.take(state)
        except Exception as problem:  # noqa: BLE001  # whatever encode raises means that it cannot be saved
            self._slots.complain(f"a state cannot be saved: {type(problem).__name__}: {problem}")
        else:
            if len(encoded) <= self._most_bytes:
                self._waits = 0
                return encoded
            self._slots.complain(f"states of more than {self._most_bytes} bytes are not saved: raise slot_bytes")
        self._waits = min(2 * self._waits + 1, _LONGEST_REST)
        self._rest = self._waits
        return None
