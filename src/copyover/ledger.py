"""
Who owns each connection, at which epoch.

It knows descriptors as names only and opens, closes and sends nothing; each method checks first and then changes, so
that an illegal event leaves the ledger as it was.
"""

from __future__ import annotations

import collections
import enum
from typing import TYPE_CHECKING

import attrs

from copyover.errors import IllegalEvent
from copyover.messages import Kind, Record, RecordFlag

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Standing(enum.Enum):
    """What the holder knows of a connection. All transitions are methods of the Ledger."""

    SERVED = "served"  # its owner serves it
    FREEZING = "freezing"  # its owner was asked to stop at a boundary
    PARKED = "parked"  # nobody serves it; the record is here
    THAWING = "thawing"  # its owner was given the record and has not said that it serves


@attrs.define
class Passage:
    """What is noted of a connection only while it is on its way: in a move, ceded, or after a death."""

    staged_in: int = 0  # the worker that has built it, paused; 0 is none
    origin: int = 0  # the worker whose coroutine still waits for it; 0 is none
    record: Record | None = None  # what the last freeze gave
    is_given: bool = False  # its owner has that record, and has not said since that it serves
    was_adopted: bool = False  # somebody else than its origin has served it since
    is_ceded: bool = False  # its origin retires, and takes it back only if nobody else can serve it
    kept_because: str | None = None
    pushed: list[tuple[int, bytes]] = attrs.field(factory=list)  # acts of others while nobody had it
    unfit: frozenset[int] = frozenset()  # the workers that gave the record back
    since_s: float = 0.0  # when it came to stand as it does


@attrs.define
class Entry:
    """One connection."""

    cookie: int
    descriptor: int
    listener: int
    owner: int
    epoch: int = 0
    kind: Kind = Kind.HANDLER
    standing: Standing = Standing.SERVED
    passage: Passage | None = None

    @property
    def moving(self) -> Passage:
        """The notes of the move, begun at the first look."""
        if self.passage is None:
            self.passage = Passage()
        return self.passage


@attrs.frozen
class Ending:
    """A connection that ended: whose copies are to be dropped, and the descriptor to close."""

    cookie: int
    descriptor: int
    copies_in: tuple[int, ...]


class Ledger:
    """All live connections, and the tombstones of those that ended during the move."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.tombstones: set[int] = set()
        self.is_moving = False
        self.now_s = 0.0  # of the event that is being handled; for since_s only
        self.owned: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return len(self.entries)

    def of(self, worker: int) -> Iterator[Entry]:
        return (entry for entry in self.entries.values() if entry.owner == worker)

    def check(
        self, worker: int, cookies: Sequence[int], epochs: Sequence[int], standings: tuple[Standing, ...]
    ) -> None:
        """
        See that *worker* may say this of all of them, before anything of it is believed.

        Raises:
            IllegalEvent: one is not its own, not in such a standing, at another epoch, or named twice.

        """
        if len(set(cookies)) != len(cookies):
            raise IllegalEvent(f"worker {worker} named a connection twice in one message")
        for cookie, epoch in zip(cookies, epochs, strict=True):
            if cookie in self.tombstones:
                continue
            entry = self._owned_by(worker, cookie, *standings)
            if epoch != entry.epoch:
                raise IllegalEvent(f"worker {worker} spoke of connection {cookie} at epoch {epoch}, not {entry.epoch}")

    @staticmethod
    def check_kinds(worker: int, kinds: Iterable[int]) -> None:
        """
        See that all of *kinds* are known.

        Raises:
            IllegalEvent: one is no Kind.

        """
        unknown = set(kinds).difference(Kind)
        if unknown:
            raise IllegalEvent(f"worker {worker} serves a connection as {min(unknown)}, which is no kind")

    def _owned_by(self, worker: int, cookie: int, *standings: Standing) -> Entry:
        entry = self.entries.get(cookie)
        if entry is None:
            raise IllegalEvent(f"connection {cookie} is not in the ledger")
        if entry.owner != worker or entry.standing not in standings:
            raise IllegalEvent(
                f"worker {worker} spoke of connection {cookie}, {entry.standing.value} by worker {entry.owner}"
            )
        return entry

    def _give(self, entry: Entry, worker: int, standing: Standing) -> None:
        if entry.owner != worker:
            self.owned[entry.owner] -= 1
            self.owned[worker] += 1
            entry.owner = worker
        self._stand(entry, standing)

    def _stand(self, entry: Entry, standing: Standing) -> None:
        entry.standing, entry.moving.since_s = standing, self.now_s

    def lend(self, worker: int, cookie: int, descriptor: int, listener: int, kind: int = Kind.HANDLER) -> Entry:
        if cookie in self.entries:
            raise IllegalEvent(f"connection {cookie} was lent twice")
        entry = self.entries[cookie] = Entry(cookie, descriptor, listener, worker, kind=Kind(kind))
        self.owned[worker] += 1
        return entry

    def became(self, worker: int, cookie: int, kind: int) -> None:
        """Its owner serves it as something else."""
        self._owned_by(worker, cookie, Standing.SERVED, Standing.FREEZING).kind = Kind(kind)

    def release(self, worker: int, cookie: int) -> Ending:
        """The owner says that it ended. A tombstone stays, so that nothing revives it."""
        entry = self._owned_by(worker, cookie, Standing.SERVED, Standing.FREEZING, Standing.THAWING)
        return self._end(entry)

    def lose(self, cookie: int) -> Ending:
        """The connection cannot be served any more by anybody."""
        return self._end(self.entries[cookie])

    def _end(self, entry: Entry) -> Ending:
        del self.entries[entry.cookie]
        self.owned[entry.owner] -= 1
        if self.is_moving:
            self.tombstones.add(entry.cookie)
        passage = entry.passage or Passage()
        # Of what is parked its last owner has a copy, too.
        serving = 0 if entry.standing is Standing.PARKED else entry.owner
        copies = tuple(dict.fromkeys(w for w in (passage.staged_in, passage.origin) if w not in (0, serving)))
        return Ending(entry.cookie, entry.descriptor, copies)

    def stage(self, cookie: int, worker: int) -> None:
        passage = self.entries[cookie].moving
        passage.staged_in, passage.since_s = passage.staged_in or worker, self.now_s

    def unstage(self, cookie: int) -> None:
        self.entries[cookie].moving.staged_in = 0

    def freeze(self, cookie: int) -> int:
        """Return the epoch at which its owner is asked to stop."""
        entry = self._owned_by(self.entries[cookie].owner, cookie, Standing.SERVED, Standing.THAWING)
        self._stand(entry, Standing.FREEZING)
        return entry.epoch

    def is_late(self, cookie: int) -> bool:
        """Whether what a worker says of it is void: it has ended meanwhile."""
        return cookie in self.tombstones

    def frozen(self, worker: int, cookie: int, epoch: int, record: Record) -> Entry:
        entry = self._owned_by(worker, cookie, Standing.FREEZING)
        if epoch != entry.epoch:
            raise IllegalEvent(f"connection {cookie} was frozen at epoch {epoch} instead of {entry.epoch}")
        passage = entry.moving
        if passage.is_given:  # it gives back what it was given: there is no coroutine of it
            passage.staged_in = worker
        elif passage.origin == 0:  # the coroutine that can go on after a roll-back is the first that stopped
            passage.origin = worker
        passage.record, passage.is_given = record, False
        entry.kind = Kind(record.kind)
        self._stand(entry, Standing.PARKED)
        return entry

    def refuse(self, worker: int, cookie: int, reason: str) -> Entry:
        """The owner keeps it (answer to a freeze), or gives the record back (answer to a thaw)."""
        entry = self._owned_by(worker, cookie, Standing.FREEZING, Standing.THAWING)
        # A freeze may have crossed the refusal of a thaw: the refuser holds nothing then, and our record stands.
        passage = entry.moving
        passage.kept_because = reason
        if not self.has_record(entry):
            self._stand(entry, Standing.SERVED)
            return entry
        self._stand(entry, Standing.PARKED)
        passage.is_given = False
        passage.unfit |= {worker}
        self._forget_copy(passage, worker)
        return entry

    def thaw(self, cookie: int, worker: int) -> Entry:
        """Give a parked connection to *worker*, at the next epoch."""
        entry = self.entries[cookie]
        if entry.standing is not Standing.PARKED or entry.moving.record is None:
            raise IllegalEvent(f"connection {cookie} is {entry.standing.value}, not parked with a record")
        entry.epoch += 1
        entry.moving.is_given = True
        self._give(entry, worker, Standing.THAWING)
        return entry

    def adopt(self, worker: int, cookie: int, epoch: int) -> Entry:
        entry = self._owned_by(worker, cookie, Standing.THAWING, Standing.FREEZING)
        if epoch != entry.epoch:
            raise IllegalEvent(f"connection {cookie} was adopted at epoch {epoch} instead of {entry.epoch}")
        if entry.standing is Standing.THAWING:  # else a freeze crossed it, and its answer follows
            self._stand(entry, Standing.SERVED)
        entry.moving.is_given = False
        entry.moving.was_adopted |= worker != entry.moving.origin
        return entry

    def cede(self, worker: int, cookie: int, record: Record) -> Entry:
        """Its owner, which retires, gives it up; the coroutine there waits until somebody else serves it."""
        entry = self._owned_by(worker, cookie, Standing.SERVED)
        entry.passage = Passage(origin=worker, record=record, is_ceded=True)
        entry.kind = Kind(record.kind)
        self._stand(entry, Standing.PARKED)
        return entry

    def relieve(self, entry: Entry) -> list[int]:
        """Somebody serves what was ceded: return who is to drop its copy."""
        passage = entry.moving
        if not passage.is_ceded:
            return []
        passage.is_ceded = False
        if passage.origin in (0, entry.owner):
            return []
        ceder, passage.origin = passage.origin, 0
        return [ceder]

    def record_for(self, entry: Entry, worker: int) -> Record:
        """
        Return what *worker* is to go on from: the record, or with UNSERVED its own coroutine.

        Raises:
            IllegalEvent: there is no record.

        """
        record = None if entry.passage is None else entry.passage.record
        if record is None:
            raise IllegalEvent(f"connection {entry.cookie} is {entry.standing.value}, without a record")
        flags = record.flags & ~RecordFlag.CUT
        if self.unserved(entry, worker):
            return Record(flags=flags | RecordFlag.UNSERVED, halted_ns=record.halted_ns)
        return attrs.evolve(record, flags=flags) if flags != record.flags else record

    def unserved(self, entry: Entry, worker: int) -> bool:
        """Whether *worker* froze it and nobody has served it since: its very coroutine can go on."""
        passage = entry.moving
        return passage.origin == worker and not passage.was_adopted

    def has_record(self, entry: Entry) -> bool:
        """Whether its owner was given a record and has not said that it served since."""
        return entry.passage is not None and entry.passage.is_given

    def park(self, cookie: int) -> Entry:
        """Take back what a worker that died had been given and did not serve."""
        entry = self.entries[cookie]
        if not self.has_record(entry):
            raise IllegalEvent(f"connection {cookie} is {entry.standing.value}, its record is of the past")
        self._stand(entry, Standing.PARKED)
        entry.moving.is_given = False
        return entry

    def recover(self, cookie: int, record: Record) -> Entry:
        """Take over what a dead worker served, from its last boundary; what it was, only the ledger tells."""
        entry = self.entries[cookie]
        passage = entry.moving
        passage.record, passage.is_given, passage.was_adopted = attrs.evolve(record, kind=entry.kind), False, True
        self._stand(entry, Standing.PARKED)
        return entry

    def begin(self) -> None:
        """A move begins: note who ends."""
        self.is_moving = True

    def forget_others(self, cookie: int) -> list[int]:
        """It stays with its owner: return the workers that are to drop their copies."""
        entry = self.entries[cookie]
        passage = entry.moving
        others = [worker for worker in (passage.staged_in, passage.origin) if worker not in (0, entry.owner)]
        passage.staged_in = passage.origin = 0
        return list(dict.fromkeys(others))

    def forget_copies(self, worker: int) -> None:
        """The worker is dead: nothing is staged in it, and no coroutine of it waits."""
        for entry in self.entries.values():
            if entry.passage is not None:
                self._forget_copy(entry.passage, worker)

    @staticmethod
    def _forget_copy(passage: Passage, worker: int) -> None:
        if passage.staged_in == worker:
            passage.staged_in = 0
        if passage.origin == worker:
            passage.origin = 0

    def settle(self) -> None:
        """The move is over: forget origins, tombstones, and the records of what is served."""
        self.is_moving = False
        self.forget_passages()
        self.tombstones.clear()

    def forget_passages(self) -> None:
        """What is parked keeps its record: nobody else has it. Who ceded it waits on."""
        for entry in self.entries.values():
            passage = entry.passage
            if passage is not None and entry.standing is Standing.PARKED:
                entry.passage = Passage(
                    record=passage.record,
                    origin=passage.origin if passage.is_ceded else 0,
                    was_adopted=passage.was_adopted or not passage.is_ceded,
                    is_ceded=passage.is_ceded,
                    pushed=passage.pushed,
                )
            elif entry.standing is not Standing.THAWING:
                entry.passage = None
