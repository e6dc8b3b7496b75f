"""
What happens next: the phases of a change, and what each event means in each of them.

All transitions live here, in one table at the end of Machine. It performs nothing: a descriptor is a name, time enters
as an argument, and what is to be done comes out as effects.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from copyover import messages, reunion
from copyover.change import Change, Phase
from copyover.errors import IllegalEvent, StartupFailed
from copyover.events import (
    AskAgain,
    CancelAsked,
    Checked,
    CheckHealth,
    Died,
    Effect,
    Event,
    Finished,
    FromWorker,
    Outcome,
    Reload,
    Result,
    Reunited,
    StopAsked,
    TimerFired,
)
from copyover.holdings import Holdings, Strength
from copyover.ledger import Standing
from copyover.move import Move
from copyover.parking import Parking

if TYPE_CHECKING:
    from collections.abc import Callable

    from copyover.holdings import Worker
    from copyover.ledger import Ledger


ROLL_BACK_S = 5.0  # beyond the time that connections have to reach a boundary


class Machine:
    """
    The holder's mind: what it has, the phase, and the change under way.

    ``handle`` takes one event and returns what is to be done, in order.
    """

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

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """
        Take one event at the monotonic time *now_s*.

        Raises:
            IllegalEvent: there is no such transition; nothing changed.

        """
        key: type = type(event)
        if isinstance(event, FromWorker):
            key = type(event.message)
            if event.worker not in self.holdings.workers:
                raise IllegalEvent(f"worker {event.worker} is unknown")
            if not self.holdings.is_alive(event.worker) and key not in self._COUNTS_AFTER_DEATH:
                return []
        transition = self._TRANSITIONS.get((self.phase, key))
        if transition is None:
            raise IllegalEvent(f"{key.__name__} has no transition while {self.phase.value}")
        self.holdings.effects, self._now_s, self.ledger.now_s = [], now_s, now_s
        transition(self, event)
        return self.holdings.effects

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

    # ---- after another holder

    def _reunite(self, event: Reunited) -> None:
        """Take over what the workers of a dead holder have; a change that it was at is rolled back."""
        holdings, asked = self.holdings, event.asked
        if holdings.workers:
            raise IllegalEvent("there are workers already; who comes late has nothing to say")
        reunion.take(holdings, event.reports)
        finding = reunion.find(event.reports)
        # Timers of the dead holder's freezes still run in the workers: batches are numbered beyond all of its.
        holdings.number_on(max(holdings.workers) + 1, batch=int(self._now_s * 1000) + 1)
        holdings.generation, holdings.wanted, holdings.quotas = finding.serving, asked.workers, asked.quotas
        holdings.withdrawn |= finding.withdrawn
        holdings.note("reunited", generation=finding.serving, workers=len(event.reports), connections=len(self.ledger))
        if finding.unfinished:
            self._roll_back_unfinished(attrs.evolve(asked, generation=finding.unfinished, added=finding.added), finding)
        else:
            self._settle_reunion(asked)

    def _settle_reunion(self, asked: Reload) -> None:
        holdings = self.holdings
        self.parking.given.update(reunion.let_enter(holdings, holdings.workers))
        for worker in list(holdings.workers.values()):
            if worker.generation == holdings.generation and worker.strength is Strength.READY:
                holdings.send(worker.id, messages.MoveOver())
                holdings.admit(worker.id)
            else:
                holdings.retire(worker, asked.drain_s)
        self._note_kept()
        self.ledger.settle()
        self.parking.place()
        holdings.restore_strength()

    def _note_kept(self) -> None:
        for entry in self.ledger.entries.values():
            if self.holdings.is_retiring(entry.cookie):
                self.holdings.kept.setdefault(entry.cookie, "it stayed in its generation before this holder came")

    def _roll_back_unfinished(self, asked: Reload, finding: reunion.Finding) -> None:
        workers = self.holdings.workers.values()
        incumbents, replacements = (
            [worker.id for worker in workers if worker.generation == generation and worker.strength is Strength.READY]
            for generation in (finding.serving, finding.unfinished)
        )
        move = Move(self.holdings, asked, incumbents, replacements)
        self.change = Change(asked, finding.serving, self._now_s, move)
        move.resume()
        move.open.update(reunion.let_enter(self.holdings, incumbents))
        self.phase = Phase.MOVING
        self._note_kept()
        self._roll_back("the holder died in the middle of the change")

    # ---- booting

    def _reload(self, event: Reload) -> None:
        holdings = self.holdings
        incumbents = [worker.id for worker in holdings.serving()]
        replacements = [holdings.spawn(event.generation) for _ in range(event.workers)]
        move = Move(holdings, event, incumbents, replacements)
        self.change = Change(event, holdings.generation, self._now_s, move)
        self.phase = Phase.BOOTING
        holdings.set_timer("change", event.timeout_s)
        holdings.note("phase", phase="booting", change=event.generation, workers=event.workers, move=event.move)

    def _busy(self, event: Reload) -> None:
        if event.is_remembered:
            self._is_remembered = True
            self.holdings.note("remembered", phase=self.phase.value)
            return
        serving = self.holdings.generation
        error = f"another change is under way ({self.phase.value}); it was not disturbed"
        result = Result(Outcome.BUSY, serving, serving, serving, error=error)
        self.holdings.effects.append(Finished(event.asker, result))

    def _ready_in_boot(self, event: FromWorker) -> None:
        if event.worker not in self._move.replacements:
            self._ready_again(event)  # a restart: the incumbent is to serve, however long the replacement boots
            return
        self._mark_ready(event)
        self._check_booted()

    def _check_booted(self) -> None:
        replacements = self._move.living_replacements()
        if self.parking.given or not all(worker.strength is Strength.READY for worker in replacements):
            return
        refusal = self._unreadable_schema()
        if refusal is None:
            self._begin_staging()
        else:
            self._refuse(refusal)

    def _ready_again(self, event: FromWorker) -> None:
        self._mark_ready(event)
        self.holdings.admit(event.worker)
        self.holdings.note("restarted", worker=event.worker, generation=self.holdings.generation)
        self.parking.place()

    def _mark_ready(self, event: FromWorker) -> None:
        worker = self.holdings.workers[event.worker]
        abilities = messages.expect(event.message, messages.Ready)
        if worker.strength is not Strength.BOOTING or not all(type(schema) is int for schema in abilities.reads):
            raise IllegalEvent(f"worker {worker.id} is {worker.strength.value} and says ready with {abilities.reads}")
        worker.strength, worker.abilities = Strength.READY, abilities

    def _unreadable_schema(self) -> str | None:
        """What one side writes must be readable to the other, or the reload is refused: it may be rolled back."""
        incumbents = [worker.abilities for worker in self._move.living_incumbents() if worker.abilities]
        replacements = [worker.abilities for worker in self._move.living_replacements() if worker.abilities]
        asked = self._under_way.asked
        for new in replacements:
            for schema in sorted({old.writes for old in incumbents}.difference(new.reads)):
                return (
                    f"generation {asked.generation} reads states of schema {', '.join(map(str, new.reads))}, the "
                    f"live connections have schema {schema}; give its Application reads={{{schema}, …}} and a decode "
                    f"that takes it"
                )
            unreadable = [old for old in incumbents if new.writes not in old.reads]
            if unreadable and not asked.is_one_way:
                return (
                    f"generation {asked.generation} writes states of schema {new.writes}, the incumbent reads "
                    f"{', '.join(map(str, unreadable[0].reads))}: a roll-back could not bring them back; deploy a "
                    f"release that reads both first, or say --one-way"
                )
        return None

    # ---- staging

    def _begin_staging(self) -> None:
        self._enter(Phase.STAGING)
        for worker in list(self.holdings.workers.values()):  # a restart that is late is of no use any more
            if worker.strength is Strength.BOOTING:
                self.holdings.kill(worker.id)
        self._move.incumbents = [worker.id for worker in self.holdings.serving()]
        self._move.begin()
        self._check_staged()

    def _staged(self, event: FromWorker) -> None:
        self.holdings.staged(event)
        if self.phase is Phase.STAGING:
            self._check_staged()

    def _check_staged(self) -> None:
        if self._move.is_staged:
            self._enter(Phase.MOVING)
            self._move.switch_accepting()
            self._check_complete()

    # ---- moving

    def _accept_off_acked(self, event: FromWorker) -> None:
        worker = self.holdings.workers[event.worker]
        is_last = self.holdings.accept_off_acked(event)
        if is_last and worker.id in self._move.incumbents and not worker.is_off:  # else the holder was full
            self._move.accept_off_acked(worker)
            self._check_complete()

    def _frozen(self, event: FromWorker) -> None:
        self._move.frozen(event)
        excess = self._move.excess(event.worker)
        if self.phase is Phase.MOVING and excess is not None:
            self._roll_back(excess)
        else:
            self._check()

    def _refused(self, event: FromWorker) -> None:
        self._move.refused(event)
        self._check()

    def _adopted(self, event: FromWorker) -> None:
        self._move.adopted(event)
        self._check()

    def _gathered(self, event: FromWorker) -> None:
        self._move.gathered(event)
        self._check_complete()

    def _check_complete(self) -> None:
        self._move.enter_cuts()
        if not self._move.is_complete:
            return
        move = self._move
        if move.given_back and move.kept and not move.moved and move.living_incumbents():
            reason = next(iter(move.kept.values()))
            self._roll_back(f"the replacement could read none of the {move.given_back} states: {reason}")
        elif self._under_way.asked.bake_s > 0:
            self._bake()
        else:
            self._commit()

    # ---- baking

    def _bake(self) -> None:
        """The replacement serves, the incumbent waits, idle and whole, ready to take everything back."""
        asked = self._under_way.asked
        self._enter(Phase.BAKING)
        self.holdings.set_timer("change", asked.bake_s)
        if asked.needs_health:
            self.holdings.effects.append(CheckHealth(is_on=True))
        self._check_incumbent()

    def _checked(self, event: Checked) -> None:
        self._under_way.is_proven |= event.problem is None
        if event.problem is not None:
            self._roll_back(f"the health command {event.problem}")

    def _baked(self, _: Event) -> None:
        change = self._under_way
        if change.asked.needs_health and not change.is_proven:
            self._roll_back(f"the health command has not succeeded once within {change.asked.bake_s:g} s")
        else:
            self._commit()

    def _check_incumbent(self) -> None:
        """With the incumbent dead there is nothing to go back to."""
        if not self._move.living_incumbents() and not self._move.open:
            self._commit()

    def _died_baking(self, event: Died) -> None:
        is_replacement = event.worker in self._move.replacements
        self._died_in_move(event)
        if self.phase is Phase.BAKING and not is_replacement:
            self._check_incumbent()

    def _settled_in_bake(self, event: FromWorker) -> None:
        """What a killed incumbent had kept goes forward."""
        if isinstance(event.message, messages.Adopted):
            self._move.adopted(event)
        else:
            self._move.refused(event)
        self._check_incumbent()

    # ---- committed

    def _commit(self) -> None:
        change, holdings = self._under_way, self.holdings
        self._enter(Phase.SERVING)
        holdings.generation = change.asked.generation
        holdings.wanted = change.asked.workers
        holdings.quotas = change.asked.quotas
        holdings.failures = 0
        for incumbent in change.move.living_incumbents():
            holdings.retire(incumbent, change.asked.drain_s)
        for replacement in change.move.living_replacements():
            holdings.send(replacement.id, messages.MoveOver())
        holdings.expire_oldest(change.asked.max_retiring)
        self._finish(Outcome.DONE)

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

    def _failed_alone(self, event: FromWorker) -> None:
        """No change hangs on it; if it is going, its death will tell."""
        reason = messages.expect(event.message, messages.Failed).reason
        self.holdings.note("failed", worker=event.worker, reason=reason)

    def _cancel_before_move(self, event: CancelAsked) -> None:
        self._refuse(event.reason)

    def _cancel(self, event: CancelAsked) -> None:
        self._roll_back(event.reason)

    def _too_late_to_start(self, _: Event) -> None:
        asked = self._under_way.asked
        phase = self.phase.value
        too_late = f"generation {asked.generation} was not ready within {asked.timeout_s:g} s (still {phase})"
        self._refuse(too_late, StartupFailed.exit_code)

    # ---- rolled back

    def _failed_in_move(self, event: FromWorker) -> None:
        # Also the incumbent's word that its shared state cannot travel; it serves on.
        self._roll_back(messages.expect(event.message, messages.Failed).reason)

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
            self._check_complete()
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

    # ---- the end of a change

    def _finish(self, outcome: Outcome) -> None:
        change, holdings = self._under_way, self.holdings
        self.change = None
        holdings.ledger.settle()
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

    def _check(self) -> None:
        """See whether the phase is over."""
        check = self._CHECKS.get(self.phase)
        if check is not None:
            check(self)

    # ---- connections come and go

    def _lend(self, event: FromWorker) -> None:
        self.holdings.lend(event)

    def _lend_and_stage(self, event: FromWorker) -> None:
        entries = self.holdings.lend(event)
        if event.worker in self._move.incumbents:
            self._move.stage(entries)

    def _forward(self, event: FromWorker) -> None:
        self.holdings.forward(event)

    def _release(self, event: FromWorker) -> None:
        self.holdings.release(event, lambda cookie: self.parking.settled([cookie]))
        if self.holdings.regain_room():
            for worker in self.holdings.serving():
                self.holdings.admit(worker.id)

    def _release_in_change(self, event: FromWorker) -> None:
        self.holdings.release(event, self._ended_in_change)
        if self.holdings.regain_room() and self.phase is Phase.BAKING:  # else who serves is admitted at the end
            for worker in self._move.living_replacements():
                self.holdings.admit(worker.id, is_moving=True)
        self._check()

    def _ended_in_change(self, cookie: int) -> None:
        self._move.note_ended(cookie)
        self.parking.settled([cookie])

    def _frozen_late(self, event: FromWorker) -> None:
        """All that the freeze named had ended or refused before: the move did not wait for this."""
        if event.message.rows:
            raise IllegalEvent(f"worker {event.worker} froze connections while {self.phase.value}")

    def _accept_off_acked_in_peace(self, event: FromWorker) -> None:
        """The holder was full, or a roll-back ended before this came."""
        self.holdings.accept_off_acked(event)

    # ---- deaths

    def _died_in_peace(self, event: Died) -> None:
        worker = self._bury_and_park(event)
        if worker.strength is not Strength.RETIRING:
            self.holdings.restore_strength()

    def _bury_and_park(self, event: Died) -> Worker:
        """Its connections go to another worker of the serving generation, or wait for a fresh one."""
        burial = self.holdings.bury(event)
        if self.change is not None:
            self._move.note_burial(burial)
        self.parking.settled([*burial.lost, *burial.ended, *(entry.cookie for entry in burial.parked)])
        self.parking.place()
        return burial.worker

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

    def _died_while_stopping(self, event: Died) -> None:
        """Nobody takes over any more what it had."""
        for entry in self.holdings.bury(event).parked:
            self.holdings.lose(entry.cookie)
        self._check_stopped()

    # ---- what a killed worker left, while no move is under way

    def _adopted_in_peace(self, event: FromWorker) -> None:
        self.parking.adopted(event)
        self._check()

    def _refused_in_peace(self, event: FromWorker) -> None:
        self.parking.refused(event)
        self._check()

    # ---- the end

    def _stop(self, event: StopAsked) -> None:
        self.phase = Phase.STOPPING
        self.holdings.note("phase", phase="stopping", drain_s=event.drain_s)
        for worker in list(self.holdings.workers.values()):
            if worker.strength is Strength.BOOTING:
                self.holdings.kill(worker.id)
            else:
                self.holdings.send(worker.id, messages.Stop(drain_ms=int(event.drain_s * 1000)))
        for entry in [e for e in self.ledger.entries.values() if e.standing is Standing.PARKED]:
            self.holdings.lose(entry.cookie)  # no worker will come to take it
        self.holdings.set_timer("stop", event.drain_s + 5)
        self._check_stopped()

    def _stop_instead(self, event: StopAsked) -> None:
        self._stop_wanted = event
        self._refuse("the holder was told to stop")

    def _stop_now(self, event: StopAsked) -> None:
        """All is with the replacement: it commits, and stops."""
        self._stop_wanted = event
        self._commit()

    def _stop_later(self, event: StopAsked) -> None:
        """After the change, which its deadline bounds; asked a second time, at once."""
        if self._stop_wanted is not None:
            self._stop_at_once(event)
        self._stop_wanted = event

    def _stop_at_once(self, _: Event) -> None:
        for worker in list(self.holdings.workers):
            self.holdings.kill(worker)

    def _check_stopped(self) -> None:
        if not self.holdings.workers:
            self.phase = Phase.STOPPED
            self.holdings.note("phase", phase="stopped")

    # ---- timers, and what is over

    def _timer(self, event: TimerFired) -> None:
        """Route a timer by its name."""
        name, _, worker = event.name.partition(" ")
        if name == "retire" and self.holdings.is_alive(int(worker)):
            self.holdings.note("overdue", worker=int(worker))
            self.holdings.kill(int(worker))
        elif name == "healthy":
            self.holdings.failures = 0
        elif (self.phase, name) in self._TIMERS:
            self._TIMERS[self.phase, name](self, event)

    def _void(self, _: Event) -> None:
        """It speaks of what is over."""

    # ---- the table

    _CHANGING: ClassVar = (Phase.BOOTING, Phase.STAGING, Phase.MOVING, Phase.BAKING, Phase.ROLLING_BACK)
    _LIVING: ClassVar = (Phase.SERVING, *_CHANGING, Phase.STOPPING)
    _COUNTS_AFTER_DEATH: ClassVar = frozenset(
        {messages.Lend, messages.Release, messages.Frozen, messages.Refused, messages.Adopted, messages.Forward}
    )
    _TRANSITIONS: ClassVar[dict[tuple[Phase, type], Callable[[Machine, Any], None]]] = {
        # -------------------------------- whatever happens else
        **dict.fromkeys(itertools.product(Phase, [TimerFired]), _timer),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Lend]), _lend),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Release]), _release),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Forward]), _forward),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Staged]), _staged),  # of what is refused by now
        **dict.fromkeys(itertools.product(_LIVING, [messages.Gathered]), _void),  # of a move that was rolled back
        **dict.fromkeys(itertools.product(_LIVING, [messages.AcceptOffAck]), _accept_off_acked_in_peace),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Frozen]), _frozen_late),
        **dict.fromkeys(itertools.product(_CHANGING, [messages.Release]), _release_in_change),
        **dict.fromkeys(itertools.product(_CHANGING, [Reload]), _busy),
        **dict.fromkeys(itertools.product(Phase, [CancelAsked, Checked]), _void),  # of a change that has ended
        # -------------------------------- serving
        (Phase.SERVING, Reload): _reload,
        (Phase.SERVING, Reunited): _reunite,
        (Phase.SERVING, StopAsked): _stop,
        (Phase.SERVING, messages.Ready): _ready_again,
        (Phase.SERVING, messages.Failed): _failed_alone,
        (Phase.SERVING, messages.Adopted): _adopted_in_peace,
        (Phase.SERVING, messages.Refused): _refused_in_peace,
        (Phase.SERVING, Died): _died_in_peace,
        # -------------------------------- booting
        (Phase.BOOTING, StopAsked): _stop_instead,
        (Phase.BOOTING, messages.Ready): _ready_in_boot,
        (Phase.BOOTING, messages.Failed): _failed_before_move,
        (Phase.BOOTING, messages.Adopted): _adopted_in_peace,
        (Phase.BOOTING, messages.Refused): _refused_in_peace,
        (Phase.BOOTING, CancelAsked): _cancel_before_move,
        (Phase.BOOTING, Died): _died_in_boot,
        # -------------------------------- staging
        (Phase.STAGING, StopAsked): _stop_instead,
        (Phase.STAGING, messages.Lend): _lend_and_stage,
        (Phase.STAGING, messages.Failed): _failed_before_move,
        (Phase.STAGING, CancelAsked): _cancel_before_move,
        (Phase.STAGING, Died): _died_before_move,
        # -------------------------------- moving
        (Phase.MOVING, StopAsked): _stop_later,
        (Phase.MOVING, messages.Lend): _lend_and_stage,
        (Phase.MOVING, messages.AcceptOffAck): _accept_off_acked,
        (Phase.MOVING, messages.Frozen): _frozen,
        (Phase.MOVING, messages.Gathered): _gathered,
        (Phase.MOVING, messages.Refused): _refused,
        (Phase.MOVING, messages.Adopted): _adopted,
        (Phase.MOVING, messages.Failed): _failed_in_move,
        (Phase.MOVING, CancelAsked): _cancel,
        (Phase.MOVING, Died): _died_in_move,
        # -------------------------------- baking
        (Phase.BAKING, StopAsked): _stop_now,
        (Phase.BAKING, messages.Refused): _settled_in_bake,
        (Phase.BAKING, messages.Adopted): _settled_in_bake,
        (Phase.BAKING, messages.Failed): _failed_in_move,
        (Phase.BAKING, CancelAsked): _cancel,
        (Phase.BAKING, Checked): _checked,
        (Phase.BAKING, Died): _died_baking,
        # -------------------------------- rolling back
        (Phase.ROLLING_BACK, StopAsked): _stop_later,
        (Phase.ROLLING_BACK, messages.AcceptOffAck): _accept_off_acked_in_roll_back,
        (Phase.ROLLING_BACK, messages.Frozen): _frozen,
        (Phase.ROLLING_BACK, messages.Refused): _refused,
        (Phase.ROLLING_BACK, messages.Adopted): _adopted,
        (Phase.ROLLING_BACK, messages.Failed): _failed_alone,
        (Phase.ROLLING_BACK, Died): _died_in_roll_back,
        # -------------------------------- stopping
        (Phase.STOPPING, Reload): _busy,
        (Phase.STOPPING, StopAsked): _stop_at_once,
        (Phase.STOPPING, messages.Adopted): _adopted_in_peace,
        (Phase.STOPPING, messages.Refused): _refused_in_peace,
        (Phase.STOPPING, messages.Failed): _failed_alone,
        (Phase.STOPPING, Died): _died_while_stopping,
    }
    _TIMERS: ClassVar[dict[tuple[Phase, str], Callable[[Machine, Any], None]]] = {
        (Phase.BOOTING, "change"): _too_late_to_start,
        (Phase.STAGING, "change"): _too_late_to_start,
        (Phase.MOVING, "change"): _too_late_to_move,
        (Phase.BAKING, "change"): _baked,
        (Phase.ROLLING_BACK, "change"): _roll_back_too_slow,
        (Phase.STOPPING, "stop"): _stop_at_once,
    }
    _CHECKS: ClassVar[dict[Phase, Callable[[Machine], None]]] = {
        Phase.BOOTING: _check_booted,
        Phase.STAGING: _check_staged,
        Phase.MOVING: _check_complete,
        Phase.ROLLING_BACK: _check_back,
    }
