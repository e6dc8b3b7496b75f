"""
How a change ends other than by its commit: refused, cancelled, rolled back, and what deaths in it mean.

While nothing has moved the replacement goes and the incumbent never noticed; later everything returns, with the newest
record of each connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copyover import messages
from copyover.change import Phase
from copyover.errors import StartupFailed
from copyover.events import AskAgain, CheckHealth, Finished, Outcome
from copyover.peace import Peace

if TYPE_CHECKING:
    from copyover.events import CancelAsked, Died, Event, FromWorker, StopAsked

ROLL_BACK_S = 5.0  # beyond the time that connections have to reach a boundary


class Undoing(Peace):
    """The ways back, and the end of every change."""

    # ---- refused

    def _refuse(self, reason: str, status: int = 3) -> None:
        """Nothing has moved: the replacement goes, the incumbent never noticed."""
        change = self._under_way
        change.reason, change.status = reason, status
        self.holdings.ledger.forget_passages()
        for replacement in change.move.replacements:
            self.holdings.kill(replacement)
        self._enter(Phase.SERVING)
        self._finish(Outcome.REFUSED)

    def _failed_before_move(self, event: FromWorker) -> None:
        failed = messages.expect(event.message, messages.Failed)
        if event.worker in self._move.replacements:
            self._refuse(failed.reason, failed.status)
        else:
            self._failed_alone(event)

    def _cancel_before_move(self, event: CancelAsked) -> None:
        self._refuse(event.reason)

    def _too_late_to_start(self, _: Event) -> None:
        asked = self._under_way.asked
        phase = self.phase.value
        too_late = f"generation {asked.generation} was not ready within {asked.timeout_s:g} s (still {phase})"
        self._refuse(too_late, StartupFailed.exit_code)

    def _stop_instead(self, event: StopAsked) -> None:
        self._stop_wanted = event
        self._refuse("the holder was told to stop")

    # ---- rolled back

    def _failed_in_move(self, event: FromWorker) -> None:
        # Also the incumbent's word that its shared state cannot travel; it serves on.
        self._roll_back(messages.expect(event.message, messages.Failed).reason)

    def _cancel(self, event: CancelAsked) -> None:
        self._roll_back(event.reason)

    def _too_late_to_move(self, _: Event) -> None:
        self._roll_back(f"the move did not end within {self._under_way.asked.timeout_s:g} s")

    def _roll_back(self, reason: str) -> None:
        change = self._under_way
        change.reason, change.status = reason, 3
        self._enter(Phase.ROLLING_BACK)
        self.holdings.set_timer("change", change.asked.boundary_s + ROLL_BACK_S)
        change.move.turn_back()
        self._check_back()

    def _accept_off_acked_in_roll_back(self, event: FromWorker) -> None:
        """The replacement's last lends are in; they go back too."""
        worker = self.holdings.workers[event.worker]
        if self.holdings.accept_off_acked(event):
            worker.is_off = True
            self._move.freeze_replacements()
            self._check_back()

    def _check_back(self) -> None:
        change, move, holdings = self._under_way, self._move, self.holdings
        if not move.living_incumbents():
            self._go_forward()
            return
        if not move.is_back:
            return
        self._enter(Phase.SERVING)
        for incumbent in move.living_incumbents():
            holdings.send(incumbent.id, messages.MoveOver())
        for replacement in move.living_replacements():
            if holdings.ledger.owned[replacement.id]:
                holdings.retire(replacement, change.asked.drain_s)
            else:
                holdings.kill(replacement.id)
        self._finish(Outcome.ROLLED_BACK)

    def _go_forward(self) -> None:
        """Rolling back, the last incumbent died."""
        move = self._move
        if move.living_replacements():
            self._under_way.reason, self._under_way.status = None, 0
            self._enter(Phase.MOVING)
            move.turn_forward()
            self._check()
            return
        if any(worker in self.holdings.workers for worker in move.incumbents + move.replacements):
            return  # killed, not yet read to the end
        self._enter(Phase.SERVING)  # what is parked waits for a fresh worker
        self._finish(Outcome.ROLLED_BACK)

    def _roll_back_too_slow(self, _: Event) -> None:
        """Who is past the deadline is killed, and only then what it has is decided: the replacement first."""
        for worker in self._move.stalled():
            self.holdings.note("stalled", worker=worker.id, generation=worker.generation)
            self.holdings.kill(worker.id)
        self.holdings.set_timer("change", ROLL_BACK_S)

    def _stop_later(self, event: StopAsked) -> None:
        """After the change, which its deadline bounds; asked a second time, at once."""
        if self._stop_wanted is not None:
            self._stop_at_once(event)
        self._stop_wanted = event

    # ---- deaths in a change

    def _died_in_boot(self, event: Died) -> None:
        """An incumbent is restored at once: a release may take long to boot."""
        was_dying = not self.holdings.is_alive(event.worker)
        self._bury_and_park(event)
        self.holdings.restore_strength()
        if event.worker in self._move.replacements and not was_dying:
            self._refuse(event.how, StartupFailed.exit_code)
        else:
            self._check()

    def _died_before_move(self, event: Died) -> None:
        was_dying = not self.holdings.is_alive(event.worker)
        self._move.note_burial(self.holdings.bury(event))  # what is parked waits for the move
        if event.worker in self._move.replacements and not was_dying:
            self._refuse(event.how, StartupFailed.exit_code)
        else:
            self._check()

    def _died_in_move(self, event: Died) -> None:
        burial = self.holdings.bury(event)
        self._move.note_burial(burial)
        if event.worker in self._move.replacements:
            self._roll_back(f"{event.how}, while {self.phase.value}")
        else:
            self._move.place(burial.parked)
            self._check()

    def _died_in_roll_back(self, event: Died) -> None:
        burial = self.holdings.bury(event)
        self._move.note_burial(burial)
        if self._move.living_incumbents():
            self._move.place(burial.parked)
        self._check_back()

    # ---- the end of a change

    def _finish(self, outcome: Outcome) -> None:
        change, holdings = self._under_way, self.holdings
        self.change = None
        holdings.ledger.settle()
        self.parking.expect(change.move.open)
        # What the incumbent kept in a roll-back is where it belongs.
        change.move.kept = {cookie: why for cookie, why in change.move.kept.items() if holdings.is_retiring(cookie)}
        holdings.kept.update(change.move.kept)
        result = change.result(outcome, holdings.generation)
        holdings.counters["reloads_" + outcome.value.replace("-", "_")] += 1
        holdings.counters["moved"] += result.moved
        holdings.set_timer("change", None)
        if change.asked.needs_health:
            holdings.effects.append(CheckHealth(is_on=False))
        holdings.effects.append(Finished(change.asked.asker, result))
        holdings.note(
            "reload",
            outcome=outcome.value,
            generation=holdings.generation,
            moved=result.moved,
            kept=result.kept,
            ended=result.ended,
            lost=result.lost,
            closed=result.closed or None,
            error=result.error,
        )
        if self._stop_wanted is not None:
            self._stop(self._stop_wanted)
            return
        for worker in holdings.serving():
            holdings.admit(worker.id)
        holdings.restore_strength()
        self.parking.place()
        if self._is_remembered:
            self._is_remembered = False
            holdings.effects.append(AskAgain())
