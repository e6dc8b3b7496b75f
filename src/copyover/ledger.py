"""
Who owns each connection, at which epoch.

It knows descriptors as names only and opens, closes and sends nothing. Its methods take whole messages, or the cookies
of many connections; each checks first and then changes, so that an illegal event leaves the ledger as it was.
"""

from __future__ import annotations

import array
import collections
from typing import TYPE_CHECKING

import attrs

from copyover.columns import picker
from copyover.entries import CODES, Entries, Standing
from copyover.errors import IllegalEvent
from copyover.messages import MAX_ROWS, Record, Records, record_chunks, record_columns

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Mapping, Sequence

    from copyover.entries import Entry
    from copyover.messages import Adopted, Became, Cede, Frozen, Refused, Release

_SERVED, _FREEZING, _PARKED, _THAWING = CODES.values()


@attrs.frozen
class Endings:
    """Connections that ended: the descriptors to close, and the copies to be dropped, by worker and cookie."""

    cookies: Sequence[int]
    descriptors: Sequence[int]
    copies: Sequence[tuple[int, int]]


class Ledger(Entries):
    """What becomes of connections: they come, move, are parked and end."""

    def __init__(self) -> None:
        super().__init__()
        self._of_passage = self._staged_in, self._origin, self._was_adopted, self._since_s
        self.is_moving = False
        self.now_s = 0.0  # of the event that is being handled; for since_s only

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
        self.owned[worker] += len(cookies)

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
        self.owned.update(owner)

    def _add(self, cookies: Sequence[int], **columns: Sequence[int]) -> list[int]:
        rows = self._rows.add(cookies)
        for name, values in columns.items():
            column: array.array[int] = getattr(self, f"_{name}")
            for row, value in zip(rows, values, strict=True):
                column[row] = value
        return rows

    def restore(self, entry: Entry) -> None:
        """
        Take over a connection just as it is; what was pushed, and who cannot read it, nobody knows any more.

        Raises:
            IllegalEvent: it is in the ledger.

        """
        self.lend(entry.owner, [entry.cookie], [entry.descriptor], [entry.listener], [entry.kind])
        row = self._rows.places[entry.cookie]
        self._epoch[row], self._standing[row] = entry.epoch, CODES[entry.standing]
        self._staged_in[row], self._origin[row] = entry.staged_in, entry.origin
        self._was_adopted[row] = entry.was_adopted
        if entry.record is not None:
            self.records[entry.cookie] = Records(cookie=(entry.cookie,), **record_columns([entry.record]))
        if entry.is_ceded:
            self._ceded[entry.cookie] = None

    def became(self, worker: int, message: Became) -> None:
        """
        Its owner serves them as something else.

        Raises:
            IllegalEvent: one is not its own, or an unknown kind.

        """
        message, rows = self._check(worker, message, _SERVED, _FREEZING)
        self._check_kinds(worker, message.kind)
        self._name_kinds(rows, message.kind)

    def release(self, worker: int, message: Release) -> tuple[Release, Endings]:
        """
        The owner says that they ended. Tombstones stay, so that nothing revives them.

        Raises:
            IllegalEvent: one is not its own.

        """
        message, _ = self._check(worker, message, _SERVED, _FREEZING, _THAWING)
        return message, self.lose(message.cookie)

    def lose(self, cookies: Sequence[int]) -> Endings:
        """They have ended, or nobody can serve them any more."""
        rows = self._rows.of(cookies)
        descriptors = list(picker(rows)(self._descriptor))
        copies = self._copies(cookies, rows)
        self._disown(rows)
        if self.is_moving:
            self.tombstones.update(cookies)
        self._forget_rare(cookies)
        self._rows.remove(cookies)
        return Endings(cookies, descriptors, copies)

    def _copies(self, cookies: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int]]:
        """Name who has copies and does not serve them; of what is parked its last owner has one, too."""
        at = picker(rows)
        staged_in, origin = at(self._staged_in), at(self._origin)
        copies: list[tuple[int, int]] = []
        if not (any(staged_in) or any(origin)):
            return copies
        for cookie, row, *workers in zip(cookies, rows, staged_in, origin, strict=True):
            serving = 0 if self._standing[row] == _PARKED else self._owner[row]
            copies += [(worker, cookie) for worker in dict.fromkeys(workers) if worker not in (0, serving)]
        return copies

    def _disown(self, rows: Sequence[int]) -> None:
        owners = picker(rows)(self._owner)
        for worker in set(owners):
            self.owned[worker] -= owners.count(worker)

    # ---- on their way

    def begin(self) -> None:
        """A move begins: note who ends."""
        self.is_moving = True

    def stage(self, cookies: Sequence[int], worker: int) -> None:
        """They are built in *worker*, if they are in no other yet."""
        staged_in, since_s, now_s = self._staged_in, self._since_s, self.now_s
        for row in self._rows.of(cookies):
            staged_in[row] = staged_in[row] or worker
            since_s[row] = now_s

    def unstage(self, cookies: Iterable[int], workers: Container[int]) -> list[tuple[int, int]]:
        """Forget where they are built, if it is in *workers*; return who is to drop them."""
        copies = []
        for cookie in cookies:
            row = self._rows.places[cookie]
            if self._staged_in[row] in workers:
                copies.append((self._staged_in[row], cookie))
                self._staged_in[row] = 0
        return copies

    def freeze(self, cookies: Sequence[int]) -> list[int]:
        """
        Their owners are asked to stop; return the epochs at which.

        Raises:
            IllegalEvent: one is neither served nor given to anybody.

        """
        rows = self._rows_standing(cookies, Standing.SERVED, Standing.THAWING)
        self._stand(rows, _FREEZING)
        return list(picker(rows)(self._epoch))

    def frozen(self, worker: int, message: Frozen) -> Frozen:
        """
        Their owner gives their records; those that have ended meanwhile are left out.

        Raises:
            IllegalEvent: one is not its own, was not asked for, or is of an unknown kind.

        """
        message, rows = self._check(worker, message, _FREEZING)
        self._check_kinds(worker, message.kind)
        self._note_origin(worker, message.cookie, rows)
        self._name_kinds(rows, message.kind)
        self.records.update(dict.fromkeys(message.cookie, message))
        self._stand(rows, _PARKED)
        return message

    def _note_origin(self, worker: int, cookies: Sequence[int], rows: Sequence[int]) -> None:
        """Who gives back what it was given has no coroutine of it; else the first that stopped it can go on with it."""
        if self.records.keys().isdisjoint(cookies):
            given: set[int] = set()
        else:
            given = {row for cookie, row in zip(cookies, rows, strict=True) if cookie in self.records}
        staged_in, origin = self._staged_in, self._origin
        for row in rows:
            if row in given:
                staged_in[row] = worker
            elif not origin[row]:
                origin[row] = worker

    def _name_kinds(self, rows: Sequence[int], kinds: Sequence[int]) -> None:
        if picker(rows)(self._kind) != tuple(kinds):
            for row, kind in zip(rows, kinds, strict=True):
                self._kind[row] = kind

    def refuse(self, worker: int, message: Refused, *standings: Standing) -> tuple[list[int], list[int]]:
        """
        Return those that the owner keeps (answer to a freeze), and those whose records it gives back (to a thaw).

        Raises:
            IllegalEvent: one is not its own, or in none of *standings*.

        """
        message, _ = self._check(worker, message, *[CODES[standing] for standing in standings])
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
        owner, epoch = self._owner, self._epoch
        for row in rows:
            owner[row] = worker
            epoch[row] += 1
        self._stand(rows, _THAWING)
        return list(picker(rows)(epoch))

    def adopt(self, worker: int, message: Adopted) -> tuple[Adopted, Adopted]:
        """
        They are served by *worker*: return those that have not ended meanwhile, and those that no freeze has crossed.

        Raises:
            IllegalEvent: one was not given to it.

        """
        message, rows = self._check(worker, message, _THAWING, _FREEZING)
        for cookie in message.cookie:
            self.records.pop(cookie, None)
        origin, was_adopted = self._origin, self._was_adopted
        for row in rows:
            if origin[row] != worker:
                was_adopted[row] = True
        served = message
        standings = picker(rows)(self._standing)
        if _FREEZING in standings:  # the answer to that freeze follows
            thawing = [place for place, standing in enumerate(standings) if standing == _THAWING]
            served, rows = message.only(thawing), picker(thawing)(rows)
        self._stand(rows, _SERVED)
        return message, served

    def cede(self, worker: int, message: Cede) -> Cede:
        """
        Their owner, which retires, gives them up; the coroutines there wait until somebody else serves them.

        Raises:
            IllegalEvent: one is not its own, or is of an unknown kind.

        """
        message, rows = self._check(worker, message, _SERVED)
        self._check_kinds(worker, message.kind)
        self.forget(message.cookie)
        self._name_kinds(rows, message.kind)
        for row in rows:
            self._origin[row] = worker
        self._ceded.update(dict.fromkeys(message.cookie))
        self.records.update(dict.fromkeys(message.cookie, message))
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
        kinds = picker(rows)(self._kind)
        for cut in record_chunks(found, MAX_ROWS):
            batch = Records(**(record_columns(found[cut]) | {"kind": kinds[cut], "cookie": tuple(cookies[cut])}))
            self.records.update(dict.fromkeys(batch.cookie, batch))
        for row in rows:
            self._was_adopted[row] = True
        self._stand(rows, _PARKED)

    # ---- forgetting

    def forget_others(self, cookies: Sequence[int]) -> list[tuple[int, int]]:
        """They stay with their owners: return who is to drop copies."""
        rows = self._rows.of(cookies)
        copies = self._copies(cookies, rows)
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
            if rare:
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
