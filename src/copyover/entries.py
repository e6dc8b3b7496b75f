"""
Which connections there are, what can be asked of them, and whether a worker may say what it says of them.

It holds the columns of the ledger and changes none of them; what becomes of a connection is decided in ledger.
"""

from __future__ import annotations

import collections
import enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import attrs

from copyover.columns import picker
from copyover.errors import IllegalEvent
from copyover.messages import (
    Adopted,
    Became,
    Cede,
    Frozen,
    Kind,
    Record,
    RecordFlag,
    Records,
    Refused,
    Release,
    record_columns,
    record_packets,
)
from copyover.rows import Rows

if TYPE_CHECKING:
    import array
    from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence

T = TypeVar("T")
Said = TypeVar("Said", Became, Release, Frozen, Refused, Adopted, Cede)
Column = Literal["cookie", "descriptor", "listener", "owner", "epoch", "kind"]


class Standing(enum.Enum):
    """What the holder knows of a connection. All transitions are methods of the Ledger."""

    SERVED = "served"  # its owner serves it
    FREEZING = "freezing"  # its owner was asked to stop at a boundary
    PARKED = "parked"  # nobody serves it; the record is here
    THAWING = "thawing"  # its owner was given the record and has not said that it serves


_STANDINGS = tuple(Standing)
CODES = {standing: code for code, standing in enumerate(_STANDINGS)}  # as the column has them
_KINDS = frozenset(map(int, Kind))  # to ask an enum takes longer than all else that is asked of a message
_NOBODY: frozenset[int] = frozenset()
_KINDS = frozenset(map(int, Kind))  # to ask an enum takes longer than all else that is asked of a message


@attrs.frozen
class Entry:
    """One connection, as the ledger has it at this moment; from *staged_in* on it is noted only on its way."""

    cookie: int
    descriptor: int
    listener: int
    owner: int
    epoch: int = 0
    kind: Kind = Kind.HANDLER
    standing: Standing = Standing.SERVED
    staged_in: int = 0  # the worker that has built it, paused; 0 is none
    origin: int = 0  # the worker whose coroutine still waits for it; 0 is none
    was_adopted: bool = False  # somebody else than its origin has served it since
    record: Record | None = None  # what the last freeze gave, until somebody serves it again
    is_ceded: bool = False  # its origin retires, and takes it back only if nobody else can serve it
    kept_because: str | None = None
    pushed: Sequence[tuple[int, bytes]] = ()  # acts of others while nobody had it
    unfit: frozenset[int] = frozenset()  # the workers that gave the record back
    since_s: float = 0.0  # when it came to stand as it does

    @property
    def is_given(self) -> bool:
        """Its owner has the record, and has not said since that it serves."""
        return self.record is not None and self.standing is not Standing.PARKED

    @property
    def has_passage(self) -> bool:
        """Whether anything is noted of it that is of its way only."""
        numbers = (self.staged_in, self.origin, self.was_adopted, self.is_ceded, self.since_s)
        return any(numbers) or any((self.record, self.kept_because, self.pushed, self.unfit))


class Case(NamedTuple):
    """What decides where a connection goes next: those of one case go the same way."""

    listener: int
    owner: int
    kind: int
    staged_in: int
    origin: int
    is_kept: bool
    is_ceded: bool
    unfit: frozenset[int]


class Entries:
    """
    All live connections: a row of numbers each, by cookie what few of them have, and the tombstones of who ended.

    What stands here may be asked at any moment; rows are another's once their connections have ended.
    """

    def __init__(self) -> None:
        self._rows = Rows()
        self._descriptor = self._rows.column("i")
        self._listener = self._rows.column("I")
        self._owner = self._rows.column("I")
        self._epoch = self._rows.column("I")
        self._kind = self._rows.column("B")
        self._standing = self._rows.column("B")
        self._staged_in = self._rows.column("I")
        self._origin = self._rows.column("I")
        self._was_adopted = self._rows.column("B")
        self._since_s = self._rows.column("d")
        self.records: dict[int, Records] = {}  # the batch that it came with
        self.pushed: dict[int, list[tuple[int, bytes]]] = {}
        self.kept_because: dict[int, str] = {}
        self._unfit: dict[int, frozenset[int]] = {}
        self._ceded: dict[int, None] = {}
        self.tombstones: set[int] = set()  # what has ended since the move began
        self.owned: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return len(self._rows.places)

    def __contains__(self, cookie: object) -> bool:
        return cookie in self._rows.places

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.places)

    # ---- one

    def standing(self, cookie: int) -> Standing:
        code: int = self._standing[self._rows.places[cookie]]
        return _STANDINGS[code]

    def entry(self, cookie: int) -> Entry:
        """
        Return what there is to know of one.

        Raises:
            KeyError: it is not in the ledger.

        """
        row = self._rows.places[cookie]
        return Entry(
            cookie=cookie,
            descriptor=self._descriptor[row],
            listener=self._listener[row],
            owner=self._owner[row],
            epoch=self._epoch[row],
            kind=Kind(self._kind[row]),
            standing=_STANDINGS[self._standing[row]],
            staged_in=self._staged_in[row],
            origin=self._origin[row],
            was_adopted=bool(self._was_adopted[row]),
            record=self.record(cookie),
            is_ceded=cookie in self._ceded,
            kept_because=self.kept_because.get(cookie),
            pushed=tuple(self.pushed.get(cookie, ())),
            unfit=self._unfit.get(cookie, frozenset()),
            since_s=self._since_s[row],
        )

    def entries(self) -> Iterator[Entry]:
        return map(self.entry, list(self))

    def record(self, cookie: int) -> Record | None:
        """Return what it is to be gone on with from, while nobody serves it."""
        batch = self.records.get(cookie)
        return None if batch is None else batch.record_of(cookie)

    def is_unserved(self, cookie: int, worker: int) -> bool:
        """Whether *worker* froze it and nobody has served it since: its very coroutine can go on."""
        row = self._rows.places[cookie]
        return self._origin[row] == worker and not self._was_adopted[row]

    # ---- many

    def find(self, *standings: Standing, owners: Container[int] | None = None) -> list[int]:
        """Return those that stand so, or anyhow, and are of *owners*, or of anybody."""
        codes = {CODES[standing] for standing in standings or Standing}
        standing, owner = self._standing, self._owner
        return [
            cookie
            for cookie, row in self._rows.places.items()
            if standing[row] in codes and (owners is None or owner[row] in owners)
        ]

    def of(self, cookies: Iterable[int], standing: Standing) -> list[int]:
        """Return those of *cookies* that have not ended and stand so."""
        places, standings, code = self._rows.places, self._standing, CODES[standing]
        return [cookie for cookie in cookies if cookie in places and standings[places[cookie]] == code]

    def parked(self) -> list[int]:
        """Return all that nobody serves."""
        return self.of(self.records, Standing.PARKED)

    def column(self, name: Column, cookies: Collection[int]) -> list[int]:
        """Return one number of each."""
        if name == "cookie":
            return list(cookies)
        column: array.array[int] = getattr(self, f"_{name}")
        return list(picker(self._rows.of(cookies))(column))

    def without_copy(self, cookies: Sequence[int], worker: int) -> list[int]:
        """Return those of which *worker* has nothing: neither built, nor waiting in its coroutine."""
        at = picker(self._rows.of(cookies))
        staged_in = at(self._staged_in)
        if staged_in.count(worker) == len(staged_in):
            return []
        copies = zip(cookies, staged_in, at(self._origin), strict=True)
        return [cookie for cookie, staged_in, origin in copies if staged_in != worker != origin]

    def sort(self, cookies: Sequence[int], decide: Callable[[Case], T]) -> dict[T, list[int]]:
        """Put those together for whose cases *decide* says the same; it is asked once a case."""
        columns = self._cases(cookies)
        if all(len(set(column)) == 1 for column in columns):  # as a whole cut is, mostly
            return {decide(Case(*[column[0] for column in columns])): list(cookies)}
        cases = list(zip(*columns, strict=True))
        decided = {case: decide(Case(*case)) for case in dict.fromkeys(cases)}
        sorted_by: dict[T, list[int]] = {}
        for cookie, case in zip(cookies, cases, strict=True):
            sorted_by.setdefault(decided[case], []).append(cookie)
        return sorted_by

    def _cases(self, cookies: Sequence[int]) -> list[Sequence[Any]]:
        """Return the fields of the cases of *cookies*, as columns."""
        at = picker(self._rows.of(cookies))
        usual = (False,) * len(cookies)
        return [
            *map(at, (self._listener, self._owner, self._kind, self._staged_in, self._origin)),
            [cookie in self.kept_because for cookie in cookies] if self.kept_because else usual,
            [cookie in self._ceded for cookie in cookies] if self._ceded else usual,
            [self._unfit.get(cookie, _NOBODY) for cookie in cookies] if self._unfit else (_NOBODY,) * len(cookies),
        ]

    def records_for(self, cookies: Sequence[int], worker: int) -> Iterator[Records]:
        """
        Return what *worker* is to go on from, in their order: records, or with UNSERVED its own coroutines.

        Raises:
            IllegalEvent: there is no record of one.

        """
        if not self.records.keys() >= set(cookies):
            raise IllegalEvent(f"of {len(cookies)} connections one is without a record")
        batches = list(map(self.records.__getitem__, cookies))
        if worker in picker(self._rows.of(cookies))(self._origin):
            own = self._own_coroutines([cookie for cookie in cookies if self.is_unserved(cookie, worker)])
            waiting = set(own.cookie)
            batches = [own if cookie in waiting else batch for cookie, batch in zip(cookies, batches, strict=True)]
        return record_packets(cookies, batches)

    def _own_coroutines(self, cookies: Sequence[int]) -> Records:
        records = [self.records[cookie].record_of(cookie) for cookie in cookies]
        own = [Record(flags=record.flags | RecordFlag.UNSERVED, halted_ns=record.halted_ns) for record in records]
        return Records(cookie=tuple(cookies), **record_columns(own))

    # ---- may a worker say so?

    def _check(self, worker: int, said: Said, *codes: int) -> tuple[Said, Sequence[int]]:
        """
        See that *worker* may say this of all of them; return it without those that have ended meanwhile, and the rows.

        Raises:
            IllegalEvent: one is not its own, not in such a standing, at another epoch, or named twice.

        """
        cookies = tuple(said.cookie)
        if len(set(cookies)) != len(cookies):
            raise IllegalEvent(f"worker {worker} named a connection twice in one message")
        if self.tombstones and not self.tombstones.isdisjoint(cookies):
            said = said.only([place for place, cookie in enumerate(cookies) if cookie not in self.tombstones])
            cookies = tuple(said.cookie)
        try:
            rows = self._rows.of(cookies)
        except KeyError as unknown:
            raise IllegalEvent(f"connection {unknown} is not in the ledger") from None
        at = picker(rows)
        is_own = set(at(self._owner)) <= {worker} and set(at(self._standing)).issubset(codes)
        if not is_own or at(self._epoch) != tuple(said.epoch):
            self._complain(worker, zip(cookies, said.epoch, rows, strict=True), codes)
        return said, rows

    def _complain(self, worker: int, said: Iterable[tuple[int, int, int]], codes: Container[int]) -> None:
        """
        Name the first of which a worker may not speak, or not so: by cookie, epoch and row.

        Raises:
            IllegalEvent: always.

        """
        for cookie, epoch, row in said:
            if self._owner[row] != worker or self._standing[row] not in codes:
                standing, owner = self.standing(cookie).value, self._owner[row]
                raise IllegalEvent(f"worker {worker} spoke of connection {cookie}, {standing} by worker {owner}")
            if self._epoch[row] != epoch:
                due = self._epoch[row]
                raise IllegalEvent(f"worker {worker} spoke of connection {cookie} at epoch {epoch}, not {due}")

    @staticmethod
    def _check_kinds(worker: int, kinds: Sequence[int]) -> None:
        if not _KINDS.issuperset(kinds):
            unknown = min(set(kinds) - _KINDS)
            raise IllegalEvent(f"worker {worker} serves a connection as {unknown}, which is no kind")

    def _rows_standing(self, cookies: Sequence[int], *standings: Standing) -> Sequence[int]:
        """
        Return the rows of *cookies*.

        Raises:
            IllegalEvent: one stands otherwise.

        """
        rows = self._rows.of(cookies)
        wrong = set(picker(rows)(self._standing)).difference([CODES[standing] for standing in standings])
        if wrong:
            raise IllegalEvent(f"one of {len(rows)} connections is {_STANDINGS[min(wrong)].value}")
        return rows
