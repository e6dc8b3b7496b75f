"""
What the holder has: the ledger, the workers, and the effects that an event collects.

It knows how connections and workers come and go in any phase; it knows no phase.
"""

from __future__ import annotations

import collections
import enum
import itertools
from typing import TYPE_CHECKING, Any

import attrs

from copyover import events, messages
from copyover.errors import IllegalEvent
from copyover.ledger import Ending, Entry, Ledger, Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

ROOM = 0.95  # what was full accepts again below that share
MAX_BACKOFF_S = 30.0
HEALTHY_S = 10.0
NOBODY_ELSE = "it was given up at a boundary, and nobody else could serve it"


class Strength(enum.Enum):
    """How far a worker has come."""

    BOOTING = "booting"
    READY = "ready"
    RETIRING = "retiring"
    DYING = "dying"  # killed, not reaped; what it had sent still counts


@attrs.define
class Worker:
    """One worker; the second half is of the move under way."""

    id: int
    generation: int
    strength: Strength = Strength.BOOTING
    abilities: messages.Ready | None = None
    lent: int = 0
    staged: int = 0
    staged_acked: int = 0
    offs: int = 0  # accept_offs that it was sent, and the last of them that it has acknowledged
    offs_acked: int = 0
    is_full: bool = False  # it has its quota of connections, and was told to accept no more

    is_off: bool = False  # all its lends are in
    has_gathered: bool = False
    has_entered: bool = False
    shared: tuple[bytes, ...] = ()
    parked_bytes: int = 0  # of all records that it gave
    unanswered: set[int] = attrs.field(factory=set)  # freezes without their first answer
    queue: collections.deque[int] = attrs.field(factory=collections.deque)  # connections still to be frozen

    def begin_move(self) -> None:
        self.is_off = self.has_gathered = self.has_entered = False
        self.shared, self.parked_bytes = (), 0
        self.unanswered.clear()
        self.queue.clear()


@attrs.frozen
class Burial:
    """A dead worker, and what became of its connections; those parked wait for somebody to go on with them."""

    worker: Worker
    parked: list[Entry]
    lost: list[int]
    ended: list[int]


class Holdings:
    """Everything that the holder keeps. *capacity*: the live connections that its descriptors allow for."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.quotas = events.Quotas()
        self.is_full = False
        self.ledger = Ledger()
        self.workers: dict[int, Worker] = {}
        self.generation = 0
        self.wanted = 0  # workers of the serving generation
        self.kept: dict[int, str] = {}  # what lives on in a retiring generation, and why
        self.withdrawn: set[int] = set()  # listeners that a roll-back took away: who came by them is served by nobody
        self.counters: collections.Counter[str] = collections.Counter()
        self.failures = 0
        self.effects: list[events.Effect] = []
        self.batches = itertools.count(1)  # never twice the same: an answer names the freeze that it is to
        self.worker_numbers = itertools.count(1)

    # ---- effects

    def send(self, worker: int, message: messages.Message, descriptors: Iterable[int] = ()) -> None:
        if self.is_alive(worker):
            self.effects.append(events.Send(worker, message, tuple(descriptors)))

    def kill(self, worker: int) -> None:
        if self.is_alive(worker):
            self.workers[worker].strength = Strength.DYING
            self.effects.append(events.Kill(worker))

    def note(self, event: str, **fields: Any) -> None:
        self.effects.append(events.Note(event, fields))

    def set_timer(self, name: str, after_s: float | None) -> None:
        self.effects.append(events.SetTimer(name, after_s))

    def number_on(self, worker: int, batch: int) -> None:
        """Go on numbering from here: what a dead holder named must not be named again."""
        self.worker_numbers = itertools.count(worker)
        self.batches = itertools.count(batch)

    def spawn(self, generation: int, after_s: float = 0.0) -> int:
        worker = next(self.worker_numbers)
        self.workers[worker] = Worker(worker, generation)
        self.effects.append(events.Spawn(worker, generation, after_s))
        return worker

    def drop(self, copies: Iterable[tuple[int, int]]) -> None:
        """Tell workers to close their copies: pairs of worker and cookie."""
        per_worker: dict[int, list[int]] = {}
        for worker, cookie in copies:
            per_worker.setdefault(worker, []).append(cookie)
        for worker, cookies in per_worker.items():
            self.send(worker, messages.Drop(cookie=tuple(cookies)))

    # ---- workers

    def is_alive(self, worker: int) -> bool:
        return worker in self.workers and self.workers[worker].strength is not Strength.DYING

    def living(self, workers: Iterable[int]) -> list[Worker]:
        return [self.workers[worker] for worker in workers if self.is_alive(worker)]

    def serving(self) -> list[Worker]:
        """Return the workers of the serving generation that are ready."""
        return [w for w in self.workers.values() if w.generation == self.generation and w.strength is Strength.READY]

    def admit(self, worker: int, *, is_moving: bool = False) -> None:
        """Let it accept, unless we could not keep what it accepts: then clients wait in the backlog."""
        if self.is_full or not self.is_alive(worker):
            return
        if self._has_room(self.workers[worker]):
            self.workers[worker].is_full = False
            self.send(worker, messages.AcceptOn(moving=is_moving))
        else:
            self._fill(self.workers[worker])

    def _has_room(self, worker: Worker) -> bool:
        """Whether it has less than its quota; once full, it has to fall a little below it."""
        quota = self.quotas.connections
        return quota is None or self.ledger.owned[worker.id] < (quota * ROOM if worker.is_full else quota)

    def _fill(self, worker: Worker) -> None:
        """It has its quota: it accepts no more."""
        if not worker.is_full:
            worker.is_full = True
            owned, quota = self.ledger.owned[worker.id], self.quotas.connections
            advice = "raise worker_connections or workers, and reload"
            self.note("worker-full", worker=worker.id, connections=owned, quota=quota, advice=advice)
            self.accept_off(worker, is_moving=False)

    def accept_off(self, worker: Worker, *, is_moving: bool) -> None:
        worker.offs += 1
        self.send(worker.id, messages.AcceptOff(number=worker.offs, moving=is_moving))

    def accept_off_acked(self, event: events.FromWorker) -> bool:
        """
        Note an acknowledgement; True when it is that of the last accept_off.

        Raises:
            IllegalEvent: none of that number is due.

        """
        worker, number = self.workers[event.worker], messages.expect(event.message, messages.AcceptOffAck).number
        if not worker.offs_acked < number <= worker.offs:
            raise IllegalEvent(f"worker {worker.id} acknowledged accept_off {number}, it was sent {worker.offs}")
        worker.offs_acked = number
        return number == worker.offs

    def retire(self, worker: Worker, drain_s: float) -> None:
        """Let it finish what it serves; it closes the rest at the limit, the timer is for one that does not."""
        worker.strength = Strength.RETIRING
        self.send(worker.id, messages.Commit(drain_ms=int(drain_s * 1000)))
        self.set_timer(f"retire {worker.id}", drain_s + 5)
        self.note("retiring", worker=worker.id, generation=worker.generation, kept=self.ledger.owned[worker.id])

    def expire_oldest(self, max_retiring: int) -> None:
        """At most so many generations retire at a time."""
        retiring = [worker for worker in self.workers.values() if worker.strength is Strength.RETIRING]
        too_old = sorted({worker.generation for worker in retiring})[:-max_retiring]
        for worker in retiring:
            if worker.generation in too_old:
                self.retire(worker, 0.0)

    def restore_strength(self) -> None:
        """Bring the serving generation back to its number of workers, more slowly with each failure."""
        strong = (Strength.READY, Strength.BOOTING)
        present = sum(w.generation == self.generation and w.strength in strong for w in self.workers.values())
        for _ in range(self.wanted - present):
            after_s = 0.0 if self.failures == 0 else min(0.1 * 2**self.failures, MAX_BACKOFF_S)
            self.failures += 1
            self.counters["restarts"] += 1
            worker = self.spawn(self.generation, after_s)
            self.set_timer("healthy", after_s + HEALTHY_S)
            self.note("restarting", worker=worker, generation=self.generation, after_s=after_s)

    def bury(self, event: events.Died) -> Burial:
        """Forget a dead worker; what somebody else can go on with is parked, the rest is reset."""
        worker = self.workers.pop(event.worker)
        had = self.ledger.owned[worker.id]
        parked, lost, ended = [], [], []
        for entry in list(self.ledger.of(worker.id)):
            if entry.standing is Standing.PARKED:
                continue
            record = event.recovered.get(entry.cookie)
            if entry.cookie in event.ended:
                ended.append(entry.cookie)
            elif record is not None and entry.listener in self.withdrawn:
                self.close(entry.cookie)
            elif record is not None:
                parked.append(self._recover(entry, record))
            elif entry.cookie not in event.recovered and self.ledger.has_record(entry):
                parked.append(self.ledger.park(entry.cookie))
            else:
                lost.append(entry.cookie)
        for cookie in lost:
            self.lose(cookie)
        for cookie in ended:
            self.drop(self._end(self.ledger.lose(cookie), events.Close))
            self.counters["ended"] += 1
        self.ledger.forget_copies(worker.id)
        self.set_timer(f"retire {worker.id}", None)
        self.note(
            "died" if had or worker.strength is Strength.BOOTING else "left",
            worker=worker.id,
            generation=worker.generation,
            how=event.how,
            connections=had,
            parked=len(parked),
            lost=len(lost),
        )
        return Burial(worker, parked, lost, ended)

    def _recover(self, entry: Entry, record: messages.Record) -> Entry:
        self.counters["recovered"] += 1
        self.counters["interrupted"] += bool(record.flags & messages.RecordFlag.INTERRUPTED)
        self.kept.pop(entry.cookie, None)  # it belongs to the serving generation from here
        return self.ledger.recover(entry.cookie, record)

    def staged(self, event: events.FromWorker) -> None:
        """
        A worker has built what was staged in it so far.

        Raises:
            IllegalEvent: more than was staged, or less than before.

        """
        total = messages.expect(event.message, messages.Staged).total
        worker = self.workers[event.worker]
        if not worker.staged_acked <= total <= worker.staged:
            raise IllegalEvent(f"worker {worker.id} acknowledged {total} of {worker.staged} staged connections")
        worker.staged_acked = total

    # ---- connections

    def lend(self, event: events.FromWorker) -> list[Entry]:
        """
        Take over a copy of each connection of a batch, checked whole before anything changes.

        Raises:
            IllegalEvent: counts that do not add up, a connection that is in the ledger, or an unknown kind.

        """
        message = messages.expect(event.message, messages.Lend)
        if len(event.descriptors) != len(message.cookie) or len(set(message.cookie)) != len(message.cookie):
            raise IllegalEvent(f"worker {event.worker} lent {len(message.cookie)} connections that do not add up")
        self.ledger.check_kinds(event.worker, message.kind)
        known = [cookie for cookie in message.cookie if cookie in self.ledger.entries]
        if known:
            raise IllegalEvent(f"worker {event.worker} lent connection {known[0]}, which is in the ledger")
        worker = self.workers[event.worker]
        if worker.is_full and worker.offs_acked == worker.offs:
            raise IllegalEvent(f"worker {worker.id} lent {len(message.cookie)} connections and is told to accept none")
        entries = [
            self.ledger.lend(worker.id, cookie, descriptor, listener, kind)
            for cookie, descriptor, listener, kind in zip(
                message.cookie, event.descriptors, message.listener, message.kind, strict=True
            )
        ]
        worker.lent += len(entries)
        self.counters["accepted"] += len(entries)
        self.send(worker.id, messages.LendAck(total=worker.lent))
        self._note_full()
        if not self._has_room(worker):
            self._fill(worker)
        return entries

    def _note_full(self) -> None:
        """Descriptors run out: nobody accepts, before accepting fails."""
        if len(self.ledger) < self.capacity or self.is_full:
            return
        self.is_full = True
        self.note(
            "full",
            connections=len(self.ledger),
            advice="clients wait until others have ended; raise the hard RLIMIT_NOFILE (LimitNOFILE=) and restart",
        )
        for accepting in [worker for worker in self.workers.values() if worker.strength is Strength.READY]:
            self.accept_off(accepting, is_moving=False)

    def became(self, event: events.FromWorker) -> None:
        """
        Note what a worker serves some of its connections as from now on.

        Raises:
            IllegalEvent: one is not its own, or an unknown kind.

        """
        message = messages.expect(event.message, messages.Became)
        self.ledger.check(event.worker, message.cookie, message.epoch, (Standing.SERVED, Standing.FREEZING))
        self.ledger.check_kinds(event.worker, message.kind)
        for cookie, kind in zip(message.cookie, message.kind, strict=True):
            if not self.ledger.is_late(cookie):
                self.ledger.became(event.worker, cookie, kind)

    def adopt(self, event: events.FromWorker) -> list[tuple[Entry, int]]:
        """
        Note that the sender serves what it was given; returns it with its pause in us. Who had ceded it is relieved.

        Where a freeze has crossed the adoption nothing is returned: the answer to that follows.

        Raises:
            IllegalEvent: one was not given to it.

        """
        message = messages.expect(event.message, messages.Adopted)
        self.ledger.check(event.worker, message.cookie, message.epoch, (Standing.THAWING, Standing.FREEZING))
        held: list[tuple[int, int, bytes]] = []
        served: list[tuple[Entry, int]] = []
        copies: list[tuple[int, int]] = []
        for cookie, epoch, pause_us in zip(message.cookie, message.epoch, message.pause_us, strict=True):
            if self.ledger.is_late(cookie):
                continue
            entry = self.ledger.adopt(event.worker, cookie, epoch)
            held += [(cookie, act, pushed) for act, pushed in entry.moving.pushed]
            entry.moving.pushed.clear()
            copies += [(ceder, cookie) for ceder in self.ledger.relieve(entry)]
            if self.is_retiring(cookie):
                self.kept[cookie] = entry.moving.kept_because or NOBODY_ELSE
            if entry.standing is Standing.SERVED:
                served.append((entry, pause_us))
        self.push(event.worker, held)
        self.drop(copies)
        return served

    def cede(self, event: events.FromWorker) -> list[Entry]:
        """
        A retiring worker gives up what it had kept; returned is what somebody else is to go on with.

        Raises:
            IllegalEvent: it does not retire, one is not its own, or is of an unknown kind.

        """
        message = messages.expect(event.message, messages.Cede)
        worker = self.workers[event.worker]
        if worker.strength not in (Strength.RETIRING, Strength.DYING):
            raise IllegalEvent(f"worker {worker.id} is {worker.strength.value} and ceded connections")
        self.ledger.check(worker.id, message.cookie, message.epoch, (Standing.SERVED,))
        self.ledger.check_kinds(worker.id, message.kind)
        ceded: list[Entry] = []
        for cookie, record in zip(message.cookie, message.records(), strict=True):
            if self.ledger.is_late(cookie):
                continue
            self.kept.pop(cookie, None)
            entry = self.ledger.cede(worker.id, cookie, record)
            if entry.listener in self.withdrawn:
                self.close(cookie)
            else:
                ceded.append(entry)
        self.counters["ceded"] += len(ceded)
        self.note("ceded", worker=worker.id, generation=worker.generation, connections=len(ceded))
        return ceded

    def ceder(self, entry: Entry) -> int | None:
        """Return the worker that ceded it and can go on with it, or None."""
        passage = entry.moving
        can = passage.is_ceded and self.is_alive(passage.origin) and passage.origin not in passage.unfit
        return passage.origin if can else None

    def stage(self, target: int, entries: Iterable[Entry]) -> None:
        """Give a worker descriptors, so that it builds them, paused."""
        for chunk in chunks(list(entries), messages.MAX_DESCRIPTORS):
            for entry in chunk:
                self.ledger.stage(entry.cookie, target)
            self.workers[target].staged += len(chunk)
            cookies, places = [entry.cookie for entry in chunk], [entry.listener for entry in chunk]
            message = messages.Stage(cookie=tuple(cookies), listener=tuple(places))
            self.send(target, message, [entry.descriptor for entry in chunk])

    def thaw(self, target: int, rows: Sequence[tuple[Entry, messages.Record]]) -> None:
        """Give a worker the records of parked connections that it has built."""
        for entry, _ in rows:
            self.ledger.thaw(entry.cookie, target)
        for cut in messages.record_chunks([record for _, record in rows], messages.MAX_ROWS):
            self.send(
                target,
                messages.Thaw(
                    cookie=tuple([entry.cookie for entry, _ in rows[cut]]),
                    epoch=tuple([entry.epoch for entry, _ in rows[cut]]),
                    **messages.record_columns([record for _, record in rows[cut]]),
                ),
            )
        if not all(record.flags & messages.RecordFlag.CUT for _, record in rows):
            self.send(target, messages.Enter(cut=False))

    def forward(self, event: events.FromWorker) -> None:
        """Give what was pushed to connections that have moved to whoever has them; to one that ended, to nobody."""
        message = messages.expect(event.message, messages.Forward)
        per_owner: dict[int, list[tuple[int, int, bytes]]] = {}
        for cookie, act, pushed in zip(message.cookie, message.act, message.pushed, strict=True):
            entry = self.ledger.entries.get(cookie)
            if entry is not None and (entry.standing is Standing.PARKED or self.ledger.has_record(entry)):
                entry.moving.pushed.append((act, pushed))
            elif entry is not None:
                per_owner.setdefault(entry.owner, []).append((cookie, act, pushed))
        for owner, rows in per_owner.items():
            self.push(owner, rows)

    def push(self, worker: int, rows: list[tuple[int, int, bytes]]) -> None:
        if rows:
            cookies, acts, pushed = zip(*rows, strict=True)
            self.send(worker, messages.Push(cookie=cookies, act=acts, pushed=pushed))

    def release(self, event: events.FromWorker, on_ended: Callable[[int], None]) -> None:
        """
        A worker says which of its connections ended; *on_ended* is called for each.

        Raises:
            IllegalEvent: one is not its own.

        """
        message = messages.expect(event.message, messages.Release)
        standings = (Standing.SERVED, Standing.FREEZING, Standing.THAWING)
        self.ledger.check(event.worker, message.cookie, message.epoch, standings)
        copies: list[tuple[int, int]] = []
        for cookie, how in zip(message.cookie, message.how, strict=True):
            if self.ledger.is_late(cookie):
                continue
            copies += self._end(self.ledger.release(event.worker, cookie), events.Close)
            self.counters["ended"] += 1
            self.counters["expired"] += how == messages.How.EXPIRED
            on_ended(cookie)
        self.drop(copies)

    def is_retiring(self, cookie: int) -> bool:
        """Whether a connection lives on in a generation that does not serve any more."""
        owner = self.workers.get(self.ledger.entries[cookie].owner)
        return owner is not None and owner.strength is Strength.RETIRING

    def note_kept(self) -> None:
        """Count what retiring generations serve; why is not known any more."""
        for entry in self.ledger.entries.values():
            if entry.standing is Standing.SERVED and self.is_retiring(entry.cookie):
                self.kept.setdefault(entry.cookie, "it stayed in its generation before this holder came")

    def lose(self, cookie: int) -> None:
        """Nobody can serve it any more; its client is told."""
        self.drop(self._end(self.ledger.lose(cookie), events.Reset))
        self.counters["lost"] += 1

    def close(self, cookie: int) -> None:
        """Nobody has a listener for it any more; its client gets FIN, as far as it left nothing unread."""
        self.drop(self._end(self.ledger.lose(cookie), events.Close))

    def _end(self, ending: Ending, effect: type[events.Close | events.Reset]) -> list[tuple[int, int]]:
        self.effects.append(effect(ending.descriptor))
        self.kept.pop(ending.cookie, None)
        return [(worker, ending.cookie) for worker in ending.copies_in]

    def regain_room(self) -> bool:
        """See whether enough connections have ended since the holder, or a worker, was full."""
        if not self.is_full or len(self.ledger) >= self.capacity * ROOM:
            return any(worker.is_full and self._has_room(worker) for worker in self.serving())
        self.is_full = False
        self.note("room", connections=len(self.ledger))
        return True


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))
