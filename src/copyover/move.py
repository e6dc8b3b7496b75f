"""
How the connections of one change get from the incumbent to the replacement, or back.

It stages, freezes, thaws and enters, and knows when all is settled; which phase follows is decided in reload.
"""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING

import attrs

from copyover import messages
from copyover.holdings import chunks
from copyover.ledger import Standing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from copyover.events import FromWorker, Reload
    from copyover.holdings import Burial, Holdings, Worker
    from copyover.ledger import Entry

ROLLING_BATCH = 64
ROLLING_WINDOW = 2


class Move:
    """The connections of one change. *open* are those whose passage is not settled."""

    def __init__(self, holdings: Holdings, asked: Reload, incumbents: list[int], replacements: list[int]) -> None:
        self._holdings = holdings
        self._ledger = holdings.ledger
        self._asked = asked
        self.incumbents = incumbents
        self.replacements = replacements
        self.has_cut = asked.move != "rolling"
        self.is_backwards = False  # rolling back: all returns to the incumbent
        self.open: set[int] = set()
        self.moved = 0
        self.ended = 0
        self.lost = 0
        self.closed: set[int] = set()  # accepted from an added listener that a roll-back takes away again
        self.kept: dict[int, str] = {}
        self.given_back = 0
        self.pauses_us: list[int] = []
        self._routes: dict[int, int] = {}  # of cuts: incumbent to replacement
        self._between: collections.Counter[int] = collections.Counter()  # thawed, not adopted, by the incumbent left
        self._left: dict[int, int] = {}  # the incumbent that each of those left

    def living_incumbents(self) -> list[Worker]:
        return self._holdings.living(self.incumbents)

    def living_replacements(self) -> list[Worker]:
        return self._holdings.living(self.replacements)

    # ---- staging

    def begin(self) -> None:
        """Let the replacement build everything, paused, before the incumbent lets go of anything."""
        self._ledger.begin()
        for place, incumbent in enumerate(self.incumbents):
            self._routes[incumbent] = self.replacements[place % len(self.replacements)]
        for worker in self.living_incumbents() + self.living_replacements():
            worker.begin_move()
        owners = set(self.incumbents)
        entries = self._ledger.entries.values()
        self.stage([entry for entry in entries if entry.owner in owners or entry.standing is Standing.PARKED])

    def resume(self) -> None:
        """Go on with the move of a holder that died: everything is built, frozen or thawed where it is."""
        self._ledger.begin()
        for worker in self.living_incumbents() + self.living_replacements():
            worker.begin_move()

    def stage(self, entries: Iterable[Entry]) -> None:
        per_target: dict[int, list[Entry]] = {}
        staged: collections.Counter[int] = collections.Counter()
        for entry in entries:
            target = self._target(entry, staged)
            if target is not None:
                self.open.add(entry.cookie)
                staged[target.id] += 1
                per_target.setdefault(target.id, []).append(entry)
        for target_id, batch in per_target.items():
            self._holdings.stage(target_id, batch)

    def _target(self, entry: Entry, staged: collections.Counter[int]) -> Worker | None:
        """Return the replacement's worker for an incumbent's connection; all of one cut go to one."""
        living = self.living_replacements()
        if not living:
            return None
        if self._is_of_cut(entry):
            return self._holdings.workers[self._route(entry) or living[0].id]
        return min(living, key=lambda worker: worker.staged + staged[worker.id] + self._ledger.owned[worker.id])

    def _is_of_cut(self, entry: Entry) -> bool:
        return self.has_cut and (self._asked.move == "together" or entry.kind is not messages.Kind.HTTP)

    def _route(self, entry: Entry) -> int:
        """Return the worker to which the cut of an incumbent's connection goes, or 0."""
        route = self._routes.get(entry.owner, 0)
        return route if self._is_of_cut(entry) and self._holdings.is_alive(route) else 0

    @property
    def is_staged(self) -> bool:
        return all(worker.staged_acked == worker.staged for worker in self.living_replacements())

    # ---- accepting switches, freezing begins

    def switch_accepting(self) -> None:
        """Without a cut the replacement accepts at once; with one, when that has been entered."""
        for incumbent in self.living_incumbents():
            self._holdings.accept_off(incumbent, is_moving=True)
        if not self.has_cut:
            for replacement in self.living_replacements():
                self._holdings.admit(replacement.id, is_moving=True)
        self.place_all()  # those whose worker was killed before

    def accept_off_acked(self, worker: Worker) -> None:
        """All its lends are in: the set of its connections is closed, freezing can begin."""
        worker.is_off = True
        served = [entry for entry in self._ledger.of(worker.id) if entry.standing is Standing.SERVED]
        worker.queue.extend(entry.cookie for entry in served if not self._is_of_cut(entry))
        if self.has_cut:
            self._freeze_cut(worker, [entry.cookie for entry in served if self._is_of_cut(entry)])
        self._feed(worker)

    def _freeze_cut(self, worker: Worker, cookies: list[int]) -> None:
        packets = list(chunks(cookies, messages.MAX_ROWS)) or [[]]  # an empty cut has its shared state, too
        for place, packet in enumerate(packets):
            self._freeze(worker, packet, is_cut=True, more=place + 1 < len(packets))

    def _freeze(self, worker: Worker, cookies: Sequence[int], *, is_cut: bool, more: bool = False) -> None:
        batch = next(self._holdings.batches)
        worker.unanswered.add(batch)
        message = messages.Freeze(
            batch=batch,
            more=more,
            gather_ms=max(int(self._asked.gather_s * 1000), 1) if is_cut else 0,
            wait_ms=int(self._asked.boundary_s * 1000),
            cookie=tuple(cookies),
            epoch=tuple([self._ledger.freeze(cookie) for cookie in cookies]),
        )
        self._holdings.send(worker.id, message)

    def _feed(self, worker: Worker) -> None:
        """
        Keep at most two batches between freeze and adopted; a connection that is busy holds up no other.

        The cuts go first: who is entered in a replacement finds the shared state there.
        """
        if self.has_cut and not all(replacement.has_entered for replacement in self.living_replacements()):
            return
        while (
            worker.queue
            and len(worker.unanswered) < ROLLING_WINDOW
            and self._between[worker.id] <= ROLLING_BATCH * (ROLLING_WINDOW - 1)
        ):
            batch: list[int] = []
            while worker.queue and len(batch) < ROLLING_BATCH:
                entry = self._ledger.entries.get(worker.queue.popleft())
                if entry is not None and entry.standing is Standing.SERVED:
                    batch.append(entry.cookie)
            if batch:
                self._freeze(worker, batch, is_cut=False)

    # ---- answers

    def frozen(self, event: FromWorker) -> None:
        """
        Records came: park the connections and give them to whom the direction wants.

        Raises:
            IllegalEvent: one is not the sender's, was not asked for, or is of an unknown kind.

        """
        message = messages.expect(event.message, messages.Frozen)
        worker = self._holdings.workers[event.worker]
        self._ledger.check(worker.id, message.cookie, message.epoch, (Standing.FREEZING,))
        self._ledger.check_kinds(worker.id, message.kind)
        worker.unanswered.discard(message.batch)
        worker.parked_bytes += sum(record.size_bytes for record in message.records())
        self.place(
            [
                self._ledger.frozen(worker.id, cookie, epoch, record)
                for cookie, epoch, record in zip(message.cookie, message.epoch, message.records(), strict=True)
                if not self._ledger.is_late(cookie)
            ]
        )
        self._feed(worker)

    def excess(self, worker: int) -> str | None:
        """Return why the records that a worker gave in this move are too many, or None."""
        given, quota = self._holdings.workers[worker].parked_bytes, self._asked.quotas.record_bytes
        if given <= quota:
            return None
        return (
            f"worker {worker} gave records of {given} bytes, over its quota of {quota}: raise worker_record_bytes, or "
            f"let unsent_bytes and the states be smaller"
        )

    def adopted(self, event: FromWorker) -> None:
        """
        The sender serves these now.

        Raises:
            IllegalEvent: one was not given to it.

        """
        for entry, pause_us in self._holdings.adopt(event):
            self.pauses_us.append(pause_us)
            self.moved += event.worker in self.replacements
            if entry.moving.kept_because is not None:
                self.kept[entry.cookie] = entry.moving.kept_because
            self._settled(entry.cookie)

    def refused(self, event: FromWorker) -> None:
        """
        The sender keeps these (answer to a freeze), or gives their records back (answer to a thaw).

        Raises:
            IllegalEvent: one was neither asked for nor given to it.

        """
        message = messages.expect(event.message, messages.Refused)
        worker = self._holdings.workers[event.worker]
        self._ledger.check(worker.id, message.cookie, message.epoch, (Standing.THAWING, Standing.FREEZING))
        given_back: list[Entry] = []
        copies: list[tuple[int, int]] = []
        for cookie, reason in zip(message.cookie, message.reason, strict=True):
            if self._ledger.is_late(cookie):
                continue
            entry = self._ledger.refuse(worker.id, cookie, reason.decode(errors="replace"))
            if entry.standing is Standing.PARKED:
                given_back.append(entry)
                continue
            if not self.is_backwards or worker.id in self.replacements:
                self.kept[cookie] = entry.moving.kept_because or ""
            self._settled(cookie)
            copies += [(copy, cookie) for copy in self._ledger.forget_others(cookie)]
        self.given_back += sum(not entry.moving.is_ceded for entry in given_back)  # else it is none of the incumbent's
        self._holdings.drop(copies)
        self.place(given_back)

    def gathered(self, event: FromWorker) -> None:
        """The sender's cut is closed."""
        worker = self._holdings.workers[event.worker]
        if worker.is_off:  # else it answers a move that was rolled back
            worker.has_gathered = True
            worker.shared = messages.expect(event.message, messages.Gathered).shared

    def enter_cuts(self) -> None:
        """Let each replacement begin that has all the cuts which go to it; after the last, HTTP follows."""
        if not self.has_cut or self.is_backwards:
            return
        for replacement in self.living_replacements():
            routed = [incumbent for incumbent, route in self._routes.items() if route == replacement.id]
            sources = [self._holdings.workers[worker] for worker in routed if worker in self._holdings.workers]
            if replacement.has_entered or not all(source.has_gathered for source in sources):
                continue
            replacement.has_entered = True
            shared = tuple(itertools.chain.from_iterable(source.shared for source in sources))
            self._holdings.send(replacement.id, messages.Enter(cut=True, shared=shared))
            self._holdings.admit(replacement.id, is_moving=True)
            for incumbent in self.living_incumbents():
                self._feed(incumbent)

    # ---- placing

    def place(self, parked: Iterable[Entry]) -> None:
        """Give parked connections to whom the direction wants; nobody alive, they stay; nobody fit, they are lost."""
        per_target: dict[int, list[Entry]] = {}
        for entry in parked:
            target = None if self._has_no_listener(entry) else self._destination(entry)
            if target is not None:
                self.open.add(entry.cookie)
                per_target.setdefault(target, []).append(entry)
            elif self._has_no_listener(entry):
                self.closed.add(entry.cookie)
                self._holdings.close(entry.cookie)
                self._settled(entry.cookie)
            elif self.living_incumbents() or self.living_replacements():
                self._holdings.lose(entry.cookie)
                self.note_lost([entry.cookie])
        for target, entries in per_target.items():
            self._thaw(target, entries)

    def place_all(self) -> None:
        self.place([entry for entry in self._ledger.entries.values() if entry.standing is Standing.PARKED])

    def _destination(self, entry: Entry) -> int | None:
        passage = entry.moving
        sides = [self.living_replacements(), self.living_incumbents()]
        if entry.listener in self._asked.added:
            sides.pop()  # the incumbent does not know its listener
        if self.is_backwards or passage.kept_because is not None:
            sides.reverse()
        for side in sides:
            living = [worker.id for worker in side if worker.id not in passage.unfit]
            if not living:
                continue
            preferred = [copy for copy in (self._route(entry), passage.staged_in, passage.origin) if copy in living]
            return preferred[0] if preferred else min(living, key=lambda worker: self._ledger.owned[worker])
        return self._holdings.ceder(entry) if any(sides) else None

    def _thaw(self, target: int, entries: list[Entry]) -> None:
        without_copy = [e for e in entries if target not in (e.moving.staged_in, e.moving.origin)]
        is_forward = target in self.replacements
        if is_forward:
            self._unstage(without_copy)
        self._holdings.stage(target, without_copy)
        for entry in entries:
            if is_forward and entry.cookie not in self._left:
                self._left[entry.cookie] = entry.owner
                self._between[entry.owner] += 1
        self._holdings.thaw(target, [(entry, self._record_for(entry, target)) for entry in entries])

    def _unstage(self, entries: Iterable[Entry]) -> None:
        """It became part of a cut after it was built elsewhere: it belongs to the others of its worker."""
        built = [(e.moving.staged_in, e.cookie) for e in entries if e.moving.staged_in in self.replacements]
        for _, cookie in built:
            self._ledger.unstage(cookie)
        self._holdings.drop(built)

    def _record_for(self, entry: Entry, target: int) -> messages.Record:
        record = self._ledger.record_for(entry, target)
        is_cut = self.has_cut and not self.is_backwards and target in self.replacements
        if is_cut and not self._holdings.workers[target].has_entered:
            # It waits for the cut, also where it missed its own incumbent's.
            return attrs.evolve(record, flags=record.flags | messages.RecordFlag.CUT)
        return record

    # ---- settling

    def _settled(self, cookie: int) -> None:
        """Its passage is over; the incumbent that it left may freeze another."""
        self.open.discard(cookie)
        incumbent = self._left.pop(cookie, 0)
        self._between[incumbent] -= 1
        if not self.is_backwards and self._holdings.is_alive(incumbent):
            self._feed(self._holdings.workers[incumbent])

    def note_ended(self, cookie: int) -> None:
        self.ended += cookie in self.open  # else it had moved before, or was no part of this
        self.kept.pop(cookie, None)
        self._settled(cookie)

    def note_lost(self, cookies: Iterable[int]) -> None:
        for cookie in cookies:
            self.lost += 1
            self.closed.discard(cookie)
            self.kept.pop(cookie, None)
            self._settled(cookie)

    def note_burial(self, burial: Burial) -> None:
        self.note_lost(burial.lost)
        for cookie in burial.ended:
            self.note_ended(cookie)

    @property
    def is_complete(self) -> bool:
        """Forward: everything is adopted, ended or kept, and no lend can follow."""
        incumbents = self.living_incumbents()
        if self.open or not all(worker.is_off for worker in incumbents):
            return False
        return not self.has_cut or all(worker.has_gathered for worker in incumbents)

    # ---- backwards

    def turn_back(self) -> None:
        """The replacement freezes what it has; the incumbent thaws it, and accepts again."""
        self.is_backwards = True
        self._holdings.withdrawn |= self._asked.added
        for incumbent in self.living_incumbents():
            incumbent.queue.clear()
            self._holdings.admit(incumbent.id)
        for replacement in self.living_replacements():
            replacement.is_off = False
            self._holdings.accept_off(replacement, is_moving=True)
        own = {worker.id for worker in self.living_incumbents()}
        served = {e.cookie for e in self._ledger.entries.values() if e.standing is Standing.SERVED and e.owner in own}
        self.open -= served
        self.freeze_replacements()
        self.place_all()

    def freeze_replacements(self) -> None:
        """Freeze what the replacement serves or was given; what it refused to give back stays there."""
        self._close_without_listener()
        for replacement in self.living_replacements():
            cookies = [
                entry.cookie
                for entry in self._ledger.of(replacement.id)
                if entry.standing in (Standing.SERVED, Standing.THAWING)
                and entry.moving.kept_because is None
                and not self._has_no_listener(entry)
            ]
            self.open.update(cookies)
            for chunk in chunks(cookies, messages.MAX_ROWS):
                self._freeze(replacement, chunk, is_cut=False)

    def _has_no_listener(self, entry: Entry) -> bool:
        """Whether a roll-back took its listener away: the incumbent has none of that number, and never will."""
        return entry.listener in self._holdings.withdrawn

    def _close_without_listener(self) -> None:
        """Let the replacement end these by itself: what is unsent, then FIN."""
        for replacement in self.living_replacements():
            cookies = [
                entry.cookie
                for entry in self._ledger.of(replacement.id)
                if self._has_no_listener(entry) and entry.cookie not in self.closed
            ]
            self.closed.update(cookies)
            for chunk in chunks(cookies, messages.MAX_ROWS):
                self._holdings.push(replacement.id, [(cookie, messages.Act.CLOSE, b"") for cookie in chunk])

    @property
    def is_back(self) -> bool:
        """Backwards: all is with the incumbent again, or kept; a dying replacement may still have an answer."""
        present = [self._holdings.workers[worker] for worker in self.replacements if worker in self._holdings.workers]
        return not self.open and all(worker.is_off and self._holdings.is_alive(worker.id) for worker in present)

    def stalled(self) -> list[Worker]:
        """Return those that owe an answer, the replacement's before all others."""
        owing = {self._ledger.entries[cookie].owner for cookie in self.open if cookie in self._ledger.entries}
        replacements = [w for w in self.living_replacements() if w.id in owing or not w.is_off]
        return replacements or self._holdings.living(owing)

    def turn_forward(self) -> None:
        """Rolling back, the incumbent died: who lives serves."""
        self.is_backwards = False
        self._holdings.withdrawn -= self._asked.added
        self.has_cut = False
        self.place_all()
        for replacement in self.living_replacements():
            replacement.has_entered = True
            self._holdings.send(replacement.id, messages.Enter(cut=True))
            self._holdings.admit(replacement.id, is_moving=True)
