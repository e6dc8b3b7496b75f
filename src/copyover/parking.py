"""
Connections that nobody serves while no move is under way: their worker died, and they wait for another one.

A move takes them along instead, as soon as it stages; which of the two acts is decided in reload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from copyover import messages
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
        per_worker: dict[int, list[tuple[Entry, messages.Record]]] = {}
        for entry in self._holdings.ledger.entries.values():
            record = entry.moving.record if entry.standing is Standing.PARKED else None
            if record is not None:
                alone = attrs.evolve(record, flags=record.flags & ~messages.RecordFlag.CUT)  # the cut it was of is gone
                owned = self._holdings.ledger.owned
                target = min(serving, key=lambda worker: owned[worker.id] + len(per_worker.get(worker.id, ()))).id
                per_worker.setdefault(target, []).append((entry, alone))
        for target, rows in per_worker.items():
            self._holdings.stage(target, [entry for entry, _ in rows])
            self._holdings.thaw(target, rows)
            self.given.update(dict.fromkeys([entry.cookie for entry, _ in rows], target))
            self._holdings.note("resuming", worker=target, connections=len(rows))

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
        The sender cannot read these: another worker of its release could not either, their clients are told.

        Raises:
            IllegalEvent: one was not given to it.

        """
        message = messages.expect(event.message, messages.Refused)
        ledger = self._holdings.ledger
        ledger.check(event.worker, message.cookie, message.epoch, (Standing.THAWING,))
        for cookie, reason in zip(message.cookie, message.reason, strict=True):
            if not ledger.is_late(cookie):
                self._holdings.note("unreadable", connection=cookie, reason=reason.decode(errors="replace"))
                self._holdings.lose(cookie)
        self.settled(message.cookie)

    def settled(self, cookies: Iterable[int]) -> None:
        """These are adopted, parked anew, or have ended; who has adopted its last may collect its garbage again."""
        workers = {self.given.pop(cookie) for cookie in cookies if cookie in self.given}
        for worker in workers.difference(self.given.values()):
            self._holdings.send(worker, messages.MoveOver())
