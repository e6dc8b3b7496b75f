"""
What happens while no change is under way, and what is the same in every phase.

Connections come and go, workers die and are restored, what they left is parked, and it all ends. Which of it is called
when is the table's business, in reload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from copyover import messages
from copyover.change import Phase
from copyover.errors import IllegalEvent
from copyover.events import Finished, Outcome, Result
from copyover.holdings import Holdings, Strength
from copyover.parking import Parking

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.change import Change
    from copyover.events import Died, Event, FromWorker, Reaped, Reload, StopAsked
    from copyover.holdings import Worker
    from copyover.ledger import Ledger
    from copyover.move import Move


class Peace:
    """The holder's mind without its changes: what it has, the phase, and the change under way."""

    _CHECKS: ClassVar[dict[Phase, Callable[..., None]]] = {}  # by phase: see whether it is over

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.holdings = Holdings(capacity)
        self.parking = Parking(self.holdings)
        self.phase = Phase.SERVING
        self.change: Change | None = None
        self._is_remembered = False
        self._stop_wanted: StopAsked | None = None
        self._now_s = 0.0

    @property
    def ledger(self) -> Ledger:
        return self.holdings.ledger

    @property
    def _under_way(self) -> Change:
        if self.change is None:
            raise IllegalEvent("no change is under way")
        return self.change

    @property
    def _move(self) -> Move:
        return self._under_way.move

    def _enter(self, phase: Phase) -> None:
        change = self._under_way
        spent_ms = change.leave_phase(self.phase, self._now_s)
        self.phase = phase
        self.holdings.note("phase", phase=phase.value, change=change.asked.generation, previous_ms=spent_ms)

    def _check(self) -> None:
        """See whether the phase is over."""
        check = self._CHECKS.get(self.phase)
        if check is not None:
            check(self)

    # ---- connections come and go

    def _lend(self, event: FromWorker) -> None:
        self.holdings.lend(event)

    def _became(self, event: FromWorker) -> None:
        self.holdings.became(event)

    def _forward(self, event: FromWorker) -> None:
        self.holdings.forward(event)

    def _release(self, event: FromWorker) -> None:
        ended = self.holdings.release(event)
        if self.parking.given:
            self.parking.settled(ended)
        if self.holdings.regain_room():
            for worker in self.holdings.serving():
                self.holdings.admit(worker.id)

    def _ceded(self, event: FromWorker) -> None:
        """What a retiring worker had kept has come to a boundary: who serves goes on with it."""
        self.holdings.cede(event)
        self.parking.place()

    def _ceded_while_stopping(self, event: FromWorker) -> None:
        self.parking.give_back(self.holdings.cede(event))

    def _frozen_late(self, event: FromWorker) -> None:
        """All that the freeze named had ended or refused before: the move did not wait for this."""
        if event.message.rows:
            raise IllegalEvent(f"worker {event.worker} froze connections while {self.phase.value}")

    def _accept_off_acked_in_peace(self, event: FromWorker) -> None:
        """The holder was full, or a roll-back ended before this came."""
        self.holdings.accept_off_acked(event)

    # ---- workers come and go

    def _mark_ready(self, event: FromWorker) -> None:
        worker = self.holdings.workers[event.worker]
        abilities = messages.expect(event.message, messages.Ready)
        if worker.strength is not Strength.BOOTING or not all(type(schema) is int for schema in abilities.reads):
            raise IllegalEvent(f"worker {worker.id} is {worker.strength.value} and says ready with {abilities.reads}")
        worker.strength, worker.abilities = Strength.READY, abilities

    def _ready_again(self, event: FromWorker) -> None:
        self._mark_ready(event)
        self.holdings.admit(event.worker)
        self.holdings.note("restarted", worker=event.worker, generation=self.holdings.generation)
        self.parking.place()

    def _failed_alone(self, event: FromWorker) -> None:
        """No change hangs on it; if it is going, its death will tell."""
        reason = messages.expect(event.message, messages.Failed).reason
        self.holdings.note("failed", worker=event.worker, reason=reason)

    def _reaped(self, event: Reaped) -> None:
        """Who is to go on with what it left boots while that is looked at."""
        worker = self.holdings.workers[event.worker]
        if worker.strength is Strength.READY:
            worker.strength = Strength.DYING
            self.holdings.restore_strength()

    def _died_in_peace(self, event: Died) -> None:
        worker = self._bury_and_park(event)
        if worker.strength is not Strength.RETIRING:
            self.holdings.restore_strength()

    def _bury_and_park(self, event: Died) -> Worker:
        """Its connections go to another worker of the serving generation, or wait for a fresh one."""
        burial = self.holdings.bury(event)
        if self.change is not None:
            self._move.note_burial(burial)
        self.parking.settled([*burial.lost, *burial.ended, *burial.parked])
        self.parking.place()
        return burial.worker

    # ---- what a killed worker left, while no move is under way

    def _adopted_in_peace(self, event: FromWorker) -> None:
        self.parking.adopted(event)
        self._check()

    def _refused_in_peace(self, event: FromWorker) -> None:
        self.parking.refused(event)
        self._check()

    # ---- what comes at the wrong moment

    def _busy(self, event: Reload) -> None:
        if event.is_remembered:
            self._is_remembered = True
            self.holdings.note("remembered", phase=self.phase.value)
            return
        serving = self.holdings.generation
        error = f"another change is under way ({self.phase.value}); it was not disturbed"
        result = Result(Outcome.BUSY, serving, serving, serving, error=error)
        self.holdings.effects.append(Finished(event.asker, result))

    def _void(self, _: Event) -> None:
        """It speaks of what is over."""

    # ---- the end

    def _stop(self, event: StopAsked) -> None:
        self.phase = Phase.STOPPING
        self.holdings.note("phase", phase="stopping", drain_s=event.drain_s)
        for worker in list(self.holdings.workers.values()):
            if worker.strength is Strength.BOOTING:
                self.holdings.kill(worker.id)
            else:
                self.holdings.send(worker.id, messages.Stop(drain_ms=int(event.drain_s * 1000)))
        # No worker will come to take these.
        self.parking.give_back(self.ledger.parked())
        self.holdings.set_timer("stop", event.drain_s + 5)
        self._check_stopped()

    def _stop_at_once(self, _: Event) -> None:
        for worker in list(self.holdings.workers):
            self.holdings.kill(worker)

    def _died_while_stopping(self, event: Died) -> None:
        """Nobody takes over any more what it had."""
        self.parking.give_back(self.holdings.bury(event).parked)
        self._check_stopped()

    def _check_stopped(self) -> None:
        if not self.holdings.workers:
            self.phase = Phase.STOPPED
            self.holdings.note("phase", phase="stopped")
