"""
How the connections of one change get from the incumbent to the replacement, or back.

It stages, freezes, thaws and enters, and knows when all is settled; which phase follows is decided in reload.
"""

from __future__ import annotations

import array
import collections
import itertools
from typing import TYPE_CHECKING

from copyover import messages
from copyover.entries import Standing
from copyover.holdings import chunks, spread

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from copyover.entries import Case
    from copyover.events import FromWorker, Reload
    from copyover.holdings import Burial, Holdings, Worker

ROLLING_BATCH = 32
ROLLING_WINDOW = 2
ANYWHERE = 0  # no worker has that number


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
        self.pauses_us = array.array("I")
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
        parked = self._ledger.parked()
        owned = self._ledger.find(Standing.SERVED, Standing.FREEZING, Standing.THAWING, owners=set(self.incumbents))
        self.stage([*owned, *parked])

    def resume(self) -> None:
        """Go on with the move of a holder that died: everything is built, frozen or thawed where it is."""
        self._ledger.begin()
        for worker in self.living_incumbents() + self.living_replacements():
            worker.begin_move()

    def stage(self, cookies: Sequence[int]) -> None:
        """Have them built: all of one cut in one worker, the others where the fewest are."""
        living = self.living_replacements()
        if not living:
            return
        self.open.update(cookies)
        sorted_by = self._ledger.sort(cookies, lambda case: self._stage_of(case, living))
        anywhere = sorted_by.pop(ANYWHERE, [])
        for target, those in sorted_by.items():
            self._holdings.stage(target, those)
        loads = {worker.id: worker.staged + self._ledger.owned[worker.id] for worker in living}
        for target, those in spread(anywhere, loads).items():
            self._holdings.stage(target, those)

    def _stage_of(self, case: Case, living: Sequence[Worker]) -> int:
        """Return the replacement's worker that the cut of an incumbent's connection goes to."""
        return (self._route(case) or living[0].id) if self._is_of_cut(case) else ANYWHERE

    def _is_of_cut(self, case: Case) -> bool:
        return self.has_cut and (self._asked.move == "together" or case.kind != messages.Kind.HTTP)

    def _route(self, case: Case) -> int:
        """Return the worker to which the cut of an incumbent's connection goes, or 0."""
        route = self._routes.get(case.owner, 0)
        return route if self._is_of_cut(case) and self._holdings.is_alive(route) else 0

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
        served = self._ledger.sort(self._ledger.find(Standing.SERVED, owners=(worker.id,)), self._is_of_cut)
        worker.queue.extend(served.get(False, ()))
        if self.has_cut:
            self._freeze_cut(worker, served.get(True, []))
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
            epoch=tuple(self._ledger.freeze(cookies)),
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
            waiting = [worker.queue.popleft() for _ in range(min(len(worker.queue), ROLLING_BATCH))]
            batch = self._ledger.of(waiting, Standing.SERVED)
            if batch:
                self._freeze(worker, batch, is_cut=False)

    # ---- answers

    def frozen(self, event: FromWorker) -> None:
        """
        Records came: park the connections and give them to whom the direction wants.

        Raises:
            IllegalEvent: one is not the sender's, was not asked for, or is of an unknown kind.

        """
        worker = self._holdings.workers[event.worker]
        message = self._ledger.frozen(worker.id, messages.expect(event.message, messages.Frozen))
        worker.unanswered.discard(message.batch)
        worker.parked_bytes += message.size_bytes
        self.place(message.cookie)
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
        served = self._holdings.adopt(event)
        self.pauses_us.extend(served.pause_us)
        self.moved += served.rows * (event.worker in self.replacements)
        reasons = self._ledger.kept_because
        self.kept.update((cookie, reasons[cookie]) for cookie in reasons.keys() & served.cookie)
        self._settled(served.cookie)

    def refused(self, event: FromWorker) -> None:
        """
        The sender keeps these (answer to a freeze), or gives their records back (answer to a thaw).

        Raises:
            IllegalEvent: one was neither asked for nor given to it.

        """
        message = messages.expect(event.message, messages.Refused)
        asked = Standing.THAWING, Standing.FREEZING
        kept, given_back = self._ledger.refuse(event.worker, message, *asked)
        if not self.is_backwards or event.worker in self.replacements:
            self.kept.update((cookie, self._ledger.kept_because[cookie]) for cookie in kept)
        self._settled(kept)
        # What is ceded is none of the incumbent's.
        self.given_back += len(self._ledger.sort(given_back, lambda case: case.is_ceded).get(False, ()))
        self._holdings.drop(self._ledger.forget_others(kept))
        self.place(given_back)

    def gathered(self, event: FromWorker) -> None:
        """The sender's cut is closed."""
        worker = self._holdings.workers[event.worker]
        if worker.is_off:  # else it answers a move that was rolled back
            worker.has_gathered = True
            worker.shared = tuple(messages.expect(event.message, messages.Gathered).shared)

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

    def place(self, parked: Sequence[int]) -> None:
        """Give parked connections to whom the direction wants; nobody alive, they stay; nobody fit, they are lost."""
        listened = self._holdings.close_without_listener(parked)
        if len(listened) < len(parked):
            closed = set(parked).difference(listened)
            self.closed |= closed
            self._settled(closed)
        for target, cookies in self._ledger.sort(listened, self._destination).items():
            if target is not None:
                self.open.update(cookies)
                self._thaw(target, cookies)
            elif self.living_incumbents() or self.living_replacements():
                self._holdings.lose(cookies)
                self.note_lost(cookies)

    def place_all(self) -> None:
        self.place(self._ledger.parked())

    def _destination(self, case: Case) -> int | None:
        sides = [self.living_replacements(), self.living_incumbents()]
        if case.listener in self._asked.added:
            sides.pop()  # the incumbent does not know its listener
        if self.is_backwards or case.is_kept:
            sides.reverse()
        for side in sides:
            living = [worker.id for worker in side if worker.id not in case.unfit]
            if not living:
                continue
            preferred = [copy for copy in (self._route(case), case.staged_in, case.origin) if copy in living]
            return preferred[0] if preferred else min(living, key=lambda worker: self._ledger.owned[worker])
        return self._holdings.ceder(case) if any(sides) else None

    def _thaw(self, target: int, cookies: Sequence[int]) -> None:
        without_copy = self._ledger.without_copy(cookies, target)
        is_forward = target in self.replacements
        if is_forward:
            # What became part of a cut after it was built elsewhere belongs to the others of its worker.
            self._holdings.drop(self._ledger.unstage(without_copy, self.replacements))
            leaving = [cookie for cookie in cookies if cookie not in self._left]
            owners = self._ledger.column("owner", leaving)
            self._left.update(zip(leaving, owners, strict=True))
            self._between.update(owners)
        self._holdings.stage(target, without_copy)
        # It waits for the cut, also where it missed its own incumbent's.
        is_cut = self.has_cut and not self.is_backwards and is_forward
        self._holdings.thaw(target, cookies, is_cut=is_cut and not self._holdings.workers[target].has_entered)

    # ---- settling

    def _settled(self, cookies: Collection[int]) -> None:
        """Their passage is over; the incumbents that they left may freeze others."""
        self.open.difference_update(cookies)
        left = collections.Counter(map(self._left.pop, cookies, itertools.repeat(0)))
        self._between.subtract(left)
        for incumbent in left:
            if not self.is_backwards and self._holdings.is_alive(incumbent):
                self._feed(self._holdings.workers[incumbent])

    def note_ended(self, cookies: Sequence[int]) -> None:
        self.ended += len(self.open.intersection(cookies))  # the others had moved before, or were no part of this
        for cookie in cookies:
            self.kept.pop(cookie, None)
        self._settled(cookies)

    def note_lost(self, cookies: Sequence[int]) -> None:
        self.lost += len(cookies)
        self.closed.difference_update(cookies)
        for cookie in cookies:
            self.kept.pop(cookie, None)
        self._settled(cookies)

    def note_burial(self, burial: Burial) -> None:
        self.note_lost(burial.lost)
        self.note_ended(burial.ended)

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
        self.open.difference_update(self._ledger.find(Standing.SERVED, owners=own))
        self.freeze_replacements()
        self.place_all()

    def freeze_replacements(self) -> None:
        """Freeze what the replacement serves or was given; what it refused to give back stays there."""
        self._close_without_listener()
        refused = self._ledger.kept_because
        for replacement in self.living_replacements():
            held = self._ledger.find(Standing.SERVED, Standing.THAWING, owners=(replacement.id,))
            cookies = [cookie for cookie in held if cookie not in refused and cookie not in self.closed]
            self.open.update(cookies)
            for chunk in chunks(cookies, messages.MAX_ROWS):
                self._freeze(replacement, chunk, is_cut=False)

    def _close_without_listener(self) -> None:
        """Let the replacement end these by itself: what is unsent, then FIN."""
        withdrawn = self._holdings.withdrawn
        for replacement in self.living_replacements():
            held = self._ledger.sort(
                self._ledger.find(owners=(replacement.id,)), lambda case: case.listener in withdrawn
            )
            cookies = [cookie for cookie in held.get(True, ()) if cookie not in self.closed]
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
        owing = set(self._ledger.column("owner", [cookie for cookie in self.open if cookie in self._ledger]))
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
