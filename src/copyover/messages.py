"""
What holder and worker say to each other: one table of messages, and the record that travels beside a descriptor.

It knows no bytes: how a message is packed is wire's business.
"""

from __future__ import annotations

import enum
import functools
import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import attrs

from copyover.columns import Blobs, Column, join, picker
from copyover.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_DESCRIPTORS = 253  # a message: SCM_MAX_FD. unix(7)
MAX_ROWS = 4096  # a packet of columns stays well below the packet size
MAX_CHUNK_BYTES = 64 << 20  # of the records of one message

T = TypeVar("T", bound="Message")


class How(enum.IntEnum):
    """How a connection ended."""

    CLOSED = 0  # the handler returned or closed it
    RESET = 1  # the peer reset it, or it timed out
    ABORTED = 2  # the handler aborted it, or failed
    EXPIRED = 3  # its retiring generation reached the drain limit
    STOPPED = 4  # the server is stopping


class Act(enum.IntEnum):
    """What somebody does to a connection that is another worker's by now."""

    SEND = 0
    CLOSE = 1  # send what is unsent, then FIN
    ABORT = 2  # RST


class Kind(enum.IntEnum):
    """What a connection is served as."""

    HANDLER = 0  # by a handler of the application
    HTTP = 1  # requests, one after the other
    WEBSOCKET = 2
    STREAM = 3  # one response that goes on and on


class Doing(enum.IntEnum):
    """What a worker does with a connection while no holder lives."""

    SERVES = 0
    FROZE = 1  # the record is what it was frozen with
    WAITS = 2  # it was given the record, and was not told to enter


class RecordFlag(enum.IntEnum):
    """What else a record says about its connection; numbers, since arithmetic on an IntFlag costs a whole save."""

    WRITE_CLOSED = 1  # our FIN is sent, or is to be sent after the unsent bytes
    FINISHED = 2  # the handler has returned: send what is unsent, then close
    UNSERVED = 4  # thaw only: nobody served it since you froze it; use your own record and coroutine
    CUT = 8  # thaw only: part of a consistent cut, entered with all the others of it
    INTERRUPTED = 16  # its worker was killed away from a boundary: what came and went since the last one is lost
    FRESH = 32  # no boundary was reached since it was accepted: it has no state, the handler begins


@attrs.frozen
class Record:
    """
    What travels beside a descriptor.

    *kind* is a Kind. *received* and *sent* count the bytes that were read from and accepted by the kernel since the
    connection was accepted; *halted_ns* is CLOCK_MONOTONIC at the moment it stopped being served.
    """

    kind: int = 0
    flags: int = 0
    schema: int = 0
    received: int = 0
    sent: int = 0
    halted_ns: int = 0
    unread: bytes = b""
    unsent: bytes = b""
    state: bytes = b""

    @property
    def size_bytes(self) -> int:
        return len(self.unread) + len(self.unsent) + len(self.state)


RECORD_FIELDS = tuple(field.name for field in attrs.fields(Record))


def column(code: str) -> Any:
    """Declare a column: one number of the struct code *code* a row."""
    return attrs.field(factory=tuple, metadata={"column": code})


def blob() -> Any:
    """Declare a blob: opaque bytes of any length, one a row."""
    return attrs.field(factory=tuple, metadata={"blob": True})


def rare(kind: type) -> Any:
    """Declare a value of the JSON part, of the JSON type *kind*."""
    return attrs.field(metadata={"rare": kind})


@attrs.frozen(kw_only=True)
class Message:
    """One message. Columns and blobs of one message have one length, the number of its rows."""

    KIND: ClassVar[int] = 0
    CARRIES_DESCRIPTORS: ClassVar[bool] = False  # one a row

    @property
    def rows(self) -> int:
        fields = self._row_fields()
        return len(getattr(self, fields[0])) if fields else 0

    @classmethod
    @functools.cache
    def _row_fields(cls) -> tuple[str, ...]:
        return tuple(field.name for field in attrs.fields(cls) if "rare" not in field.metadata)

    def only(self, places: Sequence[int]) -> Self:
        """Return the message with the rows at *places*, in that order."""
        pick = picker(places)
        return attrs.evolve(self, **{name: pick(getattr(self, name)) for name in self._row_fields()})


@attrs.frozen(kw_only=True)
class Records(Message):
    """The columns of records: a batch by itself, or part of a message that carries records."""

    kind: Sequence[int] = column("B")
    flags: Sequence[int] = column("B")
    schema: Sequence[int] = column("H")
    received: Sequence[int] = column("Q")
    sent: Sequence[int] = column("Q")
    halted_ns: Sequence[int] = column("Q")
    unread: Sequence[bytes] = blob()
    unsent: Sequence[bytes] = blob()
    state: Sequence[bytes] = blob()
    cookie: Sequence[int] = column("Q")  # whose they are

    def records(self) -> Iterator[Record]:
        return map(Record, *(getattr(self, name) for name in RECORD_FIELDS))

    def record_of(self, cookie: int) -> Record:
        place = self.cookie.index(cookie)
        return Record(*(getattr(self, name)[place] for name in RECORD_FIELDS))

    def columns(self) -> dict[str, Sequence[Any]]:
        """Return the records as keyword arguments of another message that carries them."""
        return {name: getattr(self, name) for name in ("cookie", *RECORD_FIELDS)}

    def flagged(self, *, is_cut: bool) -> Sequence[int]:
        """Return the flags, with CUT or without."""
        return Column("B", bytes(self.flags).translate(_WITH_CUT if is_cut else _WITHOUT_CUT))

    @property
    def size_bytes(self) -> int:
        """Return how many bytes all blobs have together."""
        return sum(len(Blobs.of(blobs).joined) for blobs in (self.unread, self.unsent, self.state))


_WITHOUT_CUT = bytes(flags & ~RecordFlag.CUT for flags in range(256))
_WITH_CUT = bytes(flags | RecordFlag.CUT for flags in range(256))


def record_chunks(records: Sequence[Record], most_rows: int) -> Iterator[slice]:
    """Cut records into packets of at most so many rows and about 64 MiB, each at least one row."""
    start, size = 0, 0
    for place, record in enumerate(records):
        if place > start and (place - start == most_rows or size + record.size_bytes > MAX_CHUNK_BYTES):
            yield slice(start, place)
            start, size = place, 0
        size += record.size_bytes
    if start < len(records):
        yield slice(start, len(records))


def record_packets(cookies: Sequence[int], batches: Sequence[Records]) -> Iterator[Records]:
    """
    Return the records of *cookies*, each out of its batch, as packets of at most MAX_ROWS rows and about 64 MiB.

    A batch of which all are wanted, one after the other, is passed on as it is, however large it came.
    """
    waiting: list[Records] = []
    number = size_bytes = 0
    for part in _parts(cookies, batches):
        number, size_bytes = number + part.rows, size_bytes + part.size_bytes
        if waiting and (number > MAX_ROWS or size_bytes > MAX_CHUNK_BYTES):
            yield _joined(waiting)
            waiting, number, size_bytes = [], part.rows, part.size_bytes
        waiting.append(part)
    if waiting:
        yield _joined(waiting)


def _parts(cookies: Sequence[int], batches: Sequence[Records]) -> Iterator[Records]:
    start = 0
    for _, run in itertools.groupby(map(id, batches)):  # to compare them would be to compare all their rows
        end = start + len(list(run))
        batch, wanted = batches[start], cookies[start:end]
        if tuple(batch.cookie) == tuple(wanted):
            yield batch
        else:
            places = {cookie: place for place, cookie in enumerate(batch.cookie)}
            yield batch.only([places[cookie] for cookie in wanted])
        start = end


def _joined(parts: Sequence[Records]) -> Records:
    if len(parts) == 1:
        return parts[0]
    columns = [part.columns() for part in parts]
    return Records(**{name: join([column[name] for column in columns]) for name in columns[0]})


def record_columns(records: Sequence[Record]) -> dict[str, Sequence[Any]]:
    """Turn rows into the keyword arguments of a message that carries records."""
    return {name: tuple([getattr(record, name) for record in records]) for name in RECORD_FIELDS}


# ---- worker to holder


@attrs.frozen(kw_only=True)
class Hello(Message):
    """The first packet of a worker. Its layout is the same in every version of the wire."""

    KIND: ClassVar[int] = 1
    wire: list[int] = rare(list)
    record: list[int] = rare(list)
    copyover: str = rare(str)
    python: str = rare(str)
    pid: int = rare(int)
    worker: int = rare(int)
    instance: str = rare(str)


@attrs.frozen(kw_only=True)
class Ready(Message):
    """The application's startup has returned and the listeners are adopted."""

    KIND: ClassVar[int] = 2
    application: str = rare(str)
    loop: str = rare(str)
    writes: int = rare(int)  # the schema of the states that it writes
    reads: list[int] = rare(list)  # the schemas that it can read
    shares: bool = rare(bool)  # it exports and imports shared state
    interface: str = rare(str)  # what it serves: "handler", "asgi", or "listeners": asgi that takes no connections


@attrs.frozen(kw_only=True)
class Failed(Message):
    """The worker cannot go on, and says why before it exits."""

    KIND: ClassVar[int] = 3
    reason: str = rare(str)
    status: int = rare(int)


@attrs.frozen(kw_only=True)
class Lend(Message):
    """Accepted connections, one descriptor a row, before the first byte of any is read."""

    KIND: ClassVar[int] = 4
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    cookie: Sequence[int] = column("Q")
    listener: Sequence[int] = column("H")
    kind: Sequence[int] = column("B")


@attrs.frozen(kw_only=True)
class Release(Message):
    """These connections have ended."""

    KIND: ClassVar[int] = 5
    cookie: Sequence[int] = column("Q")
    epoch: Sequence[int] = column("I")
    how: Sequence[int] = column("B")


@attrs.frozen(kw_only=True)
class AcceptOffAck(Message):
    """No lend follows this one until accept_on; *number* is that of the accept_off."""

    KIND: ClassVar[int] = 6
    number: int = rare(int)


@attrs.frozen(kw_only=True)
class Staged(Message):
    """So many connections were staged here so far."""

    KIND: ClassVar[int] = 7
    total: int = rare(int)


@attrs.frozen(kw_only=True)
class Frozen(Records):
    """Stopped at a boundary. *batch* names the freeze whose first answer this is, 0 for later ones."""

    KIND: ClassVar[int] = 8
    batch: int = rare(int)
    epoch: Sequence[int] = column("I")


@attrs.frozen(kw_only=True)
class Refused(Message):
    """These cannot be frozen, or cannot be thawed; the sender's side of them is as if it had never been asked."""

    KIND: ClassVar[int] = 9
    cookie: Sequence[int] = column("Q")
    epoch: Sequence[int] = column("I")
    reason: Sequence[bytes] = blob()


@attrs.frozen(kw_only=True)
class Gathered(Message):
    """All that could stop has stopped and is sent; *shared* is the application's shared state, if it has one."""

    KIND: ClassVar[int] = 10
    shared: Sequence[bytes] = blob()


@attrs.frozen(kw_only=True)
class Adopted(Message):
    """Served by the sender from now on; queued before the first byte that it serves."""

    KIND: ClassVar[int] = 11
    cookie: Sequence[int] = column("Q")
    epoch: Sequence[int] = column("I")
    pause_us: Sequence[int] = column("I")


@attrs.frozen(kw_only=True)
class Forward(Message):
    """Somebody here pushed to these, or ended them, after they were frozen here: whoever has them does it."""

    KIND: ClassVar[int] = 12
    cookie: Sequence[int] = column("Q")
    act: Sequence[int] = column("B")
    pushed: Sequence[bytes] = blob()


@attrs.frozen(kw_only=True)
class Attach(Message):
    """
    To a new holder, once it asked: who this worker is, and the listeners that it has, one descriptor a row.

    *key* is the secret of the holder's name. *is_committed*: its generation was told to serve, other than by a move
    that is still under way.
    """

    KIND: ClassVar[int] = 13
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    key: str = rare(str)
    generation: int = rare(int)
    directory: str = rare(str)
    python: str = rare(str)
    app_dir: str = rare(str)
    application: str = rare(str)
    loop: str = rare(str)
    writes: int = rare(int)
    reads: list[int] = rare(list)
    shares: bool = rare(bool)
    interface: str = rare(str)
    is_committed: bool = rare(bool)
    is_leaving: bool = rare(bool)  # it retires, or stops
    names: dict[str, str] = rare(dict)  # as in welcome
    listener: Sequence[int] = column("H")


@attrs.frozen(kw_only=True)
class View(Records):
    """
    What this worker does with its connections, one descriptor a row.

    *standing* is a Doing, records are as in frozen; of what is served the kind alone is told.
    """

    KIND: ClassVar[int] = 14
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    epoch: Sequence[int] = column("I")
    listener: Sequence[int] = column("H")
    standing: Sequence[int] = column("B")


@attrs.frozen(kw_only=True)
class Viewed(Message):
    """That was all; *cookie* are the tombstones: what has ended here since the move began."""

    KIND: ClassVar[int] = 15
    cookie: Sequence[int] = column("Q")


@attrs.frozen(kw_only=True)
class Became(Message):
    """From here on the sender serves these as something else; *kind* is a Kind."""

    KIND: ClassVar[int] = 16
    cookie: Sequence[int] = column("Q")
    epoch: Sequence[int] = column("I")
    kind: Sequence[int] = column("B")


@attrs.frozen(kw_only=True)
class Cede(Records):
    """A retiring worker gives up what it had kept: at a boundary now, it stopped there. Who serves is to take it."""

    KIND: ClassVar[int] = 17
    epoch: Sequence[int] = column("I")


# ---- holder to worker


@attrs.frozen(kw_only=True)
class Welcome(Message):
    """The listeners to accept from, one descriptor a row, and what to run."""

    KIND: ClassVar[int] = 32
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    wire: int = rare(int)
    generation: int = rare(int)
    names: dict[str, str] = rare(dict)  # of all listeners that a connection may be of, by their numbers
    application: str = rare(str)
    app_dir: str = rare(str)
    options: dict[str, Any] = rare(dict)  # loop, limits; unknown keys are ignored
    listener: Sequence[int] = column("H")


@attrs.frozen(kw_only=True)
class LendAck(Message):
    """The holder owns a copy of so many of the connections lent on this channel, counted from its start."""

    KIND: ClassVar[int] = 33
    total: int = rare(int)


@attrs.frozen(kw_only=True)
class AcceptOn(Message):
    """Accept. With *moving* it is a replacement's part of a move, and says nothing of how that ends."""

    KIND: ClassVar[int] = 34
    moving: bool = rare(bool)


@attrs.frozen(kw_only=True)
class AcceptOff(Message):
    """Stop accepting, and say so behind the last lend. With *moving* a move begins: no garbage collection."""

    KIND: ClassVar[int] = 35
    number: int = rare(int)
    moving: bool = rare(bool)


@attrs.frozen(kw_only=True)
class Stage(Message):
    """Build these, paused; one descriptor a row."""

    KIND: ClassVar[int] = 36
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    cookie: Sequence[int] = column("Q")
    listener: Sequence[int] = column("H")


@attrs.frozen(kw_only=True)
class Freeze(Message):
    """
    Stop these at their boundaries; exactly one answer for each: frozen, refused, or the release that crosses.

    With *gather_ms* above 0 all that can stop within that time are one consistent cut, closed by gathered; *more*
    says that further packets belong to the same cut. After *wait_ms* those that never reached a boundary are refused.
    """

    KIND: ClassVar[int] = 37
    batch: int = rare(int)
    more: bool = rare(bool)
    gather_ms: int = rare(int)
    wait_ms: int = rare(int)
    cookie: Sequence[int] = column("Q")
    epoch: Sequence[int] = column("I")


@attrs.frozen(kw_only=True)
class Thaw(Records):
    """Take these over from their records; build, and serve nothing before enter."""

    KIND: ClassVar[int] = 38
    epoch: Sequence[int] = column("I")


@attrs.frozen(kw_only=True)
class Enter(Message):
    """
    Adopt and serve what is thawed: with *cut* the records of the cut, else those that are of none.

    *shared*: the shared states of the workers that the cut came from.
    """

    KIND: ClassVar[int] = 39
    cut: bool = rare(bool)
    shared: Sequence[bytes] = blob()


@attrs.frozen(kw_only=True)
class Drop(Message):
    """Close your copies of these: they ended elsewhere, or stay where they are."""

    KIND: ClassVar[int] = 40
    cookie: Sequence[int] = column("Q")


@attrs.frozen(kw_only=True)
class Commit(Message):
    """To the incumbent: forget what is frozen, finish what you still serve, then go."""

    KIND: ClassVar[int] = 41
    drain_ms: int = rare(int)


@attrs.frozen(kw_only=True)
class MoveOver(Message):
    """The move has ended for this worker; it serves on."""

    KIND: ClassVar[int] = 42


@attrs.frozen(kw_only=True)
class Stop(Message):
    """Accept nothing more, close each connection at its boundary, the rest after *drain_ms*, then go."""

    KIND: ClassVar[int] = 43
    drain_ms: int = rare(int)


@attrs.frozen(kw_only=True)
class Push(Message):
    """Send these bytes on these connections of yours, or end them; not yours any more, it comes back as a forward."""

    KIND: ClassVar[int] = 44
    cookie: Sequence[int] = column("Q")
    act: Sequence[int] = column("B")
    pushed: Sequence[bytes] = blob()


@attrs.frozen(kw_only=True)
class Recall(Message):
    """A new holder asks what the worker has; the answer is attach, view and viewed."""

    KIND: ClassVar[int] = 45
    wire: int = rare(int)


FROM_WORKER = (
    *(Hello, Ready, Failed, Lend, Release, AcceptOffAck, Staged, Frozen, Refused, Gathered, Adopted, Forward),
    *(Attach, View, Viewed, Became, Cede),
)
FROM_HOLDER = (
    *(Welcome, LendAck, AcceptOn, AcceptOff, Stage, Freeze, Thaw, Enter, Drop, Commit, MoveOver, Stop, Push),
    Recall,
)
BY_KIND: dict[int, type[Message]] = {kind.KIND: kind for kind in (*FROM_WORKER, *FROM_HOLDER)}


def expect(message: Message, kind: type[T]) -> T:
    """
    Return *message* if it is of *kind*.

    Raises:
        WireError: it is another.

    """
    if not isinstance(message, kind):
        raise WireError(f"{kind.__name__} was expected, {type(message).__name__} came")
    return message
