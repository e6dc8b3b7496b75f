"""
Which bytes each message between holder and worker is.

It knows no socket: descriptors travel beside the bytes and are only counted here.

A packet is a header of 16 bytes, a JSON object for what is rare, packed columns for what is hot, and opaque blobs
last. ``docs/protocol.md`` is the reference; the golden bytes in ``tests/test_wire.py`` hold each released version.
"""

from __future__ import annotations

import enum
import json
import struct
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import attrs

from copyover.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WIRE_VERSIONS = (1, 1)  # the oldest and the newest that this release speaks
RECORD_VERSIONS = (1, 1)  # of the columns of a record
MAX_DESCRIPTORS = 253  # a message: SCM_MAX_FD. unix(7)
MAX_ROWS = 4096  # a packet of columns stays well below the packet size
MAX_BODY_BYTES = 1 << 30  # what a peer may make us read out of a memfd

HEADER = struct.Struct("<2sBBIIHH")  # magic, version, kind, rows, bytes of JSON, descriptors, flags
MAGIC = b"co"
FLAG_MEMFD = 1  # the body is in a sealed memfd, the last descriptor of the packet

T = TypeVar("T", bound="Message")


class How(enum.IntEnum):
    """How a connection ended."""

    CLOSED = 0  # the handler returned or closed it
    RESET = 1  # the peer reset it, or it timed out
    ABORTED = 2  # the handler aborted it, or failed
    EXPIRED = 3  # its retiring generation reached the drain limit
    STOPPED = 4  # the server is stopping


class RecordFlag(enum.IntFlag):
    """What else a record says about its connection."""

    WRITE_CLOSED = 1  # our FIN is sent, or is to be sent after the unsent bytes
    FINISHED = 2  # the handler has returned: send what is unsent, then close
    UNSERVED = 4  # thaw only: nobody served it since you froze it; use your own record and coroutine
    CUT = 8  # part of a consistent cut: entered with all the others of it


@attrs.frozen
class Record:
    """
    What travels beside a descriptor.

    *received* and *sent* count the bytes that were read from and accepted by the kernel since the connection was
    accepted; *halted_ns* is CLOCK_MONOTONIC at the moment it stopped being served.
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
        names = _layout(type(self)).row_fields
        return len(getattr(self, names[0])) if names else 0


@attrs.frozen(kw_only=True)
class _WithRecords(Message):
    """The columns of a record, shared by frozen and thaw."""

    kind: tuple[int, ...] = column("B")
    flags: tuple[int, ...] = column("B")
    schema: tuple[int, ...] = column("H")
    received: tuple[int, ...] = column("Q")
    sent: tuple[int, ...] = column("Q")
    halted_ns: tuple[int, ...] = column("Q")
    unread: tuple[bytes, ...] = blob()
    unsent: tuple[bytes, ...] = blob()
    state: tuple[bytes, ...] = blob()

    def records(self) -> Iterator[Record]:
        return map(Record, *(getattr(self, name) for name in RECORD_FIELDS))


def record_columns(records: Sequence[Record]) -> dict[str, tuple[Any, ...]]:
    """Turn rows into the keyword arguments of Frozen or Thaw."""
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
    cookie: tuple[int, ...] = column("Q")
    listener: tuple[int, ...] = column("H")


@attrs.frozen(kw_only=True)
class Release(Message):
    """These connections have ended."""

    KIND: ClassVar[int] = 5
    cookie: tuple[int, ...] = column("Q")
    epoch: tuple[int, ...] = column("I")
    how: tuple[int, ...] = column("B")


@attrs.frozen(kw_only=True)
class AcceptOffAck(Message):
    """No lend follows this one until accept_on."""

    KIND: ClassVar[int] = 6


@attrs.frozen(kw_only=True)
class Staged(Message):
    """So many connections were staged here so far."""

    KIND: ClassVar[int] = 7
    total: int = rare(int)


@attrs.frozen(kw_only=True)
class Frozen(_WithRecords):
    """Stopped at a boundary. *batch* names the freeze whose first answer this is, 0 for later ones."""

    KIND: ClassVar[int] = 8
    batch: int = rare(int)
    cookie: tuple[int, ...] = column("Q")
    epoch: tuple[int, ...] = column("I")


@attrs.frozen(kw_only=True)
class Refused(Message):
    """These cannot be frozen, or cannot be thawed; the sender's side of them is as if it had never been asked."""

    KIND: ClassVar[int] = 9
    cookie: tuple[int, ...] = column("Q")
    epoch: tuple[int, ...] = column("I")
    reason: tuple[bytes, ...] = blob()


@attrs.frozen(kw_only=True)
class Gathered(Message):
    """All that could stop has stopped and is sent; *shared* is the application's shared state, if it has one."""

    KIND: ClassVar[int] = 10
    shared: tuple[bytes, ...] = blob()


@attrs.frozen(kw_only=True)
class Adopted(Message):
    """Served by the sender from now on; queued before the first byte that it serves."""

    KIND: ClassVar[int] = 11
    cookie: tuple[int, ...] = column("Q")
    epoch: tuple[int, ...] = column("I")
    pause_us: tuple[int, ...] = column("I")


# ---- holder to worker


@attrs.frozen(kw_only=True)
class Welcome(Message):
    """The listeners, one descriptor a row, and what to run."""

    KIND: ClassVar[int] = 32
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    wire: int = rare(int)
    generation: int = rare(int)
    names: list[str] = rare(list)  # of the listeners
    application: str = rare(str)
    app_dir: str = rare(str)
    options: dict[str, Any] = rare(dict)  # loop, limits; unknown keys are ignored
    listener: tuple[int, ...] = column("H")


@attrs.frozen(kw_only=True)
class LendAck(Message):
    """The holder owns a copy of so many of the connections lent on this channel, counted from its start."""

    KIND: ClassVar[int] = 33
    total: int = rare(int)


@attrs.frozen(kw_only=True)
class AcceptOn(Message):
    KIND: ClassVar[int] = 34


@attrs.frozen(kw_only=True)
class AcceptOff(Message):
    """Stop accepting, and say so behind the last lend. With *moving* a move begins: no garbage collection."""

    KIND: ClassVar[int] = 35
    moving: bool = rare(bool)


@attrs.frozen(kw_only=True)
class Stage(Message):
    """Build these, paused; one descriptor a row."""

    KIND: ClassVar[int] = 36
    CARRIES_DESCRIPTORS: ClassVar[bool] = True
    cookie: tuple[int, ...] = column("Q")
    listener: tuple[int, ...] = column("H")


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
    cookie: tuple[int, ...] = column("Q")
    epoch: tuple[int, ...] = column("I")


@attrs.frozen(kw_only=True)
class Thaw(_WithRecords):
    """Take these over from their records; build, and serve nothing before enter."""

    KIND: ClassVar[int] = 38
    cookie: tuple[int, ...] = column("Q")
    epoch: tuple[int, ...] = column("I")


@attrs.frozen(kw_only=True)
class Enter(Message):
    """
    Adopt and serve what is thawed: with *cut* the records of the cut, else those that are of none.

    *shared*: the shared states of the workers that the cut came from.
    """

    KIND: ClassVar[int] = 39
    cut: bool = rare(bool)
    shared: tuple[bytes, ...] = blob()


@attrs.frozen(kw_only=True)
class Drop(Message):
    """Close your copies of these: they ended elsewhere, or stay where they are."""

    KIND: ClassVar[int] = 40
    cookie: tuple[int, ...] = column("Q")


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


FROM_WORKER = (Hello, Ready, Failed, Lend, Release, AcceptOffAck, Staged, Frozen, Refused, Gathered, Adopted)
FROM_HOLDER = (Welcome, LendAck, AcceptOn, AcceptOff, Stage, Freeze, Thaw, Enter, Drop, Commit, MoveOver, Stop)
BY_KIND: dict[int, type[Message]] = {kind.KIND: kind for kind in (*FROM_WORKER, *FROM_HOLDER)}


@attrs.frozen
class _Layout:
    rare: tuple[tuple[str, type], ...]
    columns: tuple[tuple[str, str], ...]
    blobs: tuple[str, ...]

    @property
    def row_fields(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.columns) + self.blobs


def _read_layout(kind: type[Message]) -> _Layout:
    fields = attrs.fields(kind)
    return _Layout(
        rare=tuple((field.name, field.metadata["rare"]) for field in fields if "rare" in field.metadata),
        columns=tuple((field.name, field.metadata["column"]) for field in fields if "column" in field.metadata),
        blobs=tuple(field.name for field in fields if "blob" in field.metadata),
    )


_LAYOUTS = {kind: _read_layout(kind) for kind in BY_KIND.values()}


def _layout(kind: type[Message]) -> _Layout:
    return _LAYOUTS[kind]


@attrs.frozen
class Header:
    """The first 16 bytes of a packet."""

    version: int
    kind: int
    rows: int
    rare_bytes: int
    descriptors: int
    flags: int

    @property
    def has_memfd(self) -> bool:
        return bool(self.flags & FLAG_MEMFD)

    def pack(self) -> bytes:
        return HEADER.pack(MAGIC, self.version, self.kind, self.rows, self.rare_bytes, self.descriptors, self.flags)


def encode(message: Message, *, descriptors: int = 0, version: int = WIRE_VERSIONS[1]) -> tuple[Header, bytes]:
    """
    Return the header and the body of *message*, which travels with *descriptors* descriptors.

    Raises:
        WireError: columns of different lengths, or another number of descriptors than the message carries.

    """
    layout = _layout(type(message))
    rows = message.rows
    if descriptors != (rows if message.CARRIES_DESCRIPTORS else 0):
        raise WireError(f"{type(message).__name__} of {rows} rows cannot travel with {descriptors} descriptors")
    parts: list[bytes] = []
    if layout.rare:
        values = {name: getattr(message, name) for name, _ in layout.rare}
        parts.append(json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode())
    rare_bytes = len(parts[0]) if parts else 0
    for name, code in layout.columns:
        values_of = getattr(message, name)
        if len(values_of) != rows:
            raise WireError(f"{type(message).__name__}.{name} has {len(values_of)} values for {rows} rows")
        parts.append(struct.pack(f"<{rows}{code}", *values_of))
    for name in layout.blobs:
        parts.append(struct.pack(f"<{rows}I", *map(len, getattr(message, name))))
    for name in layout.blobs:
        parts.extend(getattr(message, name))
    header = Header(version, message.KIND, rows, rare_bytes, descriptors, 0)
    return header, b"".join(parts)


def decode_header(packet: bytes) -> Header:
    """
    Read the header of a packet.

    Raises:
        WireError: too short, another magic, or a version that this release does not speak.

    """
    if len(packet) < HEADER.size:
        raise WireError(f"a packet of {len(packet)} bytes is shorter than its header of {HEADER.size}")
    magic, *fields = HEADER.unpack_from(packet)
    header = Header(*fields)
    if magic != MAGIC:
        raise WireError(f"a packet starts with {magic!r} instead of {MAGIC!r}")
    oldest, newest = WIRE_VERSIONS
    if not oldest <= header.version <= newest and header.kind != Hello.KIND:
        raise WireError(f"wire version {header.version} is none of {oldest} to {newest}")
    return header


def decode(header: Header, body: bytes | memoryview) -> Message:
    """
    Return the message that *header* and *body* are.

    Raises:
        WireError: an unknown kind, a wrong length, a JSON part that is not what the kind takes.

    """
    kind = BY_KIND.get(header.kind)
    if kind is None:
        raise WireError(f"message kind {header.kind} is unknown")
    layout = _layout(kind)
    name = kind.__name__
    if header.descriptors != (header.rows if kind.CARRIES_DESCRIPTORS else 0):
        raise WireError(f"{name} of {header.rows} rows claims {header.descriptors} descriptors")
    if header.rows and not layout.row_fields:
        raise WireError(f"{name} has no rows, this one claims {header.rows}")
    view = memoryview(body)
    fields: dict[str, Any] = _decode_rare(name, layout, bytes(view[: header.rare_bytes]), header.rare_bytes)
    at = header.rare_bytes
    try:
        for field, code in layout.columns:
            fields[field] = struct.unpack_from(f"<{header.rows}{code}", view, at)
            at += struct.calcsize(f"<{header.rows}{code}")
        lengths = []
        for _ in layout.blobs:
            lengths.append(struct.unpack_from(f"<{header.rows}I", view, at))
            at += 4 * header.rows
    except struct.error as short:
        raise WireError(f"{name} of {header.rows} rows is cut short at {len(view)} bytes") from short
    if at + sum(map(sum, lengths)) != len(view):
        raise WireError(f"{name} is {len(view)} bytes long, its rows say {at + sum(map(sum, lengths))}")
    for field, sizes in zip(layout.blobs, lengths, strict=True):
        fields[field], at = _cut(view, at, sizes)
    return kind(**fields)


def _cut(view: memoryview, at: int, sizes: Iterable[int]) -> tuple[tuple[bytes, ...], int]:
    values = []
    for size in sizes:
        values.append(bytes(view[at : at + size]))
        at += size
    return tuple(values), at


def _decode_rare(name: str, layout: _Layout, text: bytes, claimed: int) -> dict[str, Any]:
    if len(text) != claimed or bool(text) != bool(layout.rare):
        raise WireError(f"{name} has a JSON part of {len(text)} bytes, its header claims {claimed}")
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise WireError(f"the JSON part of {name} cannot be read: {problem}") from problem
    if type(values) is not dict:
        raise WireError(f"the JSON part of {name} is no object")
    for field, wanted in layout.rare:
        if type(values.get(field)) is not wanted:
            raise WireError(f"{name}.{field} should be of type {wanted.__name__}")
    return {field: values[field] for field, _ in layout.rare}


def common_version(theirs: Sequence[int], ours: tuple[int, int] = WIRE_VERSIONS) -> int | None:
    """Return the newest version that both ranges (oldest, newest) hold, or None."""
    if len(theirs) != 2 or not all(type(bound) is int for bound in theirs):
        return None
    newest = min(theirs[1], ours[1])
    return newest if newest >= max(theirs[0], ours[0]) else None


def expect(message: Message, kind: type[T]) -> T:
    """
    Return *message* if it is of *kind*.

    Raises:
        WireError: it is another.

    """
    if not isinstance(message, kind):
        raise WireError(f"{kind.__name__} was expected, {type(message).__name__} came")
    return message
