"""
The files of slots as the holder sees them: made for a worker, read when it is dead, removed.

It asks the kernel and reads files; what both prove is decided in verdict. It never maps a file: a worker could shorten
it, and reading beyond its end would kill the holder. mmap(2), SIGBUS
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import attrs

from copyover import slots
from copyover.errors import WireError
from copyover.holder.verdict import Verdict, judge
from copyover.messages import RecordFlag
from copyover.sockets import counters_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from copyover.messages import Record

RESUME = "resume"
_CHUNK_BYTES = 256 << 10


class SlotFile:
    """
    The file of one worker; its path is the register in which a new holder finds living workers, by its lock.

    *descriptor* is this object's.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def make(cls, directory: Path, instance: str, header: slots.Header) -> SlotFile:
        path = directory / f"worker-{instance}-{header.worker}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = cls(path, os.open(path, flags, 0o600))
        try:
            os.truncate(made.fileno(), max(header.file_bytes, slots.HEADER_BYTES))
            os.pwrite(made.fileno(), header.pack(), 0)
        except BaseException:
            made.remove()
            raise
        return made

    def fileno(self) -> int:
        return self._descriptor

    def remove(self) -> None:
        """Forget it, once its worker is dead and what it held is recovered."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self._descriptor)


class Orphan(NamedTuple):
    """A connection whose worker is dead; *descriptor* is borrowed, *on_crash* the policy of its listener."""

    cookie: int
    epoch: int
    descriptor: int
    on_crash: str


@attrs.frozen
class Recovered:
    """
    How the connections of a dead worker go on.

    *records*: by cookie, to resume from. *ended*: the kernel has closed these already. *reset*: to be reset, and why.
    *interrupted*: those of the records that have the flag, and why.
    """

    records: dict[int, Record] = attrs.field(factory=dict)
    ended: frozenset[int] = frozenset()
    reset: dict[int, str] = attrs.field(factory=dict)
    interrupted: dict[int, str] = attrs.field(factory=dict)

    @property
    def exact(self) -> int:
        return len(self.records) - len(self.interrupted)


def recover(descriptor: int, orphans: Iterable[Orphan]) -> Recovered:
    """
    Say how the connections of a dead worker go on, by its file (a borrowed descriptor) and the kernel's account.

    The worker must have been reaped: what still runs still reads and writes. Nothing in the file is believed that the
    kernel does not confirm; one that cannot be read is one without slots.
    """
    rows = {orphan.cookie: orphan for orphan in orphans}
    if not rows:
        return Recovered()  # its file may have many megabytes
    contents = _contents(descriptor, rows.keys())
    now_ns = time.monotonic_ns()
    return _sorted({cookie: _judge(row, contents.get(cookie), now_ns) for cookie, row in rows.items()})


def is_current(descriptor: int, record: Record) -> bool:
    """Whether nobody has used the connection since *record* was taken, as far as the kernel tells."""
    try:
        counters = counters_of(descriptor)
    except OSError:
        return False
    if counters is None:  # a unix socket: only its worker's slot tells
        return True
    has_read = counters.read != record.received and not record.flags & RecordFlag.FINISHED  # the rest is discarded
    return not has_read and counters.written == record.sent


def _judge(row: Orphan, content: slots.Content | None, now_ns: int) -> Verdict:
    try:
        counters = counters_of(row.descriptor)
    except OSError as problem:
        return Verdict(reason=f"the kernel does not say how far it was: {problem.strerror}")
    return judge(content, counters, epoch=row.epoch, resumes=row.on_crash == RESUME, now_ns=now_ns)


def _sorted(verdicts: dict[int, Verdict]) -> Recovered:
    return Recovered(
        records={cookie: found.record for cookie, found in verdicts.items() if found.record is not None},
        ended=frozenset(cookie for cookie, found in verdicts.items() if found.has_ended),
        reset={
            cookie: found.reason for cookie, found in verdicts.items() if found.record is None and not found.has_ended
        },
        interrupted={cookie: found.reason for cookie, found in verdicts.items() if found.record and found.reason},
    )


def _contents(descriptor: int, wanted: Iterable[int]) -> dict[int, slots.Content]:
    """Return what the file says of *wanted*; of two slots of one connection the higher epoch, of equals neither."""
    found: dict[int, slots.Content] = {}
    doubtful: set[int] = set()
    asked = frozenset(wanted)
    for cookie, content in _read(descriptor, asked):
        known = found.get(cookie)
        if known is None or content.epoch > known.epoch:
            found[cookie] = content
            doubtful.discard(cookie)
        elif content.epoch == known.epoch:
            doubtful.add(cookie)
    return {cookie: content for cookie, content in found.items() if cookie not in doubtful}


def _read(descriptor: int, wanted: frozenset[int]) -> Iterator[tuple[int, slots.Content]]:
    try:
        header = slots.read_header(os.pread(descriptor, slots.HEADER_BYTES, 0))
    except WireError:
        return
    if header.slots and header.slot_bytes <= slots.DEFAULT_BYTES:
        found = _read_together(descriptor, header)
        yield from ((cookie, content) for cookie, content in found if cookie in wanted)
    elif header.slots:
        yield from _read_singly(descriptor, header, wanted)


def _read_together(descriptor: int, header: slots.Header) -> Iterator[tuple[int, slots.Content]]:
    """Read many slots at once, at most 1 GiB in all."""
    step = max(_CHUNK_BYTES // header.slot_bytes, 1) * header.slot_bytes
    at = slots.HEADER_BYTES
    while (at := _find_written(descriptor, at, step)) < header.file_bytes:
        area = os.pread(descriptor, min(step, header.file_bytes - at), at)
        yield from slots.read_all(area, header.slot_bytes)
        at += step


def _read_singly(descriptor: int, header: slots.Header, wanted: frozenset[int]) -> Iterator[tuple[int, slots.Content]]:
    """Look whose the large slots are; read one for each connection, and as many again should two have the same."""
    step, left = header.slot_bytes, 2 * len(wanted)
    at = slots.HEADER_BYTES
    while left and (at := _find_written(descriptor, at, step)) < header.file_bytes:
        prefix = os.pread(descriptor, slots.PREFIX_BYTES, at)
        if len(prefix) == slots.PREFIX_BYTES and slots.named(prefix) in wanted:
            yield from slots.read_all(os.pread(descriptor, step, at), step)
            left -= 1
        at += step


def _find_written(descriptor: int, at: int, step: int) -> int:
    """Return where the next step begins in which anything is written: the file is mostly holes. lseek(2)"""
    try:
        return at + (os.lseek(descriptor, at, os.SEEK_DATA) - at) // step * step
    except OSError:  # ENXIO: nothing but holes
        return sys.maxsize
