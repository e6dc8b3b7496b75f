"""
What the holder has: the ledger, the workers, and the effects that an event collects.

It knows how connections and workers come and go in any phase; it knows no phase.
"""

from __future__ import annotations

import collections
import enum
import heapq
import itertools
from typing import TYPE_CHECKING, Any

import attrs

from copyover import events, messages
from copyover.entries import Standing
from copyover.errors import IllegalEvent
from copyover.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from copyover.entries import Case
    from copyover.ledger import Endings

ROOM = 0.95  # what was full accepts again below that share
MAX_BACKOFF_S = 30.0
HEALTHY_S = 10.0
ACKED_TOGETHER = 256  # lends: nobody waits for the acknowledgement, and one each costs as much as the lend
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
    parked: list[int]
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
        given, lost, ended, recovered = [], [], [], {}
        for cookie in self.ledger.find(Standing.SERVED, Standing.FREEZING, Standing.THAWING, owners=(worker.id,)):
            record = event.recovered.get(cookie)
            if cookie in event.ended:
                ended.append(cookie)
            elif record is not None:
                recovered[cookie] = record
            elif cookie not in event.recovered and cookie in self.ledger.records:
                given.append(cookie)
            else:
                lost.append(cookie)
        self.ledger.park(given)
        parked = [*given, *self._recover(recovered)]
        self.lose(lost)
        self._end(self.ledger.lose(ended), events.Close)
        self.counters["ended"] += len(ended)
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

    def _recover(self, recovered: dict[int, messages.Record]) -> list[int]:
        """Park what somebody can go on with, and return it."""
        parked = self.close_without_listener(list(recovered))
        records = {cookie: recovered[cookie] for cookie in parked}
        self.ledger.recover(records)
        self.counters["recovered"] += len(records)
        interrupted = messages.RecordFlag.INTERRUPTED
        self.counters["interrupted"] += sum(bool(record.flags & interrupted) for record in records.values())
        for cookie in records:
            self.kept.pop(cookie, None)  # it belongs to the serving generation from here
        return parked

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

    def lend(self, event: events.FromWorker) -> Sequence[int]:
        """
        Take over a copy of each connection of a batch, checked whole before anything changes.

        Raises:
            IllegalEvent: counts that do not add up, a connection that is in the ledger, or an unknown kind.

        """
        message = messages.expect(event.message, messages.Lend)
        worker = self.workers[event.worker]
        if worker.is_full and worker.offs_acked == worker.offs:
            raise IllegalEvent(f"worker {worker.id} lent {len(message.cookie)} connections and is told to accept none")
        self.ledger.lend(worker.id, message.cookie, event.descriptors, message.listener, message.kind)
        rows = len(message.cookie)
        before, worker.lent = worker.lent, worker.lent + rows
        self.counters["accepted"] += rows
        if before // ACKED_TOGETHER != worker.lent // ACKED_TOGETHER:
            self.send(worker.id, messages.LendAck(total=worker.lent))
        self._note_full()
        if not self._has_room(worker):
            self._fill(worker)
        return message.cookie

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
        self.ledger.became(event.worker, messages.expect(event.message, messages.Became))

    def adopt(self, event: events.FromWorker) -> messages.Adopted:
        """
        Note that the sender serves what it was given, and return that. Who had ceded it is relieved.

        Where a freeze has crossed the adoption nothing is returned: the answer to that follows.

        Raises:
            IllegalEvent: one was not given to it.

        """
        adopted, served = self.ledger.adopt(event.worker, messages.expect(event.message, messages.Adopted))
        waited = [cookie for cookie in adopted.cookie if cookie in self.ledger.pushed] if self.ledger.pushed else []
        self.push(event.worker, [(c, act, pushed) for c in waited for act, pushed in self.ledger.pushed.pop(c)])
        self.drop(self.ledger.relieve(adopted.cookie))
        if self.workers[event.worker].strength is Strength.RETIRING:
            for cookie in adopted.cookie:
                self.kept[cookie] = self.ledger.kept_because.get(cookie) or NOBODY_ELSE
        return served

    def cede(self, event: events.FromWorker) -> list[int]:
        """
        A retiring worker gives up what it had kept; returned is what somebody else is to go on with.

        Raises:
            IllegalEvent: it does not retire, one is not its own, or is of an unknown kind.

        """
        worker = self.workers[event.worker]
        if worker.strength not in (Strength.RETIRING, Strength.DYING):
            raise IllegalEvent(f"worker {worker.id} is {worker.strength.value} and ceded connections")
        message = self.ledger.cede(worker.id, messages.expect(event.message, messages.Cede))
        for cookie in message.cookie:
            self.kept.pop(cookie, None)
        ceded = self.close_without_listener(message.cookie)
        self.counters["ceded"] += len(ceded)
        self.note("ceded", worker=worker.id, generation=worker.generation, connections=len(ceded))
        return ceded

    def ceder(self, case: Case) -> int | None:
        """Return the worker that ceded such a connection and can go on with it, or None."""
        can = case.is_ceded and self.is_alive(case.origin) and case.origin not in case.unfit
        return case.origin if can else None

    def stage(self, target: int, cookies: Sequence[int]) -> None:
        """Give a worker descriptors, so that it builds them, paused."""
        self.ledger.stage(cookies, target)
        self.workers[target].staged += len(cookies)
        for chunk in chunks(cookies, messages.MAX_DESCRIPTORS):
            message = messages.Stage(cookie=tuple(chunk), listener=tuple(self.ledger.column("listener", chunk)))
            self.send(target, message, self.ledger.column("descriptor", chunk))

    def thaw(self, target: int, cookies: Sequence[int], *, is_cut: bool = False) -> None:
        """Give a worker the records of parked connections that it has built; with *is_cut* they wait for their cut."""
        records = self.ledger.records_for(cookies, target)
        epochs = self.ledger.thaw(cookies, target)
        start = 0
        for packet in records:
            end = start + packet.rows
            columns = packet.columns() | {"flags": packet.flagged(is_cut=is_cut)}
            self.send(target, messages.Thaw(epoch=tuple(epochs[start:end]), **columns))
            start = end
        if not is_cut:
            self.send(target, messages.Enter(cut=False))

    def forward(self, event: events.FromWorker) -> None:
        """Give what was pushed to connections that have moved to whoever has them; to one that ended, to nobody."""
        message = messages.expect(event.message, messages.Forward)
        per_owner: dict[int, list[tuple[int, int, bytes]]] = {}
        for cookie, act, pushed in zip(message.cookie, message.act, message.pushed, strict=True):
            if cookie in self.ledger.records:
                self.ledger.pushed.setdefault(cookie, []).append((act, pushed))
            elif cookie in self.ledger:
                (owner,) = self.ledger.column("owner", [cookie])
                per_owner.setdefault(owner, []).append((cookie, act, pushed))
        for owner, rows in per_owner.items():
            self.push(owner, rows)

    def push(self, worker: int, rows: list[tuple[int, int, bytes]]) -> None:
        if rows:
            cookies, acts, pushed = zip(*rows, strict=True)
            self.send(worker, messages.Push(cookie=cookies, act=acts, pushed=pushed))

    def release(self, event: events.FromWorker) -> Sequence[int]:
        """
        A worker says which of its connections ended; they are returned.

        Raises:
            IllegalEvent: one is not its own.

        """
        message, endings = self.ledger.release(event.worker, messages.expect(event.message, messages.Release))
        self._end(endings, events.Close)
        self.counters["ended"] += len(message.cookie)
        self.counters["expired"] += message.how.count(messages.How.EXPIRED)
        return message.cookie

    def is_retiring(self, cookie: int) -> bool:
        """Whether a connection lives on in a generation that does not serve any more."""
        (owner,) = self.ledger.column("owner", [cookie])
        return owner in self.workers and self.workers[owner].strength is Strength.RETIRING

    def note_kept(self) -> None:
        """Count what retiring generations serve; why is not known any more."""
        retiring = {worker.id for worker in self.workers.values() if worker.strength is Strength.RETIRING}
        for cookie in self.ledger.find(Standing.SERVED, owners=retiring):
            self.kept.setdefault(cookie, "it stayed in its generation before this holder came")

    def lose(self, cookies: Sequence[int]) -> None:
        """Nobody can serve them any more; their clients are told."""
        self._end(self.ledger.lose(cookies), events.Reset)
        self.counters["lost"] += len(cookies)

    def close(self, cookies: Sequence[int]) -> None:
        """Nobody has a listener for them any more; their clients get FIN, as far as they left nothing unread."""
        self._end(self.ledger.lose(cookies), events.Close)

    def close_without_listener(self, cookies: Sequence[int]) -> list[int]:
        """Close those whose listener a roll-back took away; return the others."""
        if not self.withdrawn:
            return list(cookies)
        listeners = self.ledger.column("listener", cookies)
        self.close([cookie for cookie, at in zip(cookies, listeners, strict=True) if at in self.withdrawn])
        return [cookie for cookie, at in zip(cookies, listeners, strict=True) if at not in self.withdrawn]

    def _end(self, endings: Endings, effect: type[events.Close | events.Reset]) -> None:
        if endings.descriptors:
            self.effects.append(effect(tuple(endings.descriptors)))
        if self.kept:
            for cookie in endings.cookies:
                self.kept.pop(cookie, None)
        self.drop(endings.copies)

    @property
    def is_nearly_full(self) -> bool:
        """Whether to be slow to say that it is full would matter."""
        return len(self.ledger) >= self.capacity * ROOM

    def regain_room(self) -> bool:
        """See whether enough connections have ended since the holder, or a worker, was full."""
        if not self.is_full or self.is_nearly_full:
            return any(worker.is_full and self._has_room(worker) for worker in self.serving())
        self.is_full = False
        self.note("room", connections=len(self.ledger))
        return True


def spread(cookies: Sequence[int], loads: Mapping[int, int]) -> dict[int, list[int]]:
    """Say who is to take which, so that those with the smallest *loads* take the most; who takes none is left out."""
    if len(loads) == 1:
        return {next(iter(loads)): list(cookies)} if cookies else {}
    heap = [(load, place, worker) for place, (worker, load) in enumerate(loads.items())]
    heapq.heapify(heap)
    shares: dict[int, list[int]] = {}
    for cookie in cookies:
        load, place, worker = heap[0]
        heapq.heapreplace(heap, (load + 1, place, worker))
        shares.setdefault(worker, []).append(cookie)
    return shares


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))
