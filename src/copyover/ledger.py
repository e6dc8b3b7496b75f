"""
Who owns each connection, at which epoch.

It knows descriptors as names only and opens, closes and sends nothing. Its methods take whole messages, or the cookies
of many connections; each checks first and then changes, so that an illegal event leaves the ledger as it was.
"""

from __future__ import annotations

import array
import collections
import enum
import itertools
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import attrs

from copyover.errors import IllegalEvent
from copyover.messages import MAX_ROWS, Kind, Record, RecordFlag, Records, record_chunks, record_columns
from copyover.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence

    from copyover.messages import Adopted, Became, Cede, Frozen, Refused, Release

T = TypeVar("T")
Column = Literal["cookie", "descriptor", "listener", "owner", "epoch", "kind"]


class Standing(enum.Enum):
    """What the holder knows of a connection. All transitions are methods of the Ledger."""

    SERVED = "served"  # its owner serves it
    FREEZING = "freezing"  # its owner was asked to stop at a boundary
    PARKED = "parked"  # nobody serves it; the record is here
    THAWING = "thawing"  # its owner was given the record and has not said that it serves


_STANDINGS = tuple(Standing)
_CODES = {standing: code for code, standing in enumerate(_STANDINGS)}
_NOBODY: frozenset[int] = frozenset()
_SERVED, _FREEZING, _PARKED, _THAWING = _CODES.values()


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


@attrs.frozen
class Endings:
    """Connections that ended: the descriptors to close, and the copies to be dropped, by worker and cookie."""

    cookies: Sequence[int]
    descriptors: Sequence[int]
    copies: Sequence[tuple[int, int]]


class Ledger:
    """All live connections, and the tombstones of those that ended during the move."""

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
        self._of_passage = self._staged_in, self._origin, self._was_adopted, self._since_s
        # What few have, by cookie. A record is a batch, and the place in it.
        self.records: dict[int, tuple[Records, int]] = {}
        self.pushed: dict[int, list[tuple[int, bytes]]] = {}
        self.kept_because: dict[int, str] = {}
        self._unfit: dict[int, frozenset[int]] = {}
        self._ceded: dict[int, None] = {}
        self.tombstones: set[int] = set()
        self.is_moving = False
        self.now_s = 0.0  # of the event that is being handled; for since_s only
        self.owned: collections.Counter[int] = collections.Counter()

    # ---- what there is

    def __len__(self) -> int:
        return len(self._rows.places)

    def __contains__(self, cookie: int) -> bool:
        return cookie in self._rows.places

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.places)

    def find(self, *standings: Standing, owners: Container[int] | None = None) -> list[int]:
        """Return those that stand so, or anyhow, and are of *owners*, or of anybody."""
        codes = {_CODES[standing] for standing in standings or Standing}
        standing, owner = self._standing, self._owner
        return [
            cookie
            for cookie, row in self._rows.places.items()
            if standing[row] in codes and (owners is None or owner[row] in owners)
        ]

    def of(self, cookies: Iterable[int], standing: Standing) -> list[int]:
        """Return those of *cookies* that have not ended and stand so."""
        places, standings, code = self._rows.places, self._standing, _CODES[standing]
        return [cookie for cookie in cookies if cookie in places and standings[places[cookie]] == code]

    def parked(self) -> list[int]:
        """Return all that nobody serves."""
        return self.of(self.records, Standing.PARKED)

    def column(self, name: Column, cookies: Iterable[int]) -> list[int]:
        """Return one number of each."""
        if name == "cookie":
            return list(cookies)
        column: array.array[int] = getattr(self, f"_{name}")
        return list(map(column.__getitem__, self._rows.of(cookies)))

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
        batch, place = self.records.get(cookie, (None, 0))
        return None if batch is None else batch.record(place)

    def sort(self, cookies: Sequence[int], decide: Callable[[Case], T]) -> dict[T, list[int]]:
        """Put those together for whose cases *decide* says the same; it is asked once a case."""
        rows = self._rows.of(cookies)
        columns = (self._listener, self._owner, self._kind, self._staged_in, self._origin)
        keys = list(
            zip(  # noqa: B905  # the last may be without end
                *(map(column.__getitem__, rows) for column in columns),
                map(self.kept_because.__contains__, cookies),
                map(self._ceded.__contains__, cookies),
                (self._unfit.get(cookie, _NOBODY) for cookie in cookies) if self._unfit else itertools.repeat(_NOBODY),
            )
        )
        decided = {key: decide(Case(*key)) for key in dict.fromkeys(keys)}
        if len(decided) == 1:
            return {that: list(cookies) for that in decided.values()}
        sorted_by: dict[T, list[int]] = {}
        for cookie, key in zip(cookies, keys, strict=True):
            sorted_by.setdefault(decided[key], []).append(cookie)
        return sorted_by

    # ---- checks

    def _check(self, worker: int, cookies: Sequence[int], epochs: Sequence[int], *standings: Standing) -> Sequence[int]:
        """
        See that *worker* may say this of all of them; return the places of those that have not ended meanwhile.

        Raises:
            IllegalEvent: one is not its own, not in such a standing, at another epoch, or named twice.

        """
        if len(set(cookies)) != len(cookies):
            raise IllegalEvent(f"worker {worker} named a connection twice in one message")
        places: Sequence[int] = range(len(cookies))
        if not self.tombstones.isdisjoint(cookies):
            places = [place for place, cookie in enumerate(cookies) if cookie not in self.tombstones]
        codes = {_CODES[standing] for standing in standings}
        for place in places:
            row = self._rows.places.get(cookies[place], -1)
            if row < 0:
                raise IllegalEvent(f"connection {cookies[place]} is not in the ledger")
            if self._owner[row] != worker or self._standing[row] not in codes:
                raise IllegalEvent(
                    f"worker {worker} spoke of connection {cookies[place]}, "
                    f"{_STANDINGS[self._standing[row]].value} by worker {self._owner[row]}"
                )
            if self._epoch[row] != epochs[place]:
                raise IllegalEvent(
                    f"worker {worker} spoke of connection {cookies[place]} at epoch {epochs[place]}, "
                    f"not {self._epoch[row]}"
                )
        return places

    @staticmethod
    def _check_kinds(worker: int, kinds: Sequence[int]) -> None:
        unknown = set(kinds).difference(Kind)
        if unknown:
            raise IllegalEvent(f"worker {worker} serves a connection as {min(unknown)}, which is no kind")

    def _rows_standing(self, cookies: Sequence[int], *standings: Standing) -> list[int]:
        """
        Return the rows of *cookies*.

        Raises:
            IllegalEvent: one stands otherwise.

        """
        rows = self._rows.of(cookies)
        codes = {_CODES[standing] for standing in standings}
        found = set(map(self._standing.__getitem__, rows))
        if not found <= codes:
            raise IllegalEvent(f"a connection of {len(rows)} is {_STANDINGS[min(found - codes)].value}")
        return rows

    def _stand(self, rows: Iterable[int], code: int) -> None:
        standing, since_s, now_s = self._standing, self._since_s, self.now_s
        for row in rows:
            standing[row] = code
            since_s[row] = now_s

    # ---- they come and go

    def lend(
        self,
        worker: int,
        cookies: Sequence[int],
        descriptors: Sequence[int],
        listeners: Sequence[int],
        kinds: Sequence[int],
    ) -> None:
        """
        Take over a copy of each connection of a batch.

        Raises:
            IllegalEvent: counts that do not add up, a connection that is in the ledger, or an unknown kind.

        """
        if len(descriptors) != len(cookies) or len(set(cookies)) != len(cookies):
            raise IllegalEvent(f"worker {worker} lent {len(cookies)} connections that do not add up")
        self._check_kinds(worker, kinds)
        if not self._rows.places.keys().isdisjoint(cookies):
            known = next(cookie for cookie in cookies if cookie in self)
            raise IllegalEvent(f"worker {worker} lent connection {known}, which is in the ledger")
        self._add(cookies, owner=[worker] * len(cookies), descriptor=descriptors, listener=listeners, kind=kinds)

    def inherit(
        self, *, cookie: Sequence[int], owner: Sequence[int], kind: Sequence[int], **others: Sequence[int]
    ) -> None:
        """
        Take over what another holder served, in columns.

        Raises:
            IllegalEvent: a connection twice, or an unknown kind.

        """
        most = collections.Counter(cookie).most_common(1)
        if most and most[0][1] > 1:
            raise IllegalEvent(f"connection {most[0][0]} was lent twice")
        self._check_kinds(min(owner, default=0), kind)
        self._add(cookie, owner=owner, kind=kind, **others)

    def _add(self, cookies: Sequence[int], **columns: Sequence[int]) -> list[int]:
        rows = self._rows.add(cookies)
        for name, values in columns.items():
            column: array.array[int] = getattr(self, f"_{name}")
            for row, value in zip(rows, values, strict=True):
                column[row] = value
        self.owned.update(columns["owner"])
        return rows

    def restore(self, entry: Entry) -> None:
        """
        Take over a connection just as it is; what was pushed, and who cannot read it, nobody knows any more.

        Raises:
            IllegalEvent: it is in the ledger.

        """
        self.lend(entry.owner, [entry.cookie], [entry.descriptor], [entry.listener], [entry.kind])
        row = self._rows.places[entry.cookie]
        self._epoch[row], self._standing[row] = entry.epoch, _CODES[entry.standing]
        self._staged_in[row], self._origin[row] = entry.staged_in, entry.origin
        self._was_adopted[row] = entry.was_adopted
        if entry.record is not None:
            self._keep_records([entry.cookie], Records(**record_columns([entry.record])))
        if entry.is_ceded:
            self._ceded[entry.cookie] = None

    def became(self, worker: int, message: Became) -> None:
        """
        Its owner serves them as something else.

        Raises:
            IllegalEvent: one is not its own, or an unknown kind.

        """
        served = Standing.SERVED, Standing.FREEZING
        message = message.only(self._check(worker, message.cookie, message.epoch, *served))
        self._check_kinds(worker, message.kind)
        for row, kind in zip(self._rows.of(message.cookie), message.kind, strict=True):
            self._kind[row] = kind

    def release(self, worker: int, message: Release) -> tuple[Release, Endings]:
        """
        The owner says that they ended. Tombstones stay, so that nothing revives them.

        Raises:
            IllegalEvent: one is not its own.

        """
        owned = Standing.SERVED, Standing.FREEZING, Standing.THAWING
        message = message.only(self._check(worker, message.cookie, message.epoch, *owned))
        return message, self.lose(message.cookie)

    def lose(self, cookies: Sequence[int]) -> Endings:
        """They have ended, or nobody can serve them any more."""
        rows = self._rows.of(cookies)
        descriptors = list(map(self._descriptor.__getitem__, rows))
        copies = [pair for cookie, row in zip(cookies, rows, strict=True) for pair in self._copies(cookie, row)]
        self._disown(rows)
        if self.is_moving:
            self.tombstones.update(cookies)
        self._forget_rare(cookies)
        self._rows.remove(cookies)
        return Endings(cookies, descriptors, copies)

    def _copies(self, cookie: int, row: int) -> list[tuple[int, int]]:
        """Name who has a copy and does not serve it; of what is parked its last owner has one, too."""
        serving = 0 if self._standing[row] == _PARKED else self._owner[row]
        copies = {self._staged_in[row], self._origin[row]}.difference((0, serving))
        return [(worker, cookie) for worker in sorted(copies)]

    def _disown(self, rows: Sequence[int]) -> None:
        for worker, number in collections.Counter(map(self._owner.__getitem__, rows)).items():
            self.owned[worker] -= number

    # ---- on their way

    def begin(self) -> None:
        """A move begins: note who ends."""
        self.is_moving = True

    def stage(self, cookies: Sequence[int], worker: int) -> None:
        """They are built in *worker*, if they are in no other yet."""
        now_s = self.now_s
        for row in self._rows.of(cookies):
            if not self._staged_in[row]:
                self._staged_in[row] = worker
            self._since_s[row] = now_s

    def unstage(self, cookies: Iterable[int], workers: Container[int]) -> list[tuple[int, int]]:
        """Forget where they are built, if it is in *workers*; return who is to drop them."""
        copies = []
        for cookie in cookies:
            row = self._rows.places[cookie]
            if self._staged_in[row] in workers:
                copies.append((self._staged_in[row], cookie))
                self._staged_in[row] = 0
        return copies

    def without_copy(self, cookies: Sequence[int], worker: int) -> list[int]:
        """Return those of which *worker* has nothing: neither built, nor waiting in its coroutine."""
        staged_in, origin, rows = self._staged_in, self._origin, self._rows.of(cookies)
        return [c for c, row in zip(cookies, rows, strict=True) if worker not in (staged_in[row], origin[row])]

    def freeze(self, cookies: Sequence[int]) -> list[int]:
        """
        Their owners are asked to stop; return the epochs at which.

        Raises:
            IllegalEvent: one is neither served nor given to anybody.

        """
        rows = self._rows_standing(cookies, Standing.SERVED, Standing.THAWING)
        self._stand(rows, _FREEZING)
        return list(map(self._epoch.__getitem__, rows))

    def frozen(self, worker: int, message: Frozen) -> Frozen:
        """
        Their owner gives their records; those that have ended meanwhile are left out.

        Raises:
            IllegalEvent: one is not its own, was not asked for, or is of an unknown kind.

        """
        message = message.only(self._check(worker, message.cookie, message.epoch, Standing.FREEZING))
        self._check_kinds(worker, message.kind)
        rows = self._rows.of(message.cookie)
        for cookie, row, kind in zip(message.cookie, rows, message.kind, strict=True):
            self._kind[row] = kind
            if cookie in self.records:  # it gives back what it was given: there is no coroutine of it
                self._staged_in[row] = worker
            elif not self._origin[row]:  # the coroutine that can go on after a roll-back is the first that stopped
                self._origin[row] = worker
        self._keep_records(message.cookie, message)
        self._stand(rows, _PARKED)
        return message

    def _keep_records(self, cookies: Sequence[int], batch: Records) -> None:
        self.records.update(zip(cookies, zip(itertools.repeat(batch), range(batch.rows)), strict=True))

    def refuse(self, worker: int, message: Refused, *standings: Standing) -> tuple[list[int], list[int]]:
        """
        Return those that the owner keeps (answer to a freeze), and those whose records it gives back (to a thaw).

        Raises:
            IllegalEvent: one is not its own, or in none of *standings*.

        """
        message = message.only(self._check(worker, message.cookie, message.epoch, *standings))
        kept, given_back = [], []
        for cookie, reason in zip(message.cookie, message.reason, strict=True):
            self.kept_because[cookie] = reason.decode(errors="replace")
            # A freeze may have crossed the refusal of a thaw: the refuser holds nothing then, and our record stands.
            if cookie in self.records:
                given_back.append(cookie)
                self._unfit[cookie] = self._unfit.get(cookie, frozenset()) | {worker}
            else:
                kept.append(cookie)
        self._stand(self._rows.of(kept), _SERVED)
        rows = self._rows.of(given_back)
        self._stand(rows, _PARKED)
        self._forget_copies(rows, worker)
        return kept, given_back

    def thaw(self, cookies: Sequence[int], worker: int) -> list[int]:
        """
        Give parked connections to *worker*; return their epochs, each the next of its own.

        Raises:
            IllegalEvent: one is not parked.

        """
        rows = self._rows_standing(cookies, Standing.PARKED)
        self._disown(rows)
        self.owned[worker] += len(rows)
        for row in rows:
            self._owner[row] = worker
            self._epoch[row] += 1
        self._stand(rows, _THAWING)
        return list(map(self._epoch.__getitem__, rows))

    def adopt(self, worker: int, message: Adopted) -> tuple[Adopted, Adopted]:
        """
        They are served by *worker*: return those that have not ended meanwhile, and those that no freeze has crossed.

        Raises:
            IllegalEvent: one was not given to it.

        """
        message = message.only(self._check(worker, message.cookie, message.epoch, Standing.THAWING, Standing.FREEZING))
        rows = self._rows.of(message.cookie)
        for cookie, row in zip(message.cookie, rows, strict=True):
            self.records.pop(cookie, None)
            if self._origin[row] != worker:
                self._was_adopted[row] = True
        thawing = [place for place, row in enumerate(rows) if self._standing[row] == _THAWING]
        self._stand([rows[place] for place in thawing], _SERVED)  # of the others the answer to the freeze follows
        return message, message.only(thawing)

    def cede(self, worker: int, message: Cede) -> Cede:
        """
        Their owner, which retires, gives them up; the coroutines there wait until somebody else serves them.

        Raises:
            IllegalEvent: one is not its own, or is of an unknown kind.

        """
        message = message.only(self._check(worker, message.cookie, message.epoch, Standing.SERVED))
        self._check_kinds(worker, message.kind)
        rows = self._rows.of(message.cookie)
        self.forget(message.cookie)
        for row, kind in zip(rows, message.kind, strict=True):
            self._kind[row] = kind
            self._origin[row] = worker
        self._ceded.update(dict.fromkeys(message.cookie))
        self._keep_records(message.cookie, message)
        self._stand(rows, _PARKED)
        return message

    def relieve(self, cookies: Iterable[int]) -> list[tuple[int, int]]:
        """Somebody serves what was ceded: return who is to drop its copy."""
        copies = []
        for cookie in self._ceded.keys() & cookies:
            del self._ceded[cookie]
            row = self._rows.places[cookie]
            if self._origin[row] not in (0, self._owner[row]):
                copies.append((self._origin[row], cookie))
                self._origin[row] = 0
        return copies

    def park(self, cookies: Sequence[int]) -> None:
        """
        Take back what a worker that died had been given and did not serve.

        Raises:
            IllegalEvent: of one the record is of the past.

        """
        if not self.records.keys() >= set(cookies):
            raise IllegalEvent(f"of {len(cookies)} connections a record is of the past")
        self._stand(self._rows.of(cookies), _PARKED)

    def recover(self, records: Mapping[int, Record]) -> None:
        """Take over what a dead worker served, from its last boundary; what it was, only the ledger tells."""
        cookies, found = list(records), list(records.values())
        rows = self._rows.of(cookies)
        for cut in record_chunks(found, MAX_ROWS):
            kinds = tuple([self._kind[row] for row in rows[cut]])
            batch = Records(**(record_columns(found[cut]) | {"kind": kinds}))
            self._keep_records(cookies[cut], batch)
        for row in rows:
            self._was_adopted[row] = True
        self._stand(rows, _PARKED)

    def records_for(self, cookies: Sequence[int], worker: int) -> list[tuple[Records, int]]:
        """
        Return what *worker* is to go on from: records, or with UNSERVED its own coroutines.

        Raises:
            IllegalEvent: there is no record of one.

        """
        try:
            found = list(map(self.records.__getitem__, cookies))
        except KeyError as missing:
            raise IllegalEvent(f"connection {missing} is without a record") from None
        unserved = [place for place, cookie in enumerate(cookies) if self.is_unserved(cookie, worker)]
        own = [batch.record(place) for batch, place in map(found.__getitem__, unserved)]
        own = [Record(flags=record.flags | RecordFlag.UNSERVED, halted_ns=record.halted_ns) for record in own]
        batch = Records(**record_columns(own))
        for number, place in enumerate(unserved):
            found[place] = batch, number
        return found

    def is_unserved(self, cookie: int, worker: int) -> bool:
        """Whether *worker* froze it and nobody has served it since: its very coroutine can go on."""
        row = self._rows.places[cookie]
        return self._origin[row] == worker and not self._was_adopted[row]

    # ---- forgetting

    def forget_others(self, cookies: Sequence[int]) -> list[tuple[int, int]]:
        """They stay with their owners: return who is to drop copies."""
        rows = self._rows.of(cookies)
        copies = [pair for cookie, row in zip(cookies, rows, strict=True) for pair in self._copies(cookie, row)]
        for row in rows:
            self._staged_in[row] = self._origin[row] = 0
        return copies

    def forget_copies(self, worker: int) -> None:
        """The worker is dead: nothing is staged in it, and no coroutine of it waits."""
        self._forget_copies(self._rows.places.values(), worker)

    def _forget_copies(self, rows: Iterable[int], worker: int) -> None:
        for column in (self._staged_in, self._origin):
            for row in [row for row in rows if column[row] == worker]:
                column[row] = 0

    def forget(self, cookies: Collection[int]) -> None:
        """Nothing that is of their way counts any more."""
        for row in self._rows.of(cookies):
            for column in self._of_passage:
                column[row] = 0
        self._forget_rare(cookies)

    def _forget_rare(self, cookies: Collection[int]) -> None:
        for rare in (self.records, self.pushed, self.kept_because, self._unfit, self._ceded):
            for cookie in rare.keys() & cookies:
                del rare[cookie]

    def forget_passages(self) -> None:
        """What is parked keeps its record: nobody else has it. Who ceded it waits on. What is given goes its way."""
        parked, given = self.parked(), self.of(self.records, Standing.THAWING)
        lasting = {row: [column[row] for column in self._of_passage] for row in self._rows.of(given)}
        for cookie, row in zip(parked, self._rows.of(parked), strict=True):
            is_ceded = cookie in self._ceded
            lasting[row] = [0, self._origin[row] if is_ceded else 0, self._was_adopted[row] or not is_ceded, 0]
        for column in self._of_passage:
            column[:] = array.array(column.typecode, bytes(len(column) * column.itemsize))
        for row, numbers in lasting.items():
            for column, number in zip(self._of_passage, numbers, strict=True):
                column[row] = number
        self.records = {cookie: self.records[cookie] for cookie in (*parked, *given)}
        self.pushed = {cookie: acts for cookie, acts in self.pushed.items() if cookie in self.records}
        self._ceded = {cookie: None for cookie in self._ceded if cookie in self.records}
        self.kept_because = {cookie: self.kept_because[cookie] for cookie in given if cookie in self.kept_because}
        self._unfit = {cookie: self._unfit[cookie] for cookie in given if cookie in self._unfit}

    def settle(self) -> None:
        """The move is over: forget origins, tombstones, and the records of what is served."""
        self.is_moving = False
        self.forget_passages()
        self.tombstones.clear()
