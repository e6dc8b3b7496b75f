"""
Which bytes a slot is: where a connection stood at its last boundary, readable when its worker is dead.

It opens no file and believes nothing that it reads: the writer may have died anywhere, or lie.

A file is a header page and slots. A slot has two halves; what is new goes into the half that does not count, and one
aligned store of eight bytes then makes it the one that does. Numbers are in the machine's byte order, because such a
store is. ``docs/protocol.md`` is the reference; the golden bytes in ``tests/test_slots.py`` hold each released version.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

import attrs

from copyover.errors import WireError
from copyover.messages import RecordFlag

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 1
MAGIC = b"coslots\0"
PAGE_BYTES = 4096  # of the file; where the machine's are larger, more of it is there than was asked for
HEADER_BYTES = PAGE_BYTES  # so that slots lie as the pages do
SMALLEST_BYTES = 256
DEFAULT_BYTES = 1024
LARGEST_BYTES = 1 << 20
MOST_SLOTS = 1 << 20

_HEADER = struct.Struct("=8sIIIIQ")  # magic, version, bytes of a slot, slots, generation, worker
PREFIX_BYTES = 16  # of a slot: cookie, publish word
_HALF = struct.Struct("=QQQIHHIII4x")  # sequence, received, sent, epoch, flags, schema, the lengths of the three blobs
_HALF_BYTES = _HALF.size
_pack = _HALF.pack_into
_UNITS = struct.Struct("=QQ")
_ROOM_UNIT = 16  # a slot is a multiple of it, so that both halves are aligned

TOUCHED = 1 << 63  # of the publish word: the socket was used since, and nobody can tell how far it came
_LEFT_OUT_UNREAD, _LEFT_OUT_UNSENT, _LEFT_OUT_STATE = 0x100, 0x200, 0x400
KEPT_FLAGS = RecordFlag.WRITE_CLOSED | RecordFlag.FINISHED | RecordFlag.INTERRUPTED | RecordFlag.FRESH
_KNOWN_FLAGS = KEPT_FLAGS | _LEFT_OUT_UNREAD | _LEFT_OUT_UNSENT | _LEFT_OUT_STATE


@attrs.frozen
class Header:
    """The first page of a file. Without slots the file is the register of a living worker, and nothing more."""

    slot_bytes: int
    slots: int
    worker: int
    generation: int

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.slots * self.slot_bytes

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.slot_bytes, self.slots, self.generation, self.worker)


def shape(slot_bytes: int, slots: int, *, worker: int, generation: int) -> Header:
    """Return the header of a new file; *slot_bytes* is rounded up to what aligns both halves, 0 makes no slots."""
    rounded = -(-slot_bytes // _ROOM_UNIT) * _ROOM_UNIT
    return Header(rounded, min(slots, MOST_SLOTS) if rounded else 0, worker, generation)


def least_bytes(slot_bytes: int) -> int:
    """Return what a slot takes as soon as it is written: all of a small one, two pages of others."""
    return min(slot_bytes, 2 * PAGE_BYTES)


def read_header(page: bytes) -> Header:
    """
    Read the first bytes of a file.

    Raises:
        WireError: it is no file of slots, of another version, or of a shape that no file has.

    """
    if len(page) < _HEADER.size:
        raise WireError(f"a file of slots has {len(page)} bytes, its header needs {_HEADER.size}")
    magic, version, slot_bytes, slots, generation, worker = _HEADER.unpack_from(page)
    if magic != MAGIC:
        raise WireError(f"a file of slots starts with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"slots of version {version} cannot be read; this release has {VERSION}")
    is_sane = SMALLEST_BYTES <= slot_bytes <= LARGEST_BYTES and slot_bytes % _ROOM_UNIT == 0 and slots <= MOST_SLOTS
    if slots and not is_sane:
        raise WireError(f"a file of {slots} slots of {slot_bytes} bytes is none of ours")
    return Header(slot_bytes, slots, worker, generation)


def capacity(slot_bytes: int) -> int:
    """Return how many bytes of unread input, unsent output and state one half holds together."""
    return _half_bytes(slot_bytes) - _HALF.size


def _half_bytes(slot_bytes: int) -> int:
    return (slot_bytes - PREFIX_BYTES) // _ROOM_UNIT * _ROOM_UNIT // 2


def spans(slot_bytes: int, place: int, wanted_bytes: int) -> tuple[int, list[tuple[int, int]]]:
    """
    Return what of the file has to be there for *wanted_bytes* in either half, in whole pages.

    And first how many bytes each half then holds: the rest of its last page is there, too.
    """
    first = HEADER_BYTES + place * slot_bytes
    upper, lower = first + PREFIX_BYTES, first + PREFIX_BYTES + _half_bytes(slot_bytes)
    room_bytes = most_bytes = capacity(slot_bytes)
    found = []
    for start, half in ((first, upper), (lower, lower)):
        blobs = half + _HALF_BYTES
        pages = -(-(blobs + min(wanted_bytes, most_bytes)) // PAGE_BYTES)
        end = min(pages * PAGE_BYTES, first + slot_bytes)
        room_bytes = min(room_bytes, end - blobs)
        found.append((start, end))
    return room_bytes, found


# ---- writing


class Pen:
    """
    Writes one slot, at *place* of *buffer*; *words* is the same buffer as numbers of eight bytes.

    Only ``words`` stores eight bytes at once: struct's ``=Q`` goes byte by byte, and tears.
    """

    __slots__ = ("_buffer", "_halves", "_word", "_words", "room_bytes", "sequence")

    def __init__(self, buffer: memoryview, words: memoryview, place: int, slot_bytes: int) -> None:
        first = HEADER_BYTES + place * slot_bytes
        half_bytes = _half_bytes(slot_bytes)
        self._buffer = buffer
        self._words = words
        self._word = first // 8 + 1
        self._halves = first + PREFIX_BYTES, first + PREFIX_BYTES + half_bytes
        self.room_bytes = half_bytes - _HALF_BYTES
        self.sequence = 0

    def name(self, cookie: int) -> None:
        """Say whose slot it is, once something is published; 0 frees it."""
        self._words[self._word - 1] = cookie

    def touch(self) -> None:
        """Mark that the socket is about to be used; the next publish takes the mark away."""
        self._words[self._word] = self.sequence | TOUCHED

    @property
    def is_touched(self) -> bool:
        return bool(self._words[self._word] & TOUCHED)

    def publish(  # noqa: PLR0917  # a half, in its order; keywords cost a fifth of the time
        self,
        received: int,
        sent: int,
        epoch: int,
        flags: int,
        schema: int,
        unread: bytes | bytearray,
        unsent: bytes | bytearray,
        state: bytes | None,
    ) -> None:
        """Make this what counts; of the blobs as much as fits, the state first. None is a state that is left out."""
        sequence = self.sequence + 1
        start = self._halves[sequence & 1]
        at = start + _HALF_BYTES
        room = self.room_bytes
        state_bytes, unsent_bytes, unread_bytes = len(state or b""), len(unsent), len(unread)
        if state is None or state_bytes > room:
            flags |= _LEFT_OUT_STATE
        elif state_bytes:
            self._buffer[at : at + state_bytes] = state
            at += state_bytes
            room -= state_bytes
        if unsent_bytes > room:
            flags |= _LEFT_OUT_UNSENT
        elif unsent_bytes:
            self._buffer[at : at + unsent_bytes] = unsent
            at += unsent_bytes
            room -= unsent_bytes
        if unread_bytes > room:
            flags |= _LEFT_OUT_UNREAD
        elif unread_bytes:
            self._buffer[at : at + unread_bytes] = unread
        _pack(
            self._buffer, start, sequence, received, sent, epoch, flags, schema, unread_bytes, unsent_bytes, state_bytes
        )
        self.sequence = self._words[self._word] = sequence

    def recount(self, received: int, sent: int) -> None:
        """Make the other half count, with these counts and all else that it holds from before."""
        words = self._words
        sequence = self.sequence + 1
        at = self._halves[sequence & 1] >> 3
        words[at] = sequence
        words[at + 1] = received
        words[at + 2] = sent
        self.sequence = words[self._word] = sequence


# ---- reading


@attrs.frozen
class Content:
    """What a slot says of its connection. None is a blob that did not fit."""

    epoch: int
    flags: int
    schema: int
    received: int
    sent: int
    unread: bytes | None = b""
    unsent: bytes | None = b""
    unsent_bytes: int = 0  # also if they did not fit
    state: bytes | None = b""
    is_touched: bool = False


def read(slot: bytes | memoryview) -> tuple[int, Content] | None:
    """Return whose slot it is and what it says; None if it is free, or says nothing that can be believed."""
    cookie, word = _UNITS.unpack_from(slot)
    sequence = word & ~TOUCHED
    if cookie == 0 or sequence == 0:
        return None
    half_bytes = _half_bytes(len(slot))
    start = PREFIX_BYTES + (sequence & 1) * half_bytes
    written, received, sent, epoch, flags, schema, *lengths = _HALF.unpack_from(slot, start)
    unread_bytes, unsent_bytes, state_bytes = lengths
    state_at = start + _HALF.size
    unsent_at = state_at + (0 if flags & _LEFT_OUT_STATE else state_bytes)
    unread_at = unsent_at + (0 if flags & _LEFT_OUT_UNSENT else unsent_bytes)
    end = unread_at + (0 if flags & _LEFT_OUT_UNREAD else unread_bytes)
    if written != sequence or flags & ~_KNOWN_FLAGS or end > start + half_bytes:
        return None
    return cookie, Content(
        epoch=epoch,
        flags=flags & KEPT_FLAGS,
        schema=schema,
        received=received,
        sent=sent,
        unread=None if flags & _LEFT_OUT_UNREAD else bytes(slot[unread_at:end]),
        unsent=None if flags & _LEFT_OUT_UNSENT else bytes(slot[unsent_at:unread_at]),
        unsent_bytes=unsent_bytes,
        state=None if flags & _LEFT_OUT_STATE else bytes(slot[state_at:unsent_at]),
        is_touched=bool(word & TOUCHED),
    )


def named(slot: bytes) -> int:
    """Return whose slot it is, by its first bytes; 0 if it is free."""
    cookie: int = _UNITS.unpack_from(slot)[0]
    return cookie


def read_all(area: bytes, slot_bytes: int) -> Iterator[tuple[int, Content]]:
    """Read the whole slots of *area*."""
    view = memoryview(area)
    for at in range(0, len(area) - slot_bytes + 1, slot_bytes):
        found = read(view[at : at + slot_bytes])
        if found is not None:
            yield found


# ---- what the kernel says of the same connection


class TcpState(enum.IntEnum):
    """The states of an accepted connection; tcp_states.h."""

    ESTABLISHED = 1
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    CLOSING = 11


_OUR_FIN = frozenset({TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK})
_THEIR_FIN = frozenset({TcpState.CLOSE_WAIT, TcpState.CLOSING, TcpState.LAST_ACK})


class Counters(NamedTuple):
    """How many bytes applications have read and written since a TCP connection was accepted."""

    read: int
    written: int
    state: int

    @property
    def is_write_closed(self) -> bool:
        """Our FIN is sent, or queued behind what was written."""
        return self.state in _OUR_FIN

    @property
    def is_closed(self) -> bool:
        """Both ends have ended it, or a reset did: the counts prove nothing then."""
        return self.state in (TcpState.CLOSE, TcpState.TIME_WAIT)


def count(state: int, *, acked: int, arrived: int, unread: int, unacked: int) -> Counters:
    """
    Return the counts without the FINs: each is one byte to the kernel.

    The peer's counts from its arrival, read or not; ours from the moment that it is queued.
    """
    return Counters(arrived - unread - (state in _THEIR_FIN), acked + unacked - (state in _OUR_FIN), state)
