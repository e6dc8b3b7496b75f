"""
Connections that nobody serves while no move is under way: their worker died or gave them up, and they wait for another.

A move takes them along instead, as soon as it stages; which of the two acts is decided in reload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copyover import messages
from copyover.holdings import Strength
from copyover.ledger import Standing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from copyover.events import FromWorker
    from copyover.holdings import Holdings
    from copyover.ledger import Entry


class Parking:
    """*given* are those that a worker was given and has not adopted yet, with that worker."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self.given: dict[int, int] = {}

    def place(self) -> None:
        """Give what is parked to the serving generation; while no worker of it is ready, it waits."""
        serving = self._holdings.serving()
        if not serving:
            return
        per_worker: dict[int, list[Entry]] = {}
        owned = self._holdings.ledger.owned
        for entry in self._holdings.ledger.entries.values():
            if entry.standing is Standing.PARKED:
                target = min(serving, key=lambda worker: owned[worker.id] + len(per_worker.get(worker.id, ()))).id
                per_worker.setdefault(target, []).append(entry)
        for target, entries in per_worker.items():
            self._holdings.stage(target, entries)
            self._give(target, entries)
            self._holdings.note("resuming", worker=target, connections=len(entries))

    def give_back(self, parked: Iterable[Entry]) -> None:
        """Nobody else can serve these: let those who ceded them go on; what nobody ceded is lost."""
        per_worker: dict[int, list[Entry]] = {}
        for entry in parked:
            ceder = self._holdings.ceder(entry)
            if ceder is None:
                self._holdings.lose(entry.cookie)
            else:
                per_worker.setdefault(ceder, []).append(entry)
        for ceder, entries in per_worker.items():
            self._give(ceder, entries)
            self._holdings.note("given-back", worker=ceder, connections=len(entries))

    def _give(self, worker: int, entries: list[Entry]) -> None:
        ledger = self._holdings.ledger
        self._holdings.thaw(worker, [(entry, ledger.record_for(entry, worker)) for entry in entries])
        self.given.update(dict.fromkeys([entry.cookie for entry in entries], worker))

    def expect(self, cookies: Iterable[int]) -> None:
        """Wait for those of *cookies* that a move has given to somebody, and that it did not wait for."""
        found = map(self._holdings.ledger.entries.get, cookies)
        self.given |= {entry.cookie: entry.owner for entry in found if entry and entry.standing is Standing.THAWING}

    def adopted(self, event: FromWorker) -> None:
        """
        The sender serves these now.

        Raises:
            IllegalEvent: one was not given to it.

        """
        served = [entry for entry, _ in self._holdings.adopt(event)]
        for entry in served:
            entry.passage = None
        self.settled(entry.cookie for entry in served)

    def refused(self, event: FromWorker) -> None:
        """
        The sender cannot read these: another worker of its release could not either.

        Who ceded one serves it on; of the others the clients are told.

        Raises:
            IllegalEvent: one was not given to it.

        """
        message = messages.expect(event.message, messages.Refused)
        ledger = self._holdings.ledger
        ledger.check(event.worker, message.cookie, message.epoch, (Standing.THAWING,))
        unreadable: list[Entry] = []
        for cookie, reason in zip(message.cookie, message.reason, strict=True):
            if not ledger.is_late(cookie):
                why = reason.decode(errors="replace")
                self._holdings.note("unreadable", connection=cookie, reason=why)
                unreadable.append(ledger.refuse(event.worker, cookie, why))
        self.settled(message.cookie)
        self.give_back(unreadable)

    def settled(self, cookies: Iterable[int]) -> None:
        """These are adopted, parked anew, or have ended; who has adopted its last may collect its garbage again."""
        workers = {self.given.pop(cookie) for cookie in cookies if cookie in self.given}
        for worker in self._holdings.living(workers.difference(self.given.values())):
            if worker.strength is not Strength.RETIRING:  # who ceded them holds its garbage back for nothing
                self._holdings.send(worker.id, messages.MoveOver())
