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
from copyover.errors import IllegalEvent
from copyover.events import (
    CancelAsked,
    Checked,
    CheckHealth,
    Died,
    Effect,
    Event,
    FromWorker,
    Outcome,
    Reaped,
    Reload,
    Reunited,
    StopAsked,
    TimerFired,
)
from copyover.holdings import Strength
from copyover.move import Move
from copyover.peace import Peace
from copyover.undoing import Undoing

if TYPE_CHECKING:
    from collections.abc import Callable


class Machine(Undoing):
    """
    The holder's mind: the way forward, and the table.

    ``handle`` takes one event and returns what is to be done, in order.
    """

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

    def _unreadable_schema(self) -> str | None:
        """What one side writes must be readable to the other, or the reload is refused: it may be rolled back."""
        incumbents = [worker.abilities for worker in self._move.living_incumbents() if worker.abilities]
        replacements = [worker.abilities for worker in self._move.living_replacements() if worker.abilities]
        asked = self._under_way.asked
        for new in replacements:
            if any((old.interface == "handler") != (new.interface == "handler") for old in incumbents):
                return (
                    f"generation {asked.generation} is of another interface ({new.interface}) than the incumbent "
                    f"({incumbents[0].interface}), and cannot go on with its connections: start it under another "
                    f"--name and address, and stop this one when its clients have gone"
                )
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

    def _lend_and_stage(self, event: FromWorker) -> None:
        lent = self.holdings.lend(event)
        if event.worker in self._move.incumbents:
            self._move.stage(lent)

    def _ceded_before_move(self, event: FromWorker) -> None:
        """It waits for the move, which is about to begin."""
        self._move.stage(self.holdings.cede(event))

    # ---- moving

    def _ceded_in_move(self, event: FromWorker) -> None:
        """It goes where all go."""
        self._move.place(self.holdings.cede(event))

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

    def _release_in_change(self, event: FromWorker) -> None:
        ended = self.holdings.release(event)
        self._move.note_ended(ended)
        self.parking.settled(ended)
        if self.holdings.regain_room() and self.phase is Phase.BAKING:  # else who serves is admitted at the end
            for worker in self._move.living_replacements():
                self.holdings.admit(worker.id, is_moving=True)
        self._check()

    def _check_complete(self) -> None:
        self._move.enter_cuts()
        if not self._move.is_complete:
            return
        move = self._move
        if move.given_back and move.kept and not move.moved and move.living_incumbents() and self._takes_connections:
            reason = next(iter(move.kept.values()))
            self._roll_back(f"the replacement could read none of the {move.given_back} states: {reason}")
        elif self._under_way.asked.bake_s > 0:
            self._bake()
        else:
            self._commit()

    @property
    def _takes_connections(self) -> bool:
        """Whether the replacement is one that means to: listeners alone may be all that it asks for."""
        replacements = [worker.abilities for worker in self._move.living_replacements() if worker.abilities]
        return any(abilities.interface != "listeners" for abilities in replacements)

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

    def _stop_now(self, event: StopAsked) -> None:
        """All is with the replacement: it commits, and stops."""
        self._stop_wanted = event
        self._commit()

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
        holdings.note_kept()
        self.ledger.settle()
        self.parking.place()
        holdings.restore_strength()

    def _roll_back_unfinished(self, asked: Reload, finding: reunion.Finding) -> None:
        workers = self.holdings.workers.values()
        incumbents, replacements = (
            [worker.id for worker in workers if worker.generation == generation and worker.strength is Strength.READY]
            for generation in (finding.serving, finding.unfinished)
        )
        move = Move(self.holdings, asked, incumbents, replacements)
        self.change = Change(asked, finding.serving, self._now_s, move)
        move.resume()
        retiring = [worker.id for worker in workers if worker.strength is Strength.RETIRING]
        move.open.update(reunion.let_enter(self.holdings, incumbents + retiring))
        self.phase = Phase.MOVING
        self.holdings.note_kept()
        self._roll_back("the holder died in the middle of the change")

    # ---- timers

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

    # ---- the table

    _CHANGING: ClassVar = (Phase.BOOTING, Phase.STAGING, Phase.MOVING, Phase.BAKING, Phase.ROLLING_BACK)
    _LIVING: ClassVar = (Phase.SERVING, *_CHANGING, Phase.STOPPING)
    _COUNTS_AFTER_DEATH: ClassVar = frozenset(
        {
            *(messages.Lend, messages.Became, messages.Release, messages.Frozen, messages.Refused, messages.Adopted),
            *(messages.Forward, messages.Cede),
        }
    )
    _TRANSITIONS: ClassVar[dict[tuple[Phase, type], Callable[[Machine, Any], None]]] = {
        # -------------------------------- whatever happens else
        **dict.fromkeys(itertools.product(Phase, [TimerFired]), _timer),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Lend]), Peace._lend),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Became]), Peace._became),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Release]), Peace._release),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Forward]), Peace._forward),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Staged]), _staged),  # of what is refused by now
        **dict.fromkeys(itertools.product(_LIVING, [messages.Gathered]), Peace._void),  # of a move that was rolled back
        **dict.fromkeys(itertools.product(_LIVING, [messages.AcceptOffAck]), Peace._accept_off_acked_in_peace),
        **dict.fromkeys(itertools.product(_LIVING, [messages.Frozen]), Peace._frozen_late),
        **dict.fromkeys(itertools.product((Phase.SERVING, Phase.BOOTING), [messages.Cede]), Peace._ceded),
        **dict.fromkeys(
            itertools.product((Phase.MOVING, Phase.BAKING, Phase.ROLLING_BACK), [messages.Cede]), _ceded_in_move
        ),
        **dict.fromkeys(itertools.product(_CHANGING, [messages.Release]), _release_in_change),
        **dict.fromkeys(itertools.product(_CHANGING, [Reload]), Peace._busy),
        **dict.fromkeys(itertools.product(Phase, [CancelAsked, Checked]), Peace._void),  # of a change that has ended
        **dict.fromkeys(itertools.product(Phase, [Reaped]), Peace._void),  # a Died follows
        # -------------------------------- serving
        (Phase.SERVING, Reload): _reload,
        (Phase.SERVING, Reunited): _reunite,
        (Phase.SERVING, StopAsked): Peace._stop,
        (Phase.SERVING, messages.Ready): Peace._ready_again,
        (Phase.SERVING, messages.Failed): Peace._failed_alone,
        (Phase.SERVING, messages.Adopted): Peace._adopted_in_peace,
        (Phase.SERVING, messages.Refused): Peace._refused_in_peace,
        (Phase.SERVING, Reaped): Peace._reaped,
        (Phase.SERVING, Died): Peace._died_in_peace,
        # -------------------------------- booting
        (Phase.BOOTING, StopAsked): Undoing._stop_instead,
        (Phase.BOOTING, messages.Ready): _ready_in_boot,
        (Phase.BOOTING, messages.Failed): Undoing._failed_before_move,
        (Phase.BOOTING, messages.Adopted): Peace._adopted_in_peace,
        (Phase.BOOTING, messages.Refused): Peace._refused_in_peace,
        (Phase.BOOTING, CancelAsked): Undoing._cancel_before_move,
        (Phase.BOOTING, Died): Undoing._died_in_boot,
        # -------------------------------- staging
        (Phase.STAGING, StopAsked): Undoing._stop_instead,
        (Phase.STAGING, messages.Lend): _lend_and_stage,
        (Phase.STAGING, messages.Cede): _ceded_before_move,
        (Phase.STAGING, messages.Failed): Undoing._failed_before_move,
        (Phase.STAGING, CancelAsked): Undoing._cancel_before_move,
        (Phase.STAGING, Died): Undoing._died_before_move,
        # -------------------------------- moving
        (Phase.MOVING, StopAsked): Undoing._stop_later,
        (Phase.MOVING, messages.Lend): _lend_and_stage,
        (Phase.MOVING, messages.AcceptOffAck): _accept_off_acked,
        (Phase.MOVING, messages.Frozen): _frozen,
        (Phase.MOVING, messages.Gathered): _gathered,
        (Phase.MOVING, messages.Refused): _refused,
        (Phase.MOVING, messages.Adopted): _adopted,
        (Phase.MOVING, messages.Failed): Undoing._failed_in_move,
        (Phase.MOVING, CancelAsked): Undoing._cancel,
        (Phase.MOVING, Died): Undoing._died_in_move,
        # -------------------------------- baking
        (Phase.BAKING, StopAsked): _stop_now,
        (Phase.BAKING, messages.Refused): _settled_in_bake,
        (Phase.BAKING, messages.Adopted): _settled_in_bake,
        (Phase.BAKING, messages.Failed): Undoing._failed_in_move,
        (Phase.BAKING, CancelAsked): Undoing._cancel,
        (Phase.BAKING, Checked): _checked,
        (Phase.BAKING, Died): _died_baking,
        # -------------------------------- rolling back
        (Phase.ROLLING_BACK, StopAsked): Undoing._stop_later,
        (Phase.ROLLING_BACK, messages.AcceptOffAck): Undoing._accept_off_acked_in_roll_back,
        (Phase.ROLLING_BACK, messages.Frozen): _frozen,
        (Phase.ROLLING_BACK, messages.Refused): _refused,
        (Phase.ROLLING_BACK, messages.Adopted): _adopted,
        (Phase.ROLLING_BACK, messages.Failed): Peace._failed_alone,
        (Phase.ROLLING_BACK, Died): Undoing._died_in_roll_back,
        # -------------------------------- stopping
        (Phase.STOPPING, Reload): Peace._busy,
        (Phase.STOPPING, StopAsked): Peace._stop_at_once,
        (Phase.STOPPING, messages.Cede): Peace._ceded_while_stopping,
        (Phase.STOPPING, messages.Adopted): Peace._adopted_in_peace,
        (Phase.STOPPING, messages.Refused): Peace._refused_in_peace,
        (Phase.STOPPING, messages.Failed): Peace._failed_alone,
        (Phase.STOPPING, Died): Peace._died_while_stopping,
    }
    _TIMERS: ClassVar[dict[tuple[Phase, str], Callable[[Machine, Any], None]]] = {
        (Phase.BOOTING, "change"): Undoing._too_late_to_start,
        (Phase.STAGING, "change"): Undoing._too_late_to_start,
        (Phase.MOVING, "change"): Undoing._too_late_to_move,
        (Phase.BAKING, "change"): _baked,
        (Phase.ROLLING_BACK, "change"): Undoing._roll_back_too_slow,
        (Phase.STOPPING, "stop"): Peace._stop_at_once,
    }
    _CHECKS: ClassVar[dict[Phase, Callable[[Machine], None]]] = {
        Phase.BOOTING: _check_booted,
        Phase.STAGING: _check_staged,
        Phase.MOVING: _check_complete,
        Phase.ROLLING_BACK: Undoing._check_back,
    }
