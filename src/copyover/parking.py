"""
Connections that nobody serves while no move is under way: their worker died or gave them up, and they wait for another.

A move takes them along instead, as soon as it stages; which of the two acts is decided in reload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copyover import messages
from copyover.entries import Standing
from copyover.holdings import Strength, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from copyover.events import FromWorker
    from copyover.holdings import Holdings


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
        owned = self._holdings.ledger.owned
        loads = {worker.id: owned[worker.id] for worker in serving}
        for target, cookies in spread(self._holdings.ledger.parked(), loads).items():
            self._holdings.stage(target, cookies)
            self._give(target, cookies)
            self._holdings.note("resuming", worker=target, connections=len(cookies))

    def give_back(self, parked: Sequence[int]) -> None:
        """Nobody else can serve these: let those who ceded them go on; what nobody ceded is lost."""
        per_ceder = self._holdings.ledger.sort(parked, self._holdings.ceder)
        self._holdings.lose(per_ceder.pop(None, []))
        for ceder, cookies in per_ceder.items():
            if ceder is not None:
                self._give(ceder, cookies)
                self._holdings.note("given-back", worker=ceder, connections=len(cookies))

    def _give(self, worker: int, cookies: Sequence[int]) -> None:
        self._holdings.thaw(worker, cookies)
        self.given.update(dict.fromkeys(cookies, worker))

    def expect(self, cookies: Iterable[int]) -> None:
        """Wait for those of *cookies* that a move has given to somebody, and that it did not wait for."""
        ledger = self._holdings.ledger
        given = ledger.of(cookies, Standing.THAWING)
        self.given.update(zip(given, ledger.column("owner", given), strict=True))

    def adopted(self, event: FromWorker) -> None:
        """
        The sender serves these now.

        Raises:
            IllegalEvent: one was not given to it.

        """
        served = self._holdings.adopt(event).cookie
        self._holdings.ledger.forget(served)
        self.settled(served)

    def refused(self, event: FromWorker) -> None:
        """
        The sender cannot read these: another worker of its release could not either.

        Who ceded one serves it on; of the others the clients are told.

        Raises:
            IllegalEvent: one was not given to it.

        """
        message = messages.expect(event.message, messages.Refused)
        ledger = self._holdings.ledger
        _, unreadable = ledger.refuse(event.worker, message, Standing.THAWING)
        for cookie in unreadable:
            self._holdings.note("unreadable", connection=cookie, reason=ledger.kept_because[cookie])
        self.settled(message.cookie)
        self.give_back(unreadable)

    def settled(self, cookies: Iterable[int]) -> None:
        """These are adopted, parked anew, or have ended; who has adopted its last may collect its garbage again."""
        workers = {self.given.pop(cookie) for cookie in cookies if cookie in self.given}
        for worker in self._holdings.living(workers.difference(self.given.values())):
            if worker.strength is not Strength.RETIRING:  # who ceded them holds its garbage back for nothing
                self._holdings.send(worker.id, messages.MoveOver())
