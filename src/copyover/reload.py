"""
What happens next: the phases of a change, and what each event means in each of them.

All transitions live here, in one table. It performs nothing: a descriptor is a name, time enters as an argument, and
what is to be done comes out as effects.
"""

from __future__ import annotations

import collections
import enum
import itertools
from typing import TYPE_CHECKING, Any

import attrs

from copyover import wire
from copyover.errors import IllegalEvent
from copyover.ledger import Ending, Entry, Ledger, Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

ROLLING_BATCH = 64
ROLLING_WINDOW = 2
KEPT_SHOWN = 10
MAX_BACKOFF_S = 30.0


class Phase(enum.Enum):
    SERVING = "serving"
    BOOTING = "booting"
    STAGING = "staging"
    MOVING = "moving"
    ROLLING_BACK = "rolling-back"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Outcome(enum.Enum):
    DONE = "done"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    BUSY = "busy"
    STOPPED = "stopped"


class Strength(enum.Enum):
    """How far a worker has come."""

    BOOTING = "booting"
    READY = "ready"
    RETIRING = "retiring"
    DYING = "dying"  # killed, not reaped; what it had sent still counts


# ---- events


@attrs.frozen
class Reload:
    """Somebody asks for a new generation; the answer is a Finished with the same *asker*."""

    asker: int
    generation: int
    workers: int
    move: str
    timeout_s: float
    gather_s: float = 1.0
    boundary_s: float = 5.0
    drain_s: float = 3600.0
    max_retiring: int = 2
    is_remembered: bool = False  # a SIGHUP while another change is under way is done after it, once


@attrs.frozen
class FromWorker:
    """A message came; *descriptors* names those that came with it."""

    worker: int
    message: wire.Message
    descriptors: Sequence[int] = ()


@attrs.frozen
class Died:
    """The worker is reaped and its channel is read to the end."""

    worker: int
    how: str


@attrs.frozen
class TimerFired:
    name: str


@attrs.frozen
class StopAsked:
    drain_s: float


Event = Reload | FromWorker | Died | TimerFired | StopAsked


# ---- effects


@attrs.frozen
class Send:
    worker: int
    message: wire.Message
    descriptors: tuple[int, ...] = ()


@attrs.frozen
class Spawn:
    worker: int
    generation: int
    after_s: float = 0.0


@attrs.frozen
class Kill:
    worker: int


@attrs.frozen
class Close:
    """The connection has ended: close our copy."""

    descriptor: int


@attrs.frozen
class Reset:
    """Nobody can serve it: tell the client with a true RST, and close our copy."""

    descriptor: int


@attrs.frozen
class SetTimer:
    """Fire once; *after_s* None takes the timer back."""

    name: str
    after_s: float | None


@attrs.frozen
class Note:
    """One line for the log."""

    event: str
    fields: dict[str, Any]


@attrs.frozen
class Result:
    """How a change ended."""

    outcome: Outcome
    from_generation: int
    to_generation: int
    serving_generation: int
    moved: int = 0
    kept: int = 0
    ended: int = 0
    lost: int = 0
    kept_reasons: tuple[tuple[int, str], ...] = ()
    pauses_us: tuple[int, ...] = ()
    phases_ms: dict[str, float] = attrs.field(factory=dict)
    error: str | None = None
    status: int = 0


@attrs.frozen
class Finished:
    asker: int
    result: Result


@attrs.frozen
class AskAgain:
    """A reload was asked for meanwhile: pin the release as it is now, and ask."""


Effect = Send | Spawn | Kill | Close | Reset | SetTimer | Note | Finished | AskAgain


# ---- state


@attrs.define
class Worker:
    id: int
    generation: int
    strength: Strength = Strength.BOOTING
    abilities: wire.Ready | None = None
    lent: int = 0
    is_off: bool = False
    has_gathered: bool = False
    has_entered: bool = False
    shared: tuple[bytes, ...] = ()
    staged: int = 0
    staged_acked: int = 0
    unanswered: set[int] = attrs.field(factory=set)  # freezes without their first answer
    queue: collections.deque[int] = attrs.field(factory=collections.deque)  # still to be frozen

    def begin_move(self) -> None:
        self.is_off = self.has_gathered = self.has_entered = False
        self.shared = ()
        self.unanswered.clear()
        self.queue.clear()


@attrs.define
class Change:
    """One reload under way."""

    asked: Reload
    from_generation: int
    phase_began_s: float
    incumbents: list[int]
    replacements: list[int]
    routes: dict[int, int] = attrs.field(factory=dict)  # together: incumbent to replacement
    open: set[int] = attrs.field(factory=set)  # connections whose passage is not settled
    between: collections.Counter[int] = attrs.field(factory=collections.Counter)  # frozen, not adopted, by incumbent
    left: dict[int, int] = attrs.field(factory=dict)  # the incumbent that each of those left
    moved: int = 0
    ended: int = 0
    lost: int = 0
    kept: dict[int, str] = attrs.field(factory=dict)
    pauses_us: list[int] = attrs.field(factory=list)
    phases_ms: dict[str, float] = attrs.field(factory=dict)
    reason: str = ""
    status: int = 0
    batches: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    @property
    def is_together(self) -> bool:
        return self.asked.move == "together"


class Machine:
    """
    The holder's mind: the ledger, the workers, and the change under way.

    ``handle`` takes one event and returns what is to be done, in order. An event that has no transition raises
    IllegalEvent and changes nothing.
    """

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.capacity = capacity  # live connections that the holder's descriptors allow for
        self.is_full = False
        self.ledger = Ledger()
        self.workers: dict[int, Worker] = {}
        self.phase = Phase.SERVING
        self.generation = 0
        self.wanted = 0  # workers of the serving generation
        self.change: Change | None = None
        self.is_remembered = False
        self.stop_wanted: StopAsked | None = None
        self.counters: collections.Counter[str] = collections.Counter()
        self.kept: dict[int, str] = {}  # what lives on in a retiring generation, and why
        self._failures = 0
        self._next_worker = itertools.count(1)
        self._effects: list[Effect] = []
        self._now_s = 0.0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """
        Take one event at the monotonic time *now_s*.

        Raises:
            IllegalEvent: there is no such transition; nothing changed.

        """
        key: type = type(event)
        if isinstance(event, FromWorker):
            key = type(event.message)
            if event.worker not in self.workers:
                raise IllegalEvent(f"worker {event.worker} is unknown")
            if self.workers[event.worker].strength is Strength.DYING and key not in _COUNTS_AFTER_DEATH:
                return []
        transition = _TRANSITIONS.get((self.phase, key))
        if transition is None:
            raise IllegalEvent(f"{key.__name__} has no transition while {self.phase.value}")
        self._effects, self._now_s = [], now_s
        transition(self, event)
        effects, self._effects = self._effects, []
        return effects

    # ---- small things

    @property
    def under_way(self) -> Change:
        if self.change is None:
            raise IllegalEvent("no change is under way")
        return self.change

    def _send(self, worker: int, message: wire.Message, descriptors: Iterable[int] = ()) -> None:
        if self._is_alive(worker):
            self._effects.append(Send(worker, message, tuple(descriptors)))

    def _is_alive(self, worker: int) -> bool:
        return worker in self.workers and self.workers[worker].strength is not Strength.DYING

    def _living(self, workers: Iterable[int]) -> list[Worker]:
        return [self.workers[worker] for worker in workers if self._is_alive(worker)]

    def _kill(self, worker: int) -> None:
        if self._is_alive(worker):
            self.workers[worker].strength = Strength.DYING
            self._effects.append(Kill(worker))

    def _note(self, event: str, **fields: Any) -> None:
        self._effects.append(Note(event, fields))

    def _spawn(self, generation: int, after_s: float = 0.0) -> int:
        worker = next(self._next_worker)
        self.workers[worker] = Worker(worker, generation)
        self._effects.append(Spawn(worker, generation, after_s))
        return worker

    def _enter(self, phase: Phase) -> None:
        change = self.under_way
        spent_ms = round((self._now_s - change.phase_began_s) * 1000, 3)
        change.phases_ms[self.phase.value] = spent_ms
        change.phase_began_s = self._now_s
        self.phase = phase
        self._note("phase", phase=phase.value, generation=change.asked.generation, previous_ms=spent_ms)

    def serving_workers(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.generation == self.generation and w.strength is Strength.READY]

    # ---- a change begins

    def _reload(self, event: Reload) -> None:
        incumbents = [w.id for w in self.serving_workers()]
        for worker in list(self.workers.values()):  # a restart under way is of no use any more
            if worker.strength is Strength.BOOTING:
                self._kill(worker.id)
        self.change = Change(event, self.generation, self._now_s, incumbents, [])
        self.change.replacements = [self._spawn(event.generation) for _ in range(event.workers)]
        self.phase = Phase.BOOTING
        self._effects.append(SetTimer("change", event.timeout_s))
        self._note("phase", phase="booting", generation=event.generation, workers=event.workers, move=event.move)

    def _busy(self, event: Reload) -> None:
        if event.is_remembered:
            self.is_remembered = True
            self._note("remembered", phase=self.phase.value)
            return
        error = f"another change is under way ({self.phase.value}); it was not disturbed"
        to = event.generation
        self._effects.append(
            Finished(event.asker, Result(Outcome.BUSY, self.generation, to, self.generation, error=error))
        )

    def _ready_in_boot(self, event: FromWorker) -> None:
        change, worker = self.under_way, self.workers[event.worker]
        if worker.id not in change.replacements:
            raise IllegalEvent(f"worker {worker.id} is ready in the middle of a change that it is no part of")
        worker.strength = Strength.READY
        worker.abilities = wire.expect(event.message, wire.Ready)
        if all(self.workers[replacement].strength is Strength.READY for replacement in change.replacements):
            self._begin_staging()

    def _ready_again(self, event: FromWorker) -> None:
        worker = self.workers[event.worker]
        worker.strength = Strength.READY
        worker.abilities = wire.expect(event.message, wire.Ready)
        self._admit(worker.id)
        self._note("restarted", worker=worker.id, generation=worker.generation)

    # ---- staging

    def _begin_staging(self) -> None:
        change = self.under_way
        refusal = self._unreadable_schema()
        if refusal is not None:
            self._refuse(refusal, status=3)
            return
        self._enter(Phase.STAGING)
        self.ledger.begin()
        for place, incumbent in enumerate(change.incumbents):
            change.routes[incumbent] = change.replacements[place % len(change.replacements)]
        for worker in self._living(change.incumbents + change.replacements):
            worker.begin_move()
        owners = set(change.incumbents)
        self._stage([entry for entry in self.ledger.entries.values() if entry.owner in owners])
        self._check_staged()

    def _unreadable_schema(self) -> str | None:
        """Promise: what the incumbent wrote can be read by the replacement, or the reload is refused."""
        change = self.under_way
        for incumbent in self._living(change.incumbents):
            for replacement in self._living(change.replacements):
                written = incumbent.abilities.writes if incumbent.abilities else 0
                readable = replacement.abilities.reads if replacement.abilities else []
                if written not in readable:
                    return (
                        f"generation {replacement.generation} reads states of schema "
                        f"{', '.join(map(str, readable))}, the live connections have schema {written}; "
                        f"give its Application reads={{{written}, …}} and a decode that takes it"
                    )
        return None

    def _stage(self, entries: Iterable[Entry]) -> None:
        """Let the replacement build these connections, paused."""
        per_target: dict[int, list[Entry]] = {}
        for entry in entries:
            target = self._target(entry)
            if target is None:
                continue
            self.under_way.open.add(entry.cookie)
            self.ledger.stage(entry.cookie, target.id)
            target.staged += 1
            per_target.setdefault(target.id, []).append(entry)
        for target_id, staged in per_target.items():
            self._send_stage(target_id, staged)

    def _send_stage(self, target: int, entries: list[Entry]) -> None:
        for chunk in _chunks(entries, wire.MAX_DESCRIPTORS):
            message = wire.Stage(
                cookie=tuple([entry.cookie for entry in chunk]), listener=tuple([entry.listener for entry in chunk])
            )
            self._send(target, message, [entry.descriptor for entry in chunk])

    def _target(self, entry: Entry) -> Worker | None:
        """Return the worker of the replacement that an incumbent's connection goes to."""
        change = self.under_way
        living = self._living(change.replacements)
        if not living:
            return None
        if change.is_together:
            route = change.routes.get(entry.owner, 0)
            return self.workers[route] if self._is_alive(route) else living[0]
        return min(living, key=lambda worker: worker.staged + self.ledger.owned[worker.id])

    def _staged(self, event: FromWorker) -> None:
        total = wire.expect(event.message, wire.Staged).total
        worker = self.workers[event.worker]
        if not worker.staged_acked <= total <= worker.staged:
            raise IllegalEvent(f"worker {worker.id} acknowledged {total} of {worker.staged} staged connections")
        worker.staged_acked = total

    def _staged_in_staging(self, event: FromWorker) -> None:
        self._staged(event)
        self._check_staged()

    def _check_staged(self) -> None:
        change = self.under_way
        if all(worker.staged_acked == worker.staged for worker in self._living(change.replacements)):
            self._begin_moving()

    # ---- moving

    def _begin_moving(self) -> None:
        change = self.under_way
        self._enter(Phase.MOVING)
        for incumbent in self._living(change.incumbents):
            self._send(incumbent.id, wire.AcceptOff(moving=True))
        if not change.is_together:
            for replacement in self._living(change.replacements):
                self._admit(replacement.id)
        self._progress()

    def _accept_off_acked(self, event: FromWorker) -> None:
        """All lends of this incumbent are in: its set of connections is closed, freezing can begin."""
        change, worker = self.under_way, self.workers[event.worker]
        worker.is_off = True
        if worker.id not in change.incumbents:
            return
        worker.queue.extend(entry.cookie for entry in self.ledger.of(worker.id) if entry.standing is Standing.SERVED)
        if change.is_together:
            self._freeze_all(worker)
        else:
            self._feed(worker)
        self._progress()

    def _freeze_all(self, worker: Worker) -> None:
        cookies = list(worker.queue)
        worker.queue.clear()
        chunks = list(_chunks(cookies, wire.MAX_ROWS)) or [[]]
        for place, chunk in enumerate(chunks):
            self._freeze(worker, chunk, is_cut=True, more=place + 1 < len(chunks))

    def _freeze(self, worker: Worker, cookies: Sequence[int], *, is_cut: bool, more: bool = False) -> None:
        asked = self.under_way.asked
        batch = next(self.under_way.batches)
        worker.unanswered.add(batch)
        message = wire.Freeze(
            batch=batch,
            more=more,
            gather_ms=int(asked.gather_s * 1000) if is_cut else 0,
            wait_ms=int(asked.boundary_s * 1000),
            cookie=tuple(cookies),
            epoch=tuple([self.ledger.freeze(cookie) for cookie in cookies]),
        )
        self._send(worker.id, message)

    def _feed(self, worker: Worker) -> None:
        """Keep at most two batches between freeze and adopted; a connection that is busy holds up no other."""
        change = self.under_way
        while (
            worker.queue
            and len(worker.unanswered) < ROLLING_WINDOW
            and change.between[worker.id] <= ROLLING_BATCH * (ROLLING_WINDOW - 1)
        ):
            batch: list[int] = []
            while worker.queue and len(batch) < ROLLING_BATCH:
                cookie = worker.queue.popleft()
                entry = self.ledger.entries.get(cookie)
                if entry is not None and entry.standing is Standing.SERVED:
                    batch.append(cookie)
            if batch:
                self._freeze(worker, batch, is_cut=False)

    def _frozen(self, event: FromWorker) -> None:
        message = wire.expect(event.message, wire.Frozen)
        worker = self.workers[event.worker]
        self.ledger.check(worker.id, message.cookie, message.epoch, (Standing.FREEZING,))
        worker.unanswered.discard(message.batch)
        parked = []
        for cookie, epoch, record in zip(message.cookie, message.epoch, message.records(), strict=True):
            if not self.ledger.is_late(cookie):
                parked.append(self.ledger.frozen(worker.id, cookie, epoch, record))
        self._place(parked)

    def _frozen_in_move(self, event: FromWorker) -> None:
        self._frozen(event)
        self._feed(self.workers[event.worker])
        self._progress()

    def _frozen_in_roll_back(self, event: FromWorker) -> None:
        self._frozen(event)
        self._check_rolled_back()

    def _place(self, parked: Iterable[Entry]) -> None:
        """Give parked connections to the worker that this phase wants; park what nobody can take."""
        per_target: dict[int, list[Entry]] = {}
        for entry in parked:
            target = self._destination(entry)
            if target is not None:
                per_target.setdefault(target, []).append(entry)
        for target, entries in per_target.items():
            self._thaw(target, entries)

    def _destination(self, entry: Entry) -> int | None:
        change, passage = self.under_way, entry.moving
        is_backwards = self.phase is Phase.ROLLING_BACK or passage.kept_because is not None
        sides = [change.incumbents, change.replacements]
        for side in sides if is_backwards else reversed(sides):
            living = [worker.id for worker in self._living(side)]
            for preferred in (passage.staged_in, passage.origin):
                if preferred in living:
                    return preferred
            if living:
                return min(living, key=lambda worker: self.ledger.owned[worker])
        return None

    def _thaw(self, target: int, entries: list[Entry]) -> None:
        change = self.under_way
        without_copy = [e for e in entries if target not in (e.moving.staged_in, e.moving.origin)]
        for entry in without_copy:
            entry.moving.staged_in = entry.moving.staged_in or target
        self.workers[target].staged += len(without_copy)
        self._send_stage(target, without_copy)
        for chunk in _chunks(entries, wire.MAX_ROWS):
            records = []
            for entry in chunk:
                if target in change.replacements and entry.cookie not in change.left:
                    change.left[entry.cookie] = entry.owner
                    change.between[entry.owner] += 1
                self.ledger.thaw(entry.cookie, target)
                records.append(self._record_for(entry, target))
            self._send(
                target,
                wire.Thaw(
                    cookie=tuple([entry.cookie for entry in chunk]),
                    epoch=tuple([entry.epoch for entry in chunk]),
                    **wire.record_columns(records),
                ),
            )
            if not all(record.flags & wire.RecordFlag.CUT for record in records):
                self._send(target, wire.Enter(cut=False))

    def _record_for(self, entry: Entry, target: int) -> wire.Record:
        record = entry.moving.record
        assert record is not None  # ledger.thaw has checked it
        flags = record.flags
        if self.workers[target].has_entered or self.phase is not Phase.MOVING or target in self.under_way.incumbents:
            flags &= ~wire.RecordFlag.CUT  # its cut has been entered already: it follows alone
        if self.ledger.unserved(entry, target):
            return wire.Record(flags=flags | wire.RecordFlag.UNSERVED, halted_ns=record.halted_ns)
        return attrs.evolve(record, flags=flags) if flags != record.flags else record

    def _gathered(self, event: FromWorker) -> None:
        worker = self.workers[event.worker]
        if not worker.is_off:
            return  # the answer to a move that was rolled back
        worker.has_gathered = True
        worker.shared = wire.expect(event.message, wire.Gathered).shared
        self._enter_cuts()
        self._progress()

    def _enter_cuts(self) -> None:
        """Let each replacement begin that has all the cuts which go to it."""
        change = self.under_way
        for replacement in self._living(change.replacements):
            sources = [self.workers[i] for i, r in change.routes.items() if r == replacement.id and i in self.workers]
            if replacement.has_entered or not all(source.has_gathered for source in sources):
                continue
            replacement.has_entered = True
            shared = tuple(itertools.chain.from_iterable(source.shared for source in sources))
            self._send(replacement.id, wire.Enter(cut=True, shared=shared))
            self._admit(replacement.id)

    def _adopted(self, event: FromWorker) -> None:
        message = wire.expect(event.message, wire.Adopted)
        change = self.under_way
        self.ledger.check(event.worker, message.cookie, message.epoch, (Standing.THAWING, Standing.FREEZING))
        is_replacement = event.worker in change.replacements
        fed: set[int] = set()
        for cookie, epoch, pause_us in zip(message.cookie, message.epoch, message.pause_us, strict=True):
            if self.ledger.is_late(cookie):
                continue
            entry = self.ledger.adopt(event.worker, cookie, epoch)
            if entry.standing is not Standing.SERVED:
                continue
            change.pauses_us.append(pause_us)
            if is_replacement:
                change.moved += 1
            elif entry.moving.kept_because is not None:
                change.kept[cookie] = entry.moving.kept_because
            fed.add(self._settled(cookie))
        for incumbent in fed & self.workers.keys():
            if self.phase is Phase.MOVING:
                self._feed(self.workers[incumbent])
        self._check()

    def _settled(self, cookie: int) -> int:
        """Its passage is over; return the incumbent that may freeze another now."""
        change = self.under_way
        change.open.discard(cookie)
        incumbent = change.left.pop(cookie, 0)
        change.between[incumbent] -= 1
        return incumbent

    def _refused(self, event: FromWorker) -> None:
        message = wire.expect(event.message, wire.Refused)
        change, worker = self.under_way, self.workers[event.worker]
        self.ledger.check(worker.id, message.cookie, message.epoch, (Standing.THAWING, Standing.FREEZING))
        given_back: list[Entry] = []
        drops: dict[int, list[int]] = {}
        for cookie, reason in zip(message.cookie, message.reason, strict=True):
            if self.ledger.is_late(cookie):
                continue
            entry = self.ledger.refuse(worker.id, cookie, reason.decode(errors="replace"))
            passage = entry.moving
            if entry.standing is Standing.PARKED:
                passage.staged_in = 0
                if self._living(change.incumbents):
                    given_back.append(entry)
                else:
                    self._lose(cookie)
                continue
            if self.phase is Phase.MOVING or worker.id in change.replacements:
                change.kept[cookie] = passage.kept_because or ""
            self._settled(cookie)
            for copy in {passage.staged_in, passage.origin} - {0, worker.id}:
                drops.setdefault(copy, []).append(cookie)
            passage.staged_in = passage.origin = 0
        for copy, cookies in drops.items():
            self._send(copy, wire.Drop(cookie=tuple(cookies)))
        self._place(given_back)
        self._check()

    def _check(self) -> None:
        """See whether the phase is over."""
        if self.phase is Phase.STAGING:
            self._check_staged()
        elif self.phase is Phase.MOVING:
            self._progress()
        elif self.phase is Phase.ROLLING_BACK:
            self._check_rolled_back()

    def _progress(self) -> None:
        change = self.under_way
        incumbents = self._living(change.incumbents)
        if not all(worker.is_off for worker in incumbents):
            return
        if change.is_together:
            if not all(worker.has_gathered for worker in incumbents):
                return
            self._enter_cuts()
        if not change.open:
            self._commit()

    # ---- the end of a change

    def _commit(self) -> None:
        change = self.under_way
        self._enter(Phase.SERVING)
        self.generation = change.asked.generation
        self.wanted = change.asked.workers
        self._failures = 0
        self.kept.update(change.kept)
        for incumbent in self._living(change.incumbents):
            self._retire(incumbent, change.asked.drain_s)
        for replacement in self._living(change.replacements):
            self._send(replacement.id, wire.MoveOver())
        self._expire_oldest(change.asked.max_retiring)
        self._finish(Outcome.DONE)
        self._restore_strength()

    def _retire(self, worker: Worker, drain_s: float) -> None:
        worker.strength = Strength.RETIRING
        self._send(worker.id, wire.Commit(drain_ms=int(drain_s * 1000)))
        # The worker closes at its limit by itself; this is for one that does not.
        self._effects.append(SetTimer(f"retire {worker.id}", drain_s + 5))
        self._note("retiring", worker=worker.id, generation=worker.generation, kept=self.ledger.owned[worker.id])

    def _expire_oldest(self, max_retiring: int) -> None:
        generations = sorted({w.generation for w in self.workers.values() if w.strength is Strength.RETIRING})
        for worker in list(self.workers.values()):
            if worker.strength is Strength.RETIRING and worker.generation in generations[:-max_retiring]:
                self._retire(worker, 0.0)

    def _finish(self, outcome: Outcome) -> None:
        change = self.under_way
        self.change = None
        self.ledger.settle()
        self.counters["reloads_" + outcome.value] += 1
        self.counters["moved"] += change.moved
        result = Result(
            outcome=outcome,
            from_generation=change.from_generation,
            to_generation=change.asked.generation,
            serving_generation=self.generation,
            moved=change.moved,
            kept=len(change.kept),
            ended=change.ended,
            lost=change.lost,
            kept_reasons=tuple(itertools.islice(change.kept.items(), KEPT_SHOWN)),
            pauses_us=tuple(change.pauses_us),
            phases_ms=change.phases_ms,
            error=change.reason or None,
            status=change.status,
        )
        self._effects.append(SetTimer("change", None))
        self._effects.append(Finished(change.asked.asker, result))
        self._note(
            "reload",
            outcome=outcome.value,
            generation=self.generation,
            moved=result.moved,
            kept=result.kept,
            ended=result.ended,
            lost=result.lost,
        )
        if self.stop_wanted is not None:
            self._stop(self.stop_wanted)
        elif self.is_remembered:
            self.is_remembered = False
            self._effects.append(AskAgain())

    def _restore_strength(self) -> None:
        """Bring the serving generation back to its number of workers."""
        if self.phase is not Phase.SERVING or self.generation == 0:
            return
        present = [
            w
            for w in self.workers.values()
            if w.generation == self.generation and w.strength in (Strength.READY, Strength.BOOTING)
        ]
        for _ in range(self.wanted - len(present)):
            after_s = 0.0 if self._failures == 0 else min(0.1 * 2**self._failures, MAX_BACKOFF_S)
            self._failures += 1
            self.counters["restarts"] += 1
            worker = self._spawn(self.generation, after_s)
            self._effects.append(SetTimer("healthy", after_s + 10))
            self._note("restarting", worker=worker, generation=self.generation, after_s=after_s)

    # ---- refused, rolled back

    def _refuse(self, reason: str, *, status: int = 3) -> None:
        """Nothing has moved: the replacement goes, the incumbent never noticed."""
        change = self.under_way
        change.reason, change.status = reason, status
        for entry in self.ledger.entries.values():
            entry.passage = None
        for replacement in change.replacements:
            self._kill(replacement)
        self._enter(Phase.SERVING)
        self._finish(Outcome.REFUSED)
        self._restore_strength()

    def _failed(self, event: FromWorker) -> None:
        failed = wire.expect(event.message, wire.Failed)
        if event.worker in self.under_way.replacements:
            self._refuse(failed.reason, status=failed.status)
        else:
            self._kill(event.worker)

    def _failed_in_move(self, event: FromWorker) -> None:
        # Also the incumbent's word that its shared state cannot travel; it serves on.
        self._roll_back(wire.expect(event.message, wire.Failed).reason)

    def _failed_alone(self, event: FromWorker) -> None:
        self._note("failed", worker=event.worker, reason=wire.expect(event.message, wire.Failed).reason)
        self._kill(event.worker)

    def _too_late_to_start(self, _: Event) -> None:
        asked = self.under_way.asked
        self._refuse(
            f"generation {asked.generation} was not ready within {asked.timeout_s:g} s (still {self.phase.value})"
        )

    def _too_late_to_move(self, _: Event) -> None:
        asked = self.under_way.asked
        self._roll_back(f"the move did not end within {asked.timeout_s:g} s")

    def _roll_back(self, reason: str) -> None:
        """Everything returns to the incumbent: the replacement freezes what it has, the incumbent thaws."""
        change = self.under_way
        change.reason, change.status = reason, 3
        self._enter(Phase.ROLLING_BACK)
        self._effects.append(SetTimer("change", change.asked.boundary_s + 5))
        for incumbent in self._living(change.incumbents):
            incumbent.queue.clear()
            self._admit(incumbent.id)
        for replacement in self._living(change.replacements):
            replacement.is_off = False
            self._send(replacement.id, wire.AcceptOff(moving=True))
        own = {worker.id for worker in self._living(change.incumbents)}
        change.open -= {
            e.cookie for e in self.ledger.entries.values() if e.owner in own and e.standing is Standing.SERVED
        }
        self._freeze_replacements()
        self._place([e for e in self.ledger.entries.values() if e.standing is Standing.PARKED])
        self._check_rolled_back()

    def _freeze_replacements(self) -> None:
        change = self.under_way
        for replacement in self._living(change.replacements):
            cookies = [
                e.cookie
                for e in self.ledger.of(replacement.id)
                if e.standing in (Standing.SERVED, Standing.THAWING) and e.cookie not in change.kept
            ]
            change.open.update(cookies)
            for chunk in _chunks(cookies, wire.MAX_ROWS):
                self._freeze(replacement, chunk, is_cut=False)

    def _accept_off_acked_in_roll_back(self, event: FromWorker) -> None:
        """The replacement's last lends are in; they go back too."""
        self.workers[event.worker].is_off = True
        self._freeze_replacements()
        self._check_rolled_back()

    def _check_rolled_back(self) -> None:
        change = self.under_way
        if not self._living(change.incumbents):
            self._go_forward()
            return
        replacements = self._living(change.replacements)
        if change.open or not all(worker.is_off for worker in replacements):
            return
        if any(self.workers[r].strength is Strength.DYING for r in change.replacements if r in self.workers):
            return  # its channel may still hold an answer
        self._enter(Phase.SERVING)
        self.kept.update(change.kept)
        change.moved = 0
        for incumbent in self._living(change.incumbents):
            self._send(incumbent.id, wire.MoveOver())
        for replacement in replacements:
            if self.ledger.owned[replacement.id]:
                self._retire(replacement, change.asked.drain_s)
            else:
                self._kill(replacement.id)
        self._finish(Outcome.ROLLED_BACK)
        self._restore_strength()

    def _go_forward(self) -> None:
        """Rolling back, the incumbent died: who lives serves."""
        change = self.under_way
        if not self._living(change.replacements):
            for entry in [e for e in self.ledger.entries.values() if e.cookie in change.open]:
                self._lose(entry.cookie)
            self._enter(Phase.SERVING)
            self._finish(Outcome.ROLLED_BACK)
            self._restore_strength()
            return
        self._enter(Phase.MOVING)
        self._place([e for e in self.ledger.entries.values() if e.standing is Standing.PARKED])
        for replacement in self._living(change.replacements):
            replacement.has_entered = True
            self._admit(replacement.id)
        self._progress()

    def _roll_back_too_slow(self, _: Event) -> None:
        for replacement in self.under_way.replacements:
            self._kill(replacement)

    # ---- connections come and go

    def _lend(self, event: FromWorker) -> list[Entry]:
        message = wire.expect(event.message, wire.Lend)
        if len(event.descriptors) != len(message.cookie) or len(set(message.cookie)) != len(message.cookie):
            raise IllegalEvent(f"worker {event.worker} lent {len(message.cookie)} connections that do not add up")
        known = [cookie for cookie in message.cookie if cookie in self.ledger.entries]
        if known:
            raise IllegalEvent(f"worker {event.worker} lent connection {known[0]}, which is in the ledger")
        worker = self.workers[event.worker]
        entries = [
            self.ledger.lend(worker.id, cookie, descriptor, listener)
            for cookie, descriptor, listener in zip(message.cookie, event.descriptors, message.listener, strict=True)
        ]
        worker.lent += len(entries)
        self.counters["accepted"] += len(entries)
        self._send(worker.id, wire.LendAck(total=worker.lent))
        if len(self.ledger) >= self.capacity and not self.is_full:
            self.is_full = True
            self._note("full", connections=len(self.ledger), advice="raise RLIMIT_NOFILE")
            for accepting in self.serving_workers():
                self._send(accepting.id, wire.AcceptOff(moving=False))
        return entries

    def _admit(self, worker: int) -> None:
        """Let it accept, unless we could not keep what it accepts: then clients wait in the backlog."""
        if not self.is_full:
            self._send(worker, wire.AcceptOn())

    def _admit_again(self) -> None:
        if self.is_full and len(self.ledger) < self.capacity * 0.95:
            self.is_full = False
            self._note("room", connections=len(self.ledger))
            if self.phase is Phase.SERVING:
                for worker in self.serving_workers():
                    self._admit(worker.id)

    def _lend_in_peace(self, event: FromWorker) -> None:
        self._lend(event)

    def _lend_and_stage(self, event: FromWorker) -> None:
        entries = self._lend(event)
        if event.worker in self.under_way.incumbents:
            self._stage(entries)

    def _release(self, event: FromWorker) -> None:
        message = wire.expect(event.message, wire.Release)
        self.ledger.check(
            event.worker, message.cookie, message.epoch, (Standing.SERVED, Standing.FREEZING, Standing.THAWING)
        )
        drops: dict[int, list[int]] = {}
        for cookie, how in zip(message.cookie, message.how, strict=True):
            if self.ledger.is_late(cookie):
                continue
            ending = self.ledger.release(event.worker, cookie)
            self._effects.append(Close(ending.descriptor))
            self._count_ending(ending, how)
            for copy in ending.copies_in:
                drops.setdefault(copy, []).append(cookie)
        for copy, cookies in drops.items():
            self._send(copy, wire.Drop(cookie=tuple(cookies)))
        if self.change is not None:
            self._check()
        self._admit_again()

    def _count_ending(self, ending: Ending, how: int) -> None:
        self.counters["ended"] += 1
        if how == wire.How.EXPIRED:
            self.counters["expired"] += 1
        self.kept.pop(ending.cookie, None)
        if self.change is not None:
            self.change.ended += 1
            self.change.kept.pop(ending.cookie, None)
            incumbent = self._settled(ending.cookie)
            if self.phase is Phase.MOVING and incumbent in self.workers:
                self._feed(self.workers[incumbent])

    def _lose(self, cookie: int) -> None:
        ending = self.ledger.lose(cookie)
        self._effects.append(Reset(ending.descriptor))
        self.counters["lost"] += 1
        self.kept.pop(cookie, None)
        for copy in ending.copies_in:
            self._send(copy, wire.Drop(cookie=(cookie,)))
        if self.change is not None:
            self.change.lost += 1
            self.change.kept.pop(cookie, None)
            self._settled(cookie)

    # ---- deaths

    def _bury(self, event: Died) -> tuple[Worker, list[Entry]]:
        """
        Forget the worker; return what it had been given and had not served.

        What it was serving is lost: its state died with it.
        """
        worker = self.workers.pop(event.worker)
        had = self.ledger.owned[worker.id]
        unserved, lost = [], 0
        for entry in list(self.ledger.of(worker.id)):
            if entry.standing is Standing.PARKED:
                continue
            if self.ledger.has_record(entry):
                unserved.append(self.ledger.park(entry.cookie))
            else:
                self._lose(entry.cookie)
                lost += 1
        for entry in self.ledger.entries.values():
            if entry.passage is not None:
                _forget_copy(entry, worker.id)
        self._effects.append(SetTimer(f"retire {worker.id}", None))
        self._note("died", worker=worker.id, generation=worker.generation, how=event.how, connections=had, lost=lost)
        return worker, unserved

    def _died_in_peace(self, event: Died) -> None:
        worker, _ = self._bury(event)
        if worker.strength is not Strength.RETIRING:
            self._restore_strength()

    def _died_before_move(self, event: Died) -> None:
        change = self.under_way
        was_dying = self.workers[event.worker].strength is Strength.DYING
        self._bury(event)
        if event.worker in change.replacements and not was_dying:
            self._refuse(event.how)
        else:
            self._check()

    def _died_in_move(self, event: Died) -> None:
        change = self.under_way
        _, unserved = self._bury(event)
        if event.worker in change.replacements:
            self._roll_back(f"{event.how}, in the middle of the move")
            return
        self._place(unserved)
        if change.is_together:
            self._enter_cuts()
        self._progress()

    def _died_in_roll_back(self, event: Died) -> None:
        _, unserved = self._bury(event)
        if self._living(self.under_way.incumbents):
            self._place(unserved)
        self._check_rolled_back()

    def _died_while_stopping(self, event: Died) -> None:
        self._bury(event)
        self._check_stopped()

    # ---- the end

    def _stop(self, event: StopAsked) -> None:
        self.phase = Phase.STOPPING
        self._note("phase", phase="stopping", drain_s=event.drain_s)
        for worker in list(self.workers.values()):
            if worker.strength is Strength.BOOTING:
                self._kill(worker.id)
            else:
                self._send(worker.id, wire.Stop(drain_ms=int(event.drain_s * 1000)))
        self._effects.append(SetTimer("stop", event.drain_s + 5))
        self._check_stopped()

    def _stop_instead(self, event: StopAsked) -> None:
        self.stop_wanted = event
        self._refuse("the holder was told to stop")

    def _stop_later(self, event: StopAsked) -> None:
        self.stop_wanted = event

    def _stop_at_once(self, _: Event) -> None:
        for worker in list(self.workers):
            self._kill(worker)

    def _check_stopped(self) -> None:
        if not self.workers:
            self.phase = Phase.STOPPED
            self._note("phase", phase="stopped")

    def _void(self, _: Event) -> None:
        """It speaks of what is over."""

    # ---- timers

    def _timer(self, event: TimerFired) -> None:
        """Route a timer by its name."""
        name, _, worker = event.name.partition(" ")
        transition = _TIMERS.get((self.phase, name))
        if name == "retire" and int(worker) in self.workers:
            self._note("overdue", worker=int(worker))
            self._kill(int(worker))
        elif name == "healthy":
            self._failures = 0
        elif transition is not None:
            transition(self, event)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _forget_copy(entry: Entry, worker: int) -> None:
    passage = entry.moving
    if passage.staged_in == worker:
        passage.staged_in = 0
    if passage.origin == worker:
        passage.origin = 0


_COUNTS_AFTER_DEATH = frozenset({wire.Lend, wire.Release, wire.Frozen, wire.Refused, wire.Adopted})

_CHANGING = (Phase.BOOTING, Phase.STAGING, Phase.MOVING, Phase.ROLLING_BACK)
_LIVING = (Phase.SERVING, *_CHANGING, Phase.STOPPING)

_TRANSITIONS: dict[tuple[Phase, type], Callable[[Machine, Any], None]] = {
    # -------------------------------- requests
    (Phase.SERVING, Reload): Machine._reload,
    **{(phase, Reload): Machine._busy for phase in (*_CHANGING, Phase.STOPPING)},
    (Phase.SERVING, StopAsked): Machine._stop,
    (Phase.BOOTING, StopAsked): Machine._stop_instead,
    (Phase.STAGING, StopAsked): Machine._stop_instead,
    (Phase.MOVING, StopAsked): Machine._stop_later,
    (Phase.ROLLING_BACK, StopAsked): Machine._stop_later,
    (Phase.STOPPING, StopAsked): Machine._stop_at_once,
    **{(phase, TimerFired): Machine._timer for phase in Phase},
    # -------------------------------- connections come and go, whatever else happens
    **{(phase, wire.Lend): Machine._lend_in_peace for phase in _LIVING},
    (Phase.STAGING, wire.Lend): Machine._lend_and_stage,
    (Phase.MOVING, wire.Lend): Machine._lend_and_stage,
    **{(phase, wire.Release): Machine._release for phase in _LIVING},
    # -------------------------------- booting
    (Phase.BOOTING, wire.Ready): Machine._ready_in_boot,
    (Phase.BOOTING, wire.Failed): Machine._failed,
    (Phase.BOOTING, Died): Machine._died_before_move,
    # -------------------------------- staging
    **{(phase, wire.Staged): Machine._staged for phase in _LIVING},
    (Phase.STAGING, wire.Staged): Machine._staged_in_staging,
    (Phase.STAGING, wire.Failed): Machine._failed,
    (Phase.STAGING, Died): Machine._died_before_move,
    # -------------------------------- moving
    **{(phase, wire.AcceptOffAck): Machine._void for phase in _LIVING},  # the holder was full
    (Phase.MOVING, wire.AcceptOffAck): Machine._accept_off_acked,
    (Phase.MOVING, wire.Frozen): Machine._frozen_in_move,
    **{(phase, wire.Gathered): Machine._void for phase in _LIVING},  # of a move that was rolled back
    (Phase.MOVING, wire.Gathered): Machine._gathered,
    (Phase.MOVING, wire.Refused): Machine._refused,
    (Phase.MOVING, wire.Adopted): Machine._adopted,
    (Phase.MOVING, wire.Failed): Machine._failed_in_move,
    (Phase.MOVING, Died): Machine._died_in_move,
    # -------------------------------- rolling back
    (Phase.ROLLING_BACK, wire.AcceptOffAck): Machine._accept_off_acked_in_roll_back,
    (Phase.ROLLING_BACK, wire.Frozen): Machine._frozen_in_roll_back,
    (Phase.ROLLING_BACK, wire.Refused): Machine._refused,
    (Phase.ROLLING_BACK, wire.Adopted): Machine._adopted,
    (Phase.ROLLING_BACK, wire.Failed): Machine._failed_alone,
    (Phase.ROLLING_BACK, Died): Machine._died_in_roll_back,
    # -------------------------------- serving
    (Phase.SERVING, wire.Ready): Machine._ready_again,
    (Phase.SERVING, wire.Failed): Machine._failed_alone,
    (Phase.SERVING, Died): Machine._died_in_peace,
    # -------------------------------- stopping
    (Phase.STOPPING, wire.Failed): Machine._failed_alone,
    (Phase.STOPPING, Died): Machine._died_while_stopping,
}

_TIMERS: dict[tuple[Phase, str], Callable[[Machine, Any], None]] = {
    (Phase.BOOTING, "change"): Machine._too_late_to_start,
    (Phase.STAGING, "change"): Machine._too_late_to_start,
    (Phase.MOVING, "change"): Machine._too_late_to_move,
    (Phase.ROLLING_BACK, "change"): Machine._roll_back_too_slow,
    (Phase.STOPPING, "stop"): Machine._stop_at_once,
}
